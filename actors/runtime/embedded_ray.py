"""A Ray inside this process: a start that fails leaves nothing behind, and is tried once more.

A machine that is busy may be too slow for the 30 s that Ray gives its processes. Ray then raises
an error and leaves those that it had started: they hold memory and ports until this process ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import shutil
import stat
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import ray
from ray._common.utils import get_default_system_temp_dir

from ...proto.errors import ClusterError
from .ray_token import make_token

log = logging.getLogger(__name__)

TRIES = 2
# The one of Ray's own waits for its processes that can be set; by default 30 s.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")
# Those whose words tell most come first.
_LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out")
_TAIL_LINES = 3
_END_S = 10.0


def start_embedded(said: Callable[[str], None] = log.warning, **options: Any) -> None:
    """`ray.init` of a new Ray with these options.

    ``said`` is told of a start that failed and is tried once more. Raises ClusterError with the
    cause when that fails too.
    """
    make_token()
    for number in range(1, TRIES + 1):
        before = sessions()
        try:
            ray.init(address="local", _temp_dir=str(_ray_folder()), **options)
            return
        except BaseException as error:
            folders = sorted(sessions() - before)
            words = f"Ray did not start: {_reason(error)}{_last_words(folders)}"
            end_sessions(folders)
            # Of a start that failed late, when this process had connected already.
            ray.shutdown()
            _forget_processes(error)
            if not isinstance(error, Exception):
                raise
            if number == TRIES:
                raise ClusterError(f"ray.address: local: {words}") from error
            said(f"{words}; it is tried once more")


def end_embedded() -> None:
    """`ray.shutdown` of the Ray that this process started, and of what that leaves: processes that
    are frozen, and those that take longer than they may."""
    running = processes_of(*(folder.name for folder in sessions()))
    try:
        ray.shutdown()
    finally:
        _, left = psutil.wait_procs(running, timeout=_END_S)
        _kill(left)


def kill_embedded() -> None:
    """End all processes of Rays that this process started, at once."""
    _kill_sessions([folder.name for folder in sessions()])


def _forget_processes(error: BaseException) -> None:
    """What Ray keeps of them hangs on the error, and would complain that they are running."""
    traceback.clear_frames(error.__traceback__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def sessions() -> set[Path]:
    """The folders of all Rays that this process started."""
    return set(_ray_folder().glob(f"session_*_{os.getpid()}"))


@cache
def _ray_folder() -> Path:
    """Where this process's Rays leave their sockets, logs and packages. Ray lets all users of the
    machine write there, so it lies in a folder which no other user can enter. It has a short name:
    those of sockets may have 107 characters."""
    above = Path(get_default_system_temp_dir())
    private = above / f"moesaic-{os.geteuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        found = private.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not own or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            # Somebody else was first.
            private = Path(mkdtemp(prefix="moesaic-", dir=above))
    except OSError as error:
        raise ClusterError(
            f"ray.address: local: Ray's folder cannot be made in {above} ({error.strerror}); let "
            "RAY_TMPDIR name another one"
        ) from error
    return private / "ray"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _last_words(folders: list[Path]) -> str:
    """What the processes of a start that failed wrote last."""
    for folder in folders:
        for name in _LOGS:
            with contextlib.suppress(OSError):
                text = (folder / "logs" / name).read_text(errors="replace")
                if lines := [line for line in text.splitlines() if line.strip()]:
                    return f" {name} ends with: " + " | ".join(lines[-_TAIL_LINES:])
    return " (none of its processes wrote a log)"


def end_sessions(folders: list[Path]) -> None:
    """End all processes of the Rays with these folders, and remove the folders.

    They are found by the session's name in their command lines, which is unlike any other's, and
    as children of those.
    """
    _kill_sessions([folder.name for folder in folders])
    for folder in folders:
        latest = folder.with_name("session_latest")
        if latest.is_symlink() and latest.readlink() == folder:
            latest.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_sessions(names: list[str]) -> None:
    deadline = time.monotonic() + _END_S
    while found := processes_of(*names):
        _kill(found)
        if time.monotonic() > deadline:
            left = ", ".join(str(process.pid) for process in found)
            log.warning("processes of a Ray could not be ended: %s", left)
            return


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=1.0)


def processes_of(*sessions: str) -> list[psutil.Process]:
    """Those that run for one of these sessions of Ray."""
    if not sessions:
        return []
    named = re.compile(rf"\b({'|'.join(map(re.escape, sessions))})\b")
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if named.search(" ".join(process.cmdline())):
                # Workers, the children of a raylet, call themselves otherwise.
                found += [process, *process.children(recursive=True)]
    return list(dict.fromkeys(found))
