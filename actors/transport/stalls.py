"""Ends what stands still: transfers whose next bytes do not come, calls that say nothing.

gRPC's threads wait for a peer without a deadline of their own; one thread here looks at all of
those of a server, and cancels what has waited too long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A transfer that does not move for so long is ended.
STILL_S = 5.0
_LOOK_S = 0.25

log = logging.getLogger(__name__)


class Progress:
    """When something moved last; None while nothing is awaited."""

    __slots__ = ("_end", "limit_s", "moved_at")

    def __init__(self, end: Callable[[], object], limit_s: float) -> None:
        self._end = end
        self.limit_s = limit_s
        self.moved_at: float | None = None

    def moved(self) -> None:
        self.moved_at = time.monotonic()

    def rests(self) -> None:
        """Nothing is awaited from the other side."""
        self.moved_at = None

    def end_if_late(self, now: float) -> bool:
        moved_at = self.moved_at
        if moved_at is None or now - moved_at <= self.limit_s:
            return False
        self._end()
        return True


class Stalls:
    """Its thread runs only while there is something to look at."""

    def __init__(self) -> None:
        self._watched: set[Progress] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, end: Callable[[], object], limit_s: float | None = None) -> Iterator[Progress]:
        """``end`` is called once when what the block waits for does not move for ``limit_s``."""
        progress = self.watch(end, limit_s)
        progress.moved()
        try:
            yield progress
        finally:
            self.forget(progress)

    def watch(self, end: Callable[[], object], limit_s: float | None = None) -> Progress:
        progress = Progress(end, STILL_S if limit_s is None else limit_s)
        with self._changed:
            self._watched.add(progress)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)
                self._thread.start()
            self._changed.notify()
        return progress

    def forget(self, progress: Progress) -> None:
        with self._changed:
            self._watched.discard(progress)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._watched or self._closed)
                if self._closed:
                    return
                watched = list(self._watched)
            for progress in watched:
                try:
                    if progress.end_if_late(time.monotonic()):
                        self.forget(progress)
                except Exception:
                    # Whatever it is, the others are looked at.
                    log.exception("what stands still could not be ended")
                    self.forget(progress)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _LOOK_S)
