"""A queue between threads with a file descriptor, so that epoll can wait for it and for sockets."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue whose descriptor is readable while it has items, and always once it has ended.

    Any thread puts, one thread takes. Neither takes a lock while items pass, so the taker that was
    woken up never waits for a lock that the putter still holds.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._signalled = self._ended = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd_lock = threading.Lock()

    def fileno(self) -> int:
        return self._fd

    def put(self, item: T) -> None:
        self._items.append(item)
        if not self._signalled:
            self._signal()

    def end(self) -> None:
        self._ended = True
        self._signal()

    def take(self) -> list[T]:
        try:
            if self._fd >= 0:
                os.eventfd_read(self._fd)
        except BlockingIOError:
            pass  # nothing was signalled since the last call
        # Reset the flag before taking items: an item that is put after this line signals anew.
        self._signalled = False
        items = [self._items.popleft() for _ in range(len(self._items))]
        if self._ended:
            self._signal()
        return items

    def __len__(self) -> int:
        return len(self._items)

    def close(self) -> None:
        with self._fd_lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _signal(self) -> None:
        self._signalled = True
        # The lock guards against `close` only: after it, the same number may be another file.
        with self._fd_lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)
