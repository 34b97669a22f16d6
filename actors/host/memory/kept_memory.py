"""A host's side of the memory keeper (`memory_keeper.py`)."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ....proto.unix_peers import same_user
from .memory_keeper import MESSAGE_BYTES, MOST_CHUNKS, allow_descriptors

log = logging.getLogger(__name__)

# How long a host waits for what its predecessor has left. A killed process with much memory takes
# some time to end.
_LEFT_S = 5.0
# Between two attempts to reach a keeper; each pause is twice as long as the one before.
_RETRY_S, _MOST_RETRY_S = 1.0, 60.0
_SEND_S = 1.0
_BACKLOG = 64
_KEEPER = "moesaic.actors.host.memory.memory_keeper"


class Keepable(Protocol):
    """One model's memory, which a successor can use; `ExpertMemory` is one."""

    @property
    def descriptor(self) -> int | None:
        """The memory itself; None if there is none yet."""
        ...

    def chunks(self) -> Mapping[int, int]:
        """Return {number: serial} of the parts of a device's memory.

        It is the same object as long as nothing has changed.
        """
        ...

    def lend_chunk(self, number: int, serial: int) -> int | None:
        """Return a descriptor of such a part, or None if it has gone; the caller closes it."""
        ...


@dataclass(slots=True)
class LeftMemory:
    """What a killed process has left of one model. It owns the descriptors until they are taken."""

    model: str
    descriptor: int  # of the memory itself
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)  # {number: serial, descriptor}

    def take(self) -> tuple[int, dict[int, tuple[int, int]]]:
        """Return the descriptors, which are the caller's from now on."""
        found = self.descriptor, self.chunks
        self.descriptor, self.chunks = -1, {}
        return found

    def close(self) -> None:
        """Close the descriptors, unless they were taken."""
        descriptor, chunks = self.take()
        for one in (descriptor, *(descriptor for _, descriptor in chunks.values())):
            if one >= 0:
                os.close(one)


class _NotTakenError(Exception):
    """Descriptors that the keeper cannot have, though it answers."""


@dataclass(slots=True)
class _Kept:
    """One model's memory as the keeper has it."""

    memory: Keepable
    descriptor: int  # this object's own
    chunks: Mapping[int, int] | None = None  # {number: serial}; None: it does not have the memory


