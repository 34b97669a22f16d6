"""How one thread waits for many descriptors at once, and can be woken by others."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import Protocol


class Poller(Protocol):
    """Waits until some of the registered descriptors are readable."""

    def register(self, fd: int) -> None: ...

    def unregister(self, fd: int) -> None: ...

    def wait(self, timeout_s: float) -> list[int]:
        """Wait up to ``timeout_s`` until a descriptor is readable; return all that are."""
        ...

    def ring(self) -> None:
        """Wake up the thread that waits, from another one."""
        ...

    def close(self) -> None: ...


class Epoll:
    """The system's own (epoll)."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)

    def register(self, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLIN)

    def unregister(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def wait(self, timeout_s: float) -> list[int]:
        # epoll counts whole milliseconds. The half millisecond makes sure that a deadline has
        # passed when the wait ends.
        found = self._epoll.poll(timeout_s + 0.0005 if timeout_s > 0 else 0.0)
        ready = [fd for fd, _ in found]
        if self._bell in ready:
            ready.remove(self._bell)
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        return ready

    def ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._bell)
