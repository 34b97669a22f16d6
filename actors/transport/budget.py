"""How much of one thing many may hold together: bytes that arrive, connections of one kind.

What is taken is given back by closing the share that took it, whatever happens in between, so a
peer that is lost in the middle of a message costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...proto.errors import Busy


class Budget:
    """Used by many threads at once."""

    def __init__(self, most: int, what: str) -> None:
        """``what`` stands in the error of whoever finds no room: "bytes of weights"."""
        self.most = most
        self._what = what
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        return self._held

    def share(self) -> Share:
        return Share(self)

    @contextmanager
    def holding(self, size: int = 1) -> Iterator[None]:
        """Raises Busy when there is no room for ``size`` more."""
        share = self.share()
        share.take(size)
        try:
            yield
        finally:
            share.close()

    def _move(self, share: Share, size: int) -> None:
        with self._lock:
            if share.closed:
                size = 0
            # What is larger than the whole has to go alone, or it never could.
            elif size > 0 and self._held and self._held + size > self.most:
                raise Busy(
                    f"{self._what}: {self._held} of {self.most} are in use, {size} more are too "
                    "many; try again later"
                )
            share.held += size
            self._held += size

    def _close(self, share: Share) -> None:
        with self._lock:
            self._held -= share.held
            share.held, share.closed = 0, True


class Share:
    """What one holder has of a budget. Behind `close` it takes nothing any more."""

    __slots__ = ("_budget", "closed", "held")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.held = 0
        self.closed = False

    def take(self, size: int) -> None:
        """Raises Busy when there is no room for ``size`` more."""
        self._budget._move(self, size)

    def give_back(self, size: int) -> None:
        """Some of what was taken."""
        self._budget._move(self, -min(size, self.held))

    def close(self) -> None:
        """Give everything back. Callable again."""
        self._budget._close(self)
