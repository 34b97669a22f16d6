"""Ends stalled transfers and calls: those whose next bytes do not arrive.

gRPC's threads wait for a peer without a deadline. One thread here watches all transfers of a server
and cancels those that have waited too long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

# A transfer that makes no progress for this long is ended.
STILL_S = 5.0
_LOOK_S = 0.25
_FROZEN_S = 4 * _LOOK_S

log = logging.getLogger(__name__)


class Watched(Protocol):
    def end_if_late(self, now: float) -> bool:
        """End this if it has stalled for too long; return whether it was ended."""
        ...


class TransferProgress:
    """The time at which a transfer last made progress."""

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


class StallWatcher:
    """Watches transfers in a thread that starts with the first one and sleeps without any."""

    def __init__(self) -> None:
        self._watched: set[Watched] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(
        self, end: Callable[[], object], limit_s: float | None = None
    ) -> Iterator[TransferProgress]:
        """Watch the block's transfer; call ``end`` once if it makes no progress for ``limit_s``.

        The default of ``limit_s`` is `STILL_S`.
        """
        progress = TransferProgress(end, STILL_S if limit_s is None else limit_s, time.monotonic())
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
                # This process itself was frozen: give it time to read what arrived meanwhile.
                patient_until = now + STILL_S
            looked_at = now
            for each in watched if now >= patient_until else ():
                try:
                    if each.end_if_late(now):
                        self.forget(each)
                except Exception:
                    # Whatever went wrong, the others must still be checked.
                    log.exception("a stalled transfer could not be ended")
                    self.forget(each)
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _LOOK_S)
