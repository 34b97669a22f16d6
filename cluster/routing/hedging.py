"""When an answer is late, and what asking again may cost.

A call that is later than nearly all calls of its size were is sent to another replica too (Dean and
Barroso, "The Tail at Scale", 2013). Budgets bound what that adds, and what retries add, to a part
of all sends, so that a pool that is slow because it is full does not get more to do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

# Answers of one size that are remembered, and without how many nothing can be said.
_KEPT, _LEAST = 128, 16
# So many times as old as a late call, one is taken for lost.
_LOST = 4


@dataclass(slots=True)
class _Seen:
    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    unread: int = 0
    late_after_s: float = float("inf")


class Latencies:
    """Learns how long answers take, by model and size of the call."""

    def __init__(self, quantile: float, least_s: float) -> None:
        """A call is late after the ``quantile`` of its like, but not before ``least_s``."""
        self._quantile = quantile
        self._least_s = least_s
        # The size is the number of bits of the number of choices.
        self._seen: dict[str, dict[int, _Seen]] = {}

    def learn(self, model: str, choices: int, took_s: float) -> None:
        seen = self._seen.setdefault(model, {}).setdefault(choices.bit_length(), _Seen())
        seen.took_s.append(took_s)
        seen.unread += 1
        if seen.unread >= _LEAST:
            seen.unread = 0
            late_s = float(np.quantile(np.array(seen.took_s), self._quantile))
            seen.late_after_s = max(late_s, self._least_s)

    def late_after_s(self, model: str, choices: int) -> float:
        """Seconds; infinity before anything is known. A size that was not seen takes no longer
        than a larger one, and no longer than a smaller one times the difference in size."""
        sizes = self._seen.get(model, {})
        size = choices.bit_length()
        seen = sizes.get(size)
        if seen is not None and seen.late_after_s < float("inf"):
            return seen.late_after_s
        known = {
            other: seen.late_after_s
            for other, seen in sizes.items()
            if seen.late_after_s < float("inf")
        }
        if not known:
            return float("inf")
        larger = min((other for other in known if other > size), default=None)
        if larger is not None:
            return known[larger]
        smaller = max(known)
        return known[smaller] * 2 ** (size - smaller)


class Budget:
    """Something that may be done for a part of all sends, and ``per_s`` times a second besides."""

    def __init__(self, *, share: float, per_s: float, most: float) -> None:
        """``most`` is what can be saved up; it is there at the start."""
        self._share = share
        self._per_s = per_s
        self._most = self._left = most
        self._at: float | None = None

    def earn(self, sends: int) -> None:
        self._left = min(self._most, self._left + sends * self._share)

    def spend(self, sends: int, now: float) -> bool:
        """Whether it is allowed now; then it is taken off."""
        self._advance(now)
        if self._left < sends:
            return False
        self._left -= sends
        return True

    def owe(self, sends: int, now: float) -> float:
        """Take it off in any case; gives how many seconds to hold it back, 0 if it was there."""
        self._advance(now)
        self._left -= sends
        return max(0.0, -self._left / self._per_s)

    def _advance(self, now: float) -> None:
        if self._at is not None:
            self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now


class Hedging:
    """Whether a late call may go to other replicas too: by the budget of hedges, or, when it is
    too late to be only slow, by that of retries."""

    def __init__(self, latencies: Latencies, budget: Budget, retrying: Budget) -> None:
        self.latencies = latencies
        self._budget = budget
        self._retrying = retrying

    def earn(self) -> None:
        """A call was sent for the first time."""
        self._budget.earn(1)
        self._retrying.earn(1)

    def may(self, model: str, choices: int, age_s: float, now: float) -> bool:
        """Paid for once, on however many hosts the replicas stand: the work is that of one call."""
        if self._budget.spend(1, now):
            return True
        lost = age_s >= _LOST * self.latencies.late_after_s(model, choices)
        return lost and self._retrying.spend(1, now)
