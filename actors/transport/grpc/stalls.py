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
from typing import Protocol

# A transfer that does not move for so long is ended.
STILL_S = 5.0
_LOOK_S = 0.25
_FROZEN_S = 4 * _LOOK_S

log = logging.getLogger(__name__)


class Watched(Protocol):
    def end_if_late(self, now: float) -> bool:
        """Whether it stood still for too long, and was ended for it."""
        ...


class Progress:
    """When a transfer moved last."""

    __slots__ = ("_end", "_limit_s", "_moved_at")

    def __init__(self, end: Callable[[], object], limit_s: float, now: float) -> None:
        self._end = end
        self._limit_s = limit_s
        self._moved_at = now

    def moved(self) -> None:
        self._moved_at = time.monotonic()

    def end_if_late(self, now: float) -> bool:
        if now - self._moved_at <= self._limit_s:
            return False
        self._end()
        return True


class Stalls:
    """Its thread begins with the first that is watched, and sleeps while there is nothing."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(
        self, end: Callable[[], object], limit_s: float | None = None
    ) -> Iterator[Progress]:
        """``end`` is called once when what the block waits for has not moved for ``limit_s``; None:
        `STILL_S`."""
        progress = Progress(end, STILL_S if limit_s is None else limit_s, time.monotonic())
        self.watch(progress)
        try:
            yield progress
        finally:
            self.forget(progress)

    def watch(self, watched: Watched) -> None:
        with self._changed:
            self._watched.add(watched)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)
                self._thread.start()
            self._changed.notify()

    def forget(self, watched: Watched) -> None:
        with self._changed:
            self._watched.discard(watched)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        looked_at = patient_until = time.monotonic()
        while True:
            with self._changed:
                if not self._watched and not self._closed:
                    self._changed.wait_for(lambda: self._watched or self._closed)
                    looked_at = time.monotonic()
                if self._closed:
                    return
                watched = list(self._watched)
            now = time.monotonic()
            if now - looked_at > _FROZEN_S:
                # This process stood still itself: what has come meanwhile is still to be heard.
                patient_until = now + STILL_S
            looked_at = now
            for each in watched if now >= patient_until else ():
                try:
                    if each.end_if_late(now):
                        self.forget(each)
                except Exception:
                    # Whatever it is, the others are looked at.
                    log.exception("what stands still could not be ended")
                    self.forget(each)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _LOOK_S)
