"""The memory keeper: a small process of each node that holds the memory of hosts that die.

python -m moesaic.actors.host.memory_keeper LISTENER PARENT

Memory of hosts is anonymous: it is freed with the last descriptor and the last mapping of it. The
keeper has a descriptor of each, so what a killed host had loaded waits there for its successor. It
maps nothing and reads nothing. If the keeper itself dies, hosts start another and hand it theirs.

It listens on an abstract Unix socket (descriptor LISTENER), and ends when no host is connected and
nothing is kept, or when the process PARENT (the node's raylet) ends. A message is a JSON object:

    host -> keeper   {"hello": HOST, "keep_s": SECONDS} | {"keep": MODEL} and a descriptor |
                     {"forget": MODEL} | {"leave": true}
    keeper -> host   {"left": COUNT}, then COUNT times {"model": MODEL} and a descriptor

This module imports nothing but the standard library and the state machine, to stay small.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Sequence

from ...cluster.host.memory_keeping import Answer, KeeperCommand, MemoryKeeping
from ...proto.unix_peers import same_user

MESSAGE_BYTES = 4096
# A new keeper waits for the host that has started it, however slow the machine is.
_FIRST_S = 60.0
_LONGEST_S = 86_400.0
_PAUSE_S = 0.1


class MemoryKeeper:
    """The event loop of a keeper."""

    def __init__(self, listener: socket.socket, parent: int | None) -> None:
        """Take the listening socket, and a descriptor of the process that it ends with."""
        self._listener = listener
        self._parent = parent
        self._keeping = MemoryKeeping()
        self._hosts: dict[int, socket.socket] = {}
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
            data, given, _, _ = socket.recv_fds(
                self._hosts[number], MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
            if not data or not self._take(number, json.loads(data), given):
                self._lose(number)
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError):
            self._lose(number)  # the host notices, and comes again
        finally:
            for descriptor in given:
                os.close(descriptor)

    def _take(self, number: int, message: object, given: list[int]) -> bool:
        """Carry out a host's message; return whether it was one."""
        match message:
            case {"hello": str(host), "keep_s": float(keep_s)} if 0 <= keep_s <= _LONGEST_S:
                self._came = True
                self._execute(self._keeping.hello(number, host, keep_s))
            case {"keep": str(model)} if given:
                self._execute(self._keeping.keep(number, model, given.pop()))
            case {"forget": str(model)}:
                self._execute(self._keeping.forget(number, model))
            case {"leave": True}:
                self._execute(self._keeping.leave(number, time.monotonic()))
            case _:
                return False
        return True

    def _lose(self, number: int) -> None:
        host = self._hosts.pop(number)
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
        host = self._hosts[answer.connection]
        try:
            host.send(json.dumps({"left": len(answer.kept)}).encode())
            for model, descriptor in answer.kept:
                socket.send_fds(host, [json.dumps({"model": model}).encode()], [descriptor])
        except OSError:
            self._lose(answer.connection)  # the host notices, and loads its experts instead


def main(listener: int, parent_pid: int) -> None:
    """Fork a keeper into a session of its own, and exit."""
    # Ray kills the child processes of a worker that it kills, so the keeper must not be one.
    if os.fork() > 0:
        os._exit(0)
    os.setsid()
    parent = os.pidfd_open(parent_pid) if parent_pid > 1 else None
    MemoryKeeper(socket.socket(fileno=listener), parent).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
