"""The memory keeper: a small process of each node that holds the memory of hosts that die.

python -m moesaic.actors.host.memory.memory_keeper LISTENER PARENT

Memory of hosts is anonymous: it is freed with the last descriptor and the last mapping of it. So is
memory of a CUDA device, in chunks with a descriptor each. The keeper has a descriptor of each, so
what a killed host had loaded waits there for its successor. It maps nothing and reads nothing, and
knows nothing of CUDA. If the keeper itself dies, hosts start another and hand it theirs.

It listens on an abstract Unix socket (descriptor LISTENER), and ends when no host is connected and
nothing is kept, or when the process PARENT (the node's raylet) ends. A message is a JSON object,
and CHUNKS are at most 64 pairs [NUMBER, SERIAL]:

    host -> keeper   {"hello": HOST, "keep_s": SECONDS} | {"next": true} | {"leave": true} |
                     {"keep": MODEL} and a descriptor |
                     {"keep": MODEL, "chunks": CHUNKS} and a descriptor for each |
                     {"forget": MODEL} | {"forget": MODEL, "chunks": CHUNKS}
    keeper -> host   {"done": BOOLEAN}, the answer to keep and forget: no descriptor may be free |
                     {"left": COUNT}, then for each of COUNT times next
                     {"model": MODEL, "chunks": CHUNKS} and a descriptor for each chunk, after
                     one with no chunks and the descriptor of the model's memory

A host waits for the answer to each message, and the keeper for the next: the system lets only so
many descriptors be on their way, and what a host has let the keeper forget must be free. This
module imports nothing but the standard library and the state machine, to stay small.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence

from ....cluster.host.memory_keeping import Answer, KeeperCommand, KeptChunk, MemoryKeeping
from ....proto.unix_peers import same_user

MESSAGE_BYTES = 4096
MOST_CHUNKS = 64  # of one message; Linux takes 253 descriptors
_MOST_DESCRIPTORS = 1 << 20  # more than all devices of a machine have chunks
# A new keeper waits for the host that has started it, however slow the machine is.
_FIRST_S = 60.0
_LONGEST_S = 86_400.0
_PAUSE_S = 0.1


def allow_descriptors(more: int) -> None:
    """Let this process open ``more`` descriptors than its limit says, or as many as it may."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + more if most == resource.RLIM_INFINITY else min(soft + more, most)
    # A limit above the system's own cannot be set again; then it stays as it is.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class MemoryKeeper:
    """The event loop of a keeper."""

    def __init__(self, listener: socket.socket, parent: int | None) -> None:
        """Take the listening socket, and a descriptor of the process that it ends with."""
        self._listener = listener
        self._parent = parent
        self._keeping = MemoryKeeping()
        self._hosts: dict[int, socket.socket] = {}
        # What is yet to be sent to a host of its predecessor's: messages, with descriptors.
        self._left: dict[int, deque[tuple[dict[str, object], list[int]]]] = {}
        self._came = False  # a host has come
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        if parent is not None:
            self._poll.register(parent, select.POLLIN)

    def run(self) -> None:
        """Serve hosts until none is connected and nothing is kept."""
        first_until = time.monotonic() + _FIRST_S
        while not self._keeping.is_over or not self._came:
            wake_at = self._keeping.wake_at if self._came else first_until
            left_s = None if wake_at is None else max(0.0, wake_at - time.monotonic())
            for descriptor, _ in self._poll.poll(None if left_s is None else left_s * 1e3 + 1):
                if descriptor == self._parent:
                    return
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor in self._hosts:  # it may have been lost a moment ago
                    self._hear(descriptor)
            self._execute(self._keeping.advance(time.monotonic()))
            if not self._came and time.monotonic() >= first_until:
                return

    def _accept(self) -> None:
        try:
            host, _ = self._listener.accept()
        except OSError:
            # No descriptor is free, for example; the host tries again.
            time.sleep(_PAUSE_S)
            return
        if not same_user(host):
            host.close()
            return
        host.setblocking(False)
        self._hosts[host.fileno()] = host
        self._poll.register(host, select.POLLIN)

    def _hear(self, number: int) -> None:
        given: list[int] = []
        try:
            data, given, flags, _ = socket.recv_fds(
                self._hosts[number], MESSAGE_BYTES, MOST_CHUNKS, socket.MSG_CMSG_CLOEXEC
            )
            lost = bool(flags & socket.MSG_CTRUNC)  # some descriptors: this process has too many
            if not data or not self._take(number, json.loads(data), given, lost=lost):
                self._lose(number)
        except (BlockingIOError, ConnectionResetError):
            return  # the host has ended before it read an answer; what it sent is read first
        except (OSError, ValueError, RecursionError):
            self._lose(number)  # the host notices, and comes again
        finally:
            for descriptor in given:
                os.close(descriptor)

    def _take(self, number: int, message: object, given: list[int], *, lost: bool) -> bool:
        """Carry out a host's message; return whether it was one."""
        match message:
            case {"next": True} if number in self._left:
                self._send_next(number)
            case _ if number in self._left:
                return False  # what is to be sent to it must not change
            case {"hello": str(host), "keep_s": float(keep_s)} if 0 <= keep_s <= _LONGEST_S:
                self._came = True
                self._execute(self._keeping.hello(number, host, keep_s))
            case {"keep": str()} if lost:
                self._send(number, {"done": False})
            case {"keep": str(model), "chunks": list(chunks)} if len(chunks) == len(given):
                for (chunk, serial), descriptor in zip(_pairs(chunks), list(given), strict=True):
                    given.remove(descriptor)
                    kept = KeptChunk(chunk, serial, descriptor)
                    self._execute(self._keeping.keep_chunk(number, model, kept))
                self._send(number, {"done": True})
            case {"keep": str(model), **others} if len(given) == 1 and not others:
                self._execute(self._keeping.keep(number, model, given.pop()))
                self._send(number, {"done": True})
            case {"forget": str(model), "chunks": list(chunks)}:
                for chunk, serial in _pairs(chunks):
                    self._execute(self._keeping.forget_chunk(number, model, chunk, serial))
                self._send(number, {"done": True})
            case {"forget": str(model), **others} if not others:
                self._execute(self._keeping.forget(number, model))
                self._send(number, {"done": True})
            case {"leave": True}:
                self._execute(self._keeping.leave(number, time.monotonic()))
            case _:
                return False
        return True

    def _lose(self, number: int) -> None:
        host = self._hosts.pop(number)
        self._left.pop(number, None)
        self._poll.unregister(host)
        host.close()
        self._execute(self._keeping.lost(number, time.monotonic()))

    def _execute(self, commands: Sequence[KeeperCommand]) -> None:
        for command in commands:
            if isinstance(command, Answer):
                self._answer(command)
            else:
                os.close(command.descriptor)

    def _answer(self, answer: Answer) -> None:
        assert isinstance(answer.connection, int)
        messages: deque[tuple[dict[str, object], list[int]]] = deque()
        for kept in answer.kept:
            messages.append(({"model": kept.model, "chunks": []}, [kept.descriptor]))
            for start in range(0, len(kept.chunks), MOST_CHUNKS):
                part = kept.chunks[start : start + MOST_CHUNKS]
                numbers = [(chunk.number, chunk.serial) for chunk in part]
                descriptors = [chunk.descriptor for chunk in part]
                messages.append(({"model": kept.model, "chunks": numbers}, descriptors))
        if messages:
            self._left[answer.connection] = messages
        self._send(answer.connection, {"left": len(messages)})

    def _send_next(self, number: int) -> None:
        message, descriptors = self._left[number].popleft()
        if not self._left[number]:
            del self._left[number]
        self._send(number, message, descriptors)

    def _send(
        self, number: int, message: dict[str, object], descriptors: Sequence[int] = ()
    ) -> None:
        try:
            socket.send_fds(self._hosts[number], [json.dumps(message).encode()], descriptors)
        except OSError:
            self._lose(number)  # the host notices, and loads its experts instead


def _pairs(given: list[object]) -> Iterator[tuple[int, int]]:
    """Return the chunks of a message. Raises ValueError."""
    for one in given:
        match one:
            case [int(number), int(serial)]:
                yield number, serial
            case _:
                raise ValueError(f"no chunk: {one!r}")


def main(listener: int, parent_pid: int) -> None:
    """Fork a keeper into a session of its own, and exit."""
    # Ray kills the child processes of a worker that it kills, so the keeper must not be one.
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    allow_descriptors(_MOST_DESCRIPTORS)
    parent = os.pidfd_open(parent_pid) if parent_pid > 1 else None
    MemoryKeeper(socket.socket(fileno=listener), parent).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
