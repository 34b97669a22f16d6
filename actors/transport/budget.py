"""Limits on what many peers hold together, e.g. bytes that arrive or connections of one kind.

Closing a share gives back all that it took, whatever happened in between, so a peer that is lost in
the middle of a message leaks nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...proto.errors import Busy


class SharedLimit:
    """A limit that all its shares together must not exceed; thread-safe."""

    def __init__(self, most: int, what: str) -> None:
        """Allow ``most`` in all; the Busy error names ``what``, e.g. "routers"."""
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
        """Hold ``size`` during the block. Raises Busy if there is no room for it."""
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
            # A request larger than the whole budget is granted if nothing else is held; otherwise
            # it would never be granted.
            elif size > 0 and self._held and self._held + size > self.most:
                raise Busy(
                    f"{self._what}: {self._held} of {self.most} are in use, which leaves no room "
                    f"for {size} more; try again later"
                )
            share.held += size
            self._held += size

    def _close(self, share: Share) -> None:
        with self._lock:
            self._held -= share.held
            share.held, share.closed = 0, True


class Share:
    """The part of a budget that one holder has; once closed, it takes nothing any more."""

    __slots__ = ("_budget", "closed", "held")

    def __init__(self, budget: SharedLimit) -> None:
        self._budget = budget
        self.held = 0
        self.closed = False

    def take(self, size: int) -> None:
        """Take ``size`` more. Raises Busy if there is no room for it."""
        self._budget._move(self, size)

    def give_back(self, size: int) -> None:
        """Give back ``size`` of what was taken."""
        self._budget._move(self, -min(size, self.held))

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        self._budget._close(self)
