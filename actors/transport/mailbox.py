"""A queue between threads that one can wait for together with sockets."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue whose descriptor is readable while something is in it, and for ever when it ended.

    Any thread puts, one thread takes. There is no lock on the way, so that the taker, woken up,
    never finds the putter still holding one.
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
            pass  # nothing was signalled since the last time
        # In this order: whatever is put after this line signals anew.
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
        # Against `close` alone: afterwards the number may be another file's.
        with self._fd_lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)
