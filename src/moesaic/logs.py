"""The logs of a cluster's processes on this machine.

Ray keeps two files for each process, dead processes included. They are read without asking any
process, so they can be read when nothing answers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, get_args

from .actors.runtime.log_lines import is_log_line
from .actors.runtime.process_labels import announced
from .proto.errors import ClusterError, RequestError
from .session import ClusterSession

LogKind = Literal["controller", "ingress", "router", "trunk", "host", "run", "worker"]
KINDS: tuple[LogKind, ...] = get_args(LogKind)

LOOK_S = 0.25
# Each process writes at the head of its log what it is.
_HEAD_BYTES = 1 << 14
_BLOCK_BYTES = 1 << 16
# The most that is read of one file, for its last lines or between two looks.
_MOST_BYTES = 1 << 23
_RAYS = re.compile(rb":(job_id|actor_name|task_name):")
_WORKER = re.compile(r"worker-(?P<worker>\w+)-\w+-(?P<pid>\d+)\.out")


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line that one process printed."""

    kind: str  # controller, ingress, router, trunk, host
    name: str  # of the host, or the trunk's model
    pid: int
    stream: str  # stdout or stderr
    text: str

    def __str__(self) -> str:
        """Return the line with its process; Moesaic's own lines name it themselves."""
        return self.text if is_log_line(self.text) else f"{self.name} {self.pid}: {self.text}"


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    kind: LogKind
    name: str
    pid: int
    stream: str

    def line(self, text: bytes) -> LogLine:
        said = text.decode(errors="replace").rstrip("\r")
        return LogLine(self.kind, self.name, self.pid, self.stream, said)


def read_logs(
    session: ClusterSession,
    kinds: Collection[LogKind] = (),
    *,
    host: str | None = None,
    tail: int,
    follow: bool,
    stop: Event,
) -> Iterator[LogLine]:
    """Yield the last ``tail`` lines of each stream of each process, one process after the other.

    ``kinds`` and ``host`` select processes; empty ``kinds`` are all. With ``follow`` new lines and
    new processes follow, until ``stop`` is set. Hosts on other machines have their logs there.
    Raises RequestError for an unknown kind or a negative ``tail``, and ClusterError if this machine
    has no such logs.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise RequestError(f"kinds: {min(unknown)!r} is not one of {', '.join(KINDS)}")
    if tail < 0:
        raise RequestError(f"tail: {tail} is below 0; give 0 or more")
    if session.logs is None:
        raise ClusterError(
            f"the session file of cluster {session.name!r} names no folder of logs: Ray did not "
            "report one when the cluster started"
        )
    wanted = frozenset(["host"] if host is not None else kinds or KINDS)
    files = _files(session, Path(session.logs), wanted, host)
    if not files:
        raise ClusterError(_nothing(session, Path(session.logs), wanted, host))
    return _lines(session, files, wanted, host, tail, follow, stop)


def _lines(
    session: ClusterSession,
    files: list[_File],
    wanted: frozenset[str],
    host: str | None,
    tail: int,
    follow: bool,
    stop: Event,
) -> Iterator[LogLine]:
    read: dict[Path, int] = {}
    for file in files:
        texts, read[file.path] = _tail(file.path, tail)
        yield from map(file.line, texts)
    while follow and not stop.wait(LOOK_S):
        for file in _files(session, Path(session.logs or ""), wanted, host):
            texts, read[file.path] = _more(file.path, read.get(file.path, 0))
            yield from map(file.line, texts)


def _files(
    session: ClusterSession, folder: Path, kinds: frozenset[str], host: str | None
) -> list[_File]:
    """Find the selected processes' files, sorted by kind and name."""
    found: list[_File] = []
    for out in folder.glob("worker-*.out"):
        named = _WORKER.fullmatch(out.name)
        with out.open("rb") as opened:
            process = announced(opened.read(_HEAD_BYTES).decode(errors="replace"))
        if named is None or process is None or process.cluster != session.name:
            continue
        if process.kind not in kinds or host not in (None, process.name):
            continue
        for path, stream in ((out, "stdout"), (out.with_suffix(".err"), "stderr")):
            if path.exists():
                found.append(_File(path, process.kind, process.name, int(named["pid"]), stream))
    return sorted(found, key=lambda one: (KINDS.index(one.kind), one.name, one.pid, one.path))


def _nothing(session: ClusterSession, folder: Path, kinds: frozenset[str], host: str | None) -> str:
    if host is not None:
        known = {file.name for file in _files(session, folder, frozenset(["host"]), None)}
        there = ", ".join(sorted(known)) or "no host"
        return f"host: this machine has no log of {host!r}; it has logs of {there}"
    return f"there is no log of {', '.join(sorted(kinds))} on this machine"


def _tail(path: Path, lines: int) -> tuple[list[bytes], int]:
    """Return the last complete lines, and how far the file was read."""
    with path.open("rb") as file:
        end = at = file.seek(0, 2)
        text = b""
        while at and text.count(b"\n") <= lines and len(text) < _MOST_BYTES:
            step = min(_BLOCK_BYTES, at)
            at -= step
            file.seek(at)
            text = file.read(step) + text
    whole = text.rfind(b"\n") + 1
    found = _split(text[:whole])
    return (found[-lines:] if lines else []), end - (len(text) - whole)


def _more(path: Path, read: int) -> tuple[list[bytes], int]:
    """Return the lines after offset ``read``, and how far the file is read now."""
    with path.open("rb") as file:
        file.seek(read)
        text = file.read(_MOST_BYTES)
    whole = text.rfind(b"\n") + 1
    if not whole and len(text) == _MOST_BYTES:
        whole = len(text)  # a line that does not end
    return _split(text[:whole]), read + whole


def _split(text: bytes) -> list[bytes]:
    """Split into lines, and leave out those that Ray writes for itself."""
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    return [line for line in lines if not _RAYS.match(line)]
