"""When the balancer looks at the load."""

from __future__ import annotations

# Behind a shift of the traffic: of this the rates are to know.
_LOOK_S = 1.0
# How many times `every_s` the balancer keeps still behind a rollback or a move that failed.
_REST = 10


class Rhythm:
    """Every so often, soon behind a shift of the traffic, and not for long behind a failure."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._looked_at: float | None = None
        self._rests_until = 0.0

    def rest(self, now: float) -> None:
        self._rests_until = now + _REST * self._every_s

    def looked(self, now: float) -> None:
        self._looked_at = now

    def is_due(self, now: float, shifted_at: float | None) -> bool:
        """``shifted_at``: when the traffic last became another."""
        if now < self._rests_until:
            return False
        if self._looked_at is None or now >= self._looked_at + self._every_s:
            return True
        return shifted_at is not None and self._looked_at < shifted_at + _LOOK_S <= now