class KeptMemory:
    """The memory that one host has handed to its node's keeper, which it starts if there is none.

    A thread watches the keeper. If it dies, another one is started and gets the same memory. A
    keeper that cannot take more is logged: what it lacks is loaded again after the host's death.
    """

    def __init__(self, address: str, host: str, *, keep_s: float, parent_pid: int) -> None:
        """Connect to the keeper at an abstract Unix address.

        The memory of the process that was ``host`` before is in `left`, which the caller closes.
        The keeper ends with the process ``parent_pid``, and keeps memory for ``keep_s`` seconds
        after its host has died.
        """
        self._address = address
        self._host = host
        self._keep_s = keep_s
        self._parent_pid = parent_pid
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._closed = threading.Event()
        self._retry_s = _RETRY_S
        self._warned = False  # of memory that the keeper lacks
        self._socket, self.left = self._join()
        # The chunks that the keeper has of the memory in `left`, until that is kept or forgotten.
        self._found = {
            left.model: {number: serial for number, (serial, _) in left.chunks.items()}
            for left in self.left
        }
        self._thread = threading.Thread(target=self._watch, name=f"{host}-keeper", daemon=True)
        self._thread.start()

    def keep(self, model: str, memory: Keepable) -> None:
        """Let the keeper have a model's memory as it is now, which it may have in part.

        The first memory of a model that is in `left` must be that which was left.
        """
        with self._lock:
            kept = self._kept.get(model)
            if kept is None or kept.memory is not memory:
                kept = self._begin(model, memory)
            if kept is not None:
                self._bring(model, kept)

    def forget(self, model: str) -> None:
        """Let the keeper free what it has of a model."""
        with self._lock:
            self._drop(model)
            self._free(model)

    def close(self) -> None:
        """Leave the keeper, which frees this host's memory now; it may be called twice."""
        with self._lock:
            self._closed.set()
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it may have ended
                    self._say(self._socket, {"leave": True})
            self._hang_up()
            for model in list(self._kept):
                self._drop(model)
        self._thread.join(_RETRY_S)

    # ---- memory; the lock is held ---------------------------------------------------------------

    def _begin(self, model: str, memory: Keepable) -> _Kept | None:
        """Take note of a model's new memory; None if there is none yet."""
        chunks = self._found.get(model)
        if model in self._kept:
            self._drop(model)
            self._free(model)
        descriptor = None if self._closed.is_set() else memory.descriptor
        if descriptor is None:
            return None
        try:
            kept = self._kept[model] = _Kept(memory, os.dup(descriptor), chunks)
        except OSError as error:
            self._warn(model, error)
            return None
        self._found.pop(model, None)
        return kept

    def _drop(self, model: str) -> None:
        self._found.pop(model, None)
        kept = self._kept.pop(model, None)
        if kept is not None:
            os.close(kept.descriptor)

    def _bring(self, model: str, kept: _Kept) -> None:
        """Tell the keeper what has changed of a model's memory since it was told last.

        A host does so before it serves an expert, and after it has freed one.
        """
        if self._socket is None:
            return
        there = kept.memory.chunks()
        if kept.chunks is there:
            return
        try:
            if kept.chunks is None:
                self._ask({"keep": model}, [kept.descriptor])
                kept.chunks = {}
            known = dict(kept.chunks)
            kept.chunks = known  # also if an error ends this
            for part in _parts(known.items() - there.items()):
                self._ask({"forget": model, "chunks": part})
                known = kept.chunks = {n: s for n, s in known.items() if (n, s) not in part}
            for part in _parts(there.items() - known.items()):
                self._bring_chunks(model, kept.memory, part)
                known.update(part)
        except _NotTakenError as error:
            self._warn(model, error)
        except (OSError, ValueError) as error:
            self._lose(error)
        else:
            kept.chunks = there
            self._warned = False

    def _bring_chunks(
        self, model: str, memory: Keepable, chunks: Sequence[tuple[int, int]]
    ) -> None:
        given: list[tuple[int, int]] = []
        descriptors: list[int] = []
        try:
            try:
                for chunk in chunks:
                    descriptor = memory.lend_chunk(*chunk)
                    if descriptor is not None:  # it may have gone a moment ago
                        given.append(chunk)
                        descriptors.append(descriptor)
            except (OSError, RuntimeError) as error:
                raise _NotTakenError(str(error)) from error
            if given:
                self._ask({"keep": model, "chunks": given}, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _free(self, model: str) -> None:
        """Let the keeper free what it has of a model, if there is a keeper."""
        if self._socket is None:
            return
        try:
            self._ask({"forget": model})
        except (OSError, ValueError) as error:
            self._lose(error)

    def _ask(self, message: dict[str, object], descriptors: Sequence[int] = ()) -> None:
        """Wait until the keeper has done something. Raises _NotTakenError, OSError, ValueError."""
        assert self._socket is not None
        self._say(self._socket, message, descriptors)
        answer = _hear(self._socket)
        if answer.get("done") is False:
            raise _NotTakenError("no descriptor is free in its process")
        if answer.get("done") is not True:
            raise OSError(errno.EPROTO, f"it answers {answer}")

    def _lose(self, error: Exception) -> None:
        """Give this keeper up; the thread starts another."""
        log.info("host %s: its memory keeper does not answer: %s", self._host, error)
        self._hang_up()

    def _warn(self, model: str, error: Exception) -> None:
        if not self._warned:
            log.warning(
                "host %s: its memory keeper cannot have all of %s, so some experts would be "
                "loaded again after its death: %s",
                self._host,
                model,
                error,
                extra={"host": self._host, "model": model},
            )
        self._warned = True

    # ---- the keeper -----------------------------------------------------------------------------

    def _join(self) -> tuple[socket.socket | None, list[LeftMemory]]:
        """Connect, and return what a predecessor has left; only one thread connects at a time."""
        left: dict[str, LeftMemory] = {}
        sock: socket.socket | None = None
        try:
            sock = self._connect()
            self._say(sock, {"hello": self._host, "keep_s": float(self._keep_s)})
            count = int(_hear(sock).get("left", 0))
            allow_descriptors(count * MOST_CHUNKS)
            for _ in range(count):
                self._say(sock, {"next": True})
                self._take_left(sock, left)
            sock.settimeout(_SEND_S)
            self._retry_s = _RETRY_S
        except (OSError, ValueError, LookupError, TypeError, subprocess.SubprocessError) as error:
            log.log(
                logging.WARNING if self._retry_s == _RETRY_S else logging.DEBUG,
                "host %s: no memory keeper, so its experts would be loaded again after its death: "
                "%s",
                self._host,
                error,
                extra={"host": self._host},
            )
            if sock is not None:
                sock.close()
            sock = None
        return sock, list(left.values())

    def _take_left(self, sock: socket.socket, left: dict[str, LeftMemory]) -> None:
        """Receive one message of what was left, and add it."""
        data, given, _, _ = socket.recv_fds(
            sock, MESSAGE_BYTES, MOST_CHUNKS, socket.MSG_CMSG_CLOEXEC
        )
        try:
            if not data:
                raise OSError(errno.EPIPE, "the keeper has ended")
            message = json.loads(data)
            model, chunks = message["model"], message["chunks"]
            if len(given) < max(1, len(chunks)):
                # A slot counts as empty if a chunk is missing that it has a part in.
                log.warning(
                    "host %s: not all that is left of %s can be taken over, because this process "
                    "has too many descriptors",
                    self._host,
                    model,
                    extra={"host": self._host, "model": model},
                )
            if chunks and model in left:
                for (number, serial), descriptor in zip(chunks, list(given), strict=False):
                    left[model].chunks[number] = serial, descriptor
                    given.remove(descriptor)
            elif given and model not in left:
                left[model] = LeftMemory(model, given.pop())
        finally:
            for descriptor in given:
                os.close(descriptor)

    def _connect(self) -> socket.socket:
        """Return a connection to the keeper; start one if there is none. Raises OSError."""
        for _ in range(3):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(_LEFT_S)
            try:
                sock.connect(f"\0{self._address}")
                if not same_user(sock):
                    raise OSError(errno.EPERM, "another user's process listens at its address")
                return sock
            except ConnectionRefusedError:
                sock.close()
                self._start()
            except OSError:
                sock.close()
                raise
        raise OSError(errno.ECONNREFUSED, "it does not accept connections")

    def _start(self) -> None:
        """Start a keeper, unless another host of the node has been faster. Raises OSError."""
        # The kernel accepts connections before the keeper's process runs, so hosts need not wait.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(f"\0{self._address}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return
                raise
            listener.listen(_BACKLOG)
            number = listener.fileno()
            command = [sys.executable, "-m", _KEEPER, str(number), str(self._parent_pid)]
            # The command forks the keeper and exits. Pipes of this process would stay open in it.
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[number],
                timeout=_LEFT_S,
                check=True,
            )

    def _hang_up(self) -> None:
        """Shut the connection down, so that the thread notices and closes it."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # the other side may have ended it
                self._socket.shutdown(socket.SHUT_RDWR)

    def _say(
        self, sock: socket.socket, message: dict[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        socket.send_fds(sock, [json.dumps(message).encode()], descriptors)

    def _disconnect(self) -> None:
        self._found.clear()
        for kept in self._kept.values():
            kept.chunks = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _watch(self) -> None:
        while True:
            sock = self._socket
            if sock is not None and _is_there(sock):
                continue
            with self._lock:
                self._disconnect()
            if self._closed.is_set():
                return
            sock, left = self._join()  # may take seconds, in which the host goes on
            with self._lock:
                self._socket = sock
                for memory in left:
                    memory.close()  # this process has it, or has loaded it by now
                    if memory.model not in self._kept:
                        self._free(memory.model)
                for model, kept in self._kept.items():
                    self._bring(model, kept)
                if self._closed.is_set():
                    self._hang_up()
            if sock is None:
                self._closed.wait(self._retry_s)
                self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S)


def _hear(sock: socket.socket) -> dict[str, Any]:
    """Return an answer of the keeper. Raises OSError and ValueError."""
    data = sock.recv(MESSAGE_BYTES)
    if not data:
        raise OSError(errno.EPIPE, "the keeper has ended")
    answer = json.loads(data)
    if not isinstance(answer, dict):
        raise OSError(errno.EPROTO, f"it answers {answer!r}")
    return answer


def _parts(chunks: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Return chunks in lists that one message can have."""
    given = sorted(chunks)
    for start in range(0, len(given), MOST_CHUNKS):
        yield given[start : start + MOST_CHUNKS]


def _is_there(sock: socket.socket) -> bool:
    """Wait up to a send's time limit, and return whether the other side has not ended."""
    poll = select.poll()
    poll.register(sock, 0)  # ends alone: another thread reads the answers
    return not poll.poll(_SEND_S * 1e3)
