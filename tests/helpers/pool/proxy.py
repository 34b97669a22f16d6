"""A TCP proxy between a router and a host that can change bytes, stop, or cut the connection."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# (bytes, whether they go to the host) -> bytes
Change = Callable[[bytes, bool], bytes]


class Proxy:
    """Forwards to ``target`` (host:port); `change` sees everything that passes."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.change: Change = lambda data, to_host: data
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """End all connections; new ones are taken."""
        for pair in list(self._pairs):
            for sock in pair:
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                sockets = [self._listener, *(sock for pair in self._pairs for sock in pair)]
                for sock in select.select(sockets, [], [], 0.05)[0]:
                    if sock is self._listener:
                        near, _ = sock.accept()
                        self._pairs.append((near, socket.create_connection(self._target)))
                    else:
                        self._forward(sock)
        finally:
            for pair in self._pairs:
                for sock in pair:
                    sock.close()
            self._listener.close()

    def _forward(self, sock: socket.socket) -> None:
        pair = next((pair for pair in self._pairs if sock in pair), None)
        if pair is None:
            return  # it was closed in this very round
        near, far = pair
        try:
            data = sock.recv(1 << 16)
            if data:
                (far if sock is near else near).sendall(self.change(data, sock is near))
        except OSError:
            data = b""
        if not data:
            self._pairs.remove(pair)
            near.close()
            far.close()


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
