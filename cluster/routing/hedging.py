"""Decide when a send is late and may be hedged, within budgets for hedges and retries.

A send that is older than nearly all answers of its size took is repeated on another replica (Dean
and Barroso, "The Tail at Scale", 2013). Budgets limit hedges and retries to a fraction of all
sends, so that a pool that is slow because it is overloaded does not get even more to do.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass, field

from .events import Send
from .host_health import HostHealth
from .host_registry import HostRegistry
from .layer_call import InFlightSend, LayerCall
from .policy import RouterPolicy
from .row_grouping import SendRows

# Answers of one size that are remembered, and the least number for an estimate.
_KEPT, _LEAST = 128, 16
# A send is taken for lost at this multiple of the age at which it is late.
_LOST = 4


@dataclass(slots=True)
class _Seen:
    took_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    unread: int = 0
    late_after_s: float = float("inf")


class Latencies:
    """Answer times by model and size of the send, and from them when a send is late."""

    def __init__(self, quantile: float, least_s: float) -> None:
        """Set the ``quantile`` of answer times, and ``least_s``, after which a send is late."""
        self._quantile = quantile
        self._least_s = least_s
        # By model, then by size. A size is the bit length of the number of assignments, so that a
        # class has answers of numbers within a factor of two.
        self._seen: dict[str, dict[int, _Seen]] = {}

    def learn(self, model: str, assignments: int, took_s: float) -> None:
        size = assignments.bit_length()
        sizes = self._seen.get(model)
        if sizes is None:
            sizes = self._seen[model] = {}
        seen = sizes.get(size)
        if seen is None:
            seen = sizes[size] = _Seen()
        seen.took_s.append(took_s)
        seen.unread += 1
        if seen.unread >= _LEAST:
            seen.unread = 0
            seen.late_after_s = max(_quantile(sorted(seen.took_s), self._quantile), self._least_s)

    def late_after_s(self, model: str, assignments: int) -> float:
        """Return the age in seconds at which a send is late; infinity if nothing is known.

        A size without an estimate takes that of the next larger known size, else that of the
        largest smaller one, scaled with the number of assignments.
        """
        size = assignments.bit_length()
        sizes = self._seen.get(model)
        if sizes is None:
            return math.inf
        seen = sizes.get(size)
        if seen is not None and seen.late_after_s < math.inf:
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


def _quantile(ascending: list[float], quantile: float) -> float:
    """Return a quantile by linear interpolation, as numpy does; this is faster for so few."""
    place = (len(ascending) - 1) * quantile
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (ascending[above] - ascending[below]) * (place - below)


class TokenBucket:
    """A token bucket: each send adds ``share`` tokens, each second ``per_s``."""

    def __init__(self, *, share: float, per_s: float, most: float) -> None:
        """Start with a full bucket of ``most`` tokens, which it never exceeds."""
        self._share = share
        self._per_s = per_s
        self._most = self._left = most
        self._at: float | None = None

    def earn(self, sends: int) -> None:
        self._left = min(self._most, self._left + sends * self._share)

    def spend(self, sends: int, now: float) -> bool:
        """Take ``sends`` tokens if there are as many; return whether there were."""
        self._advance(now)
        if self._left < sends:
            return False
        self._left -= sends
        return True

    def owe(self, sends: int, now: float) -> float:
        """Take ``sends`` tokens, into debt if need be; return the seconds until it is repaid.

        Infinity if time adds no tokens, so that only sends repay the debt.
        """
        self._advance(now)
        self._left -= sends
        if self._left >= 0:
            return 0.0
        return -self._left / self._per_s if self._per_s else math.inf

    def _advance(self, now: float) -> None:
        if self._at is not None:
            self._left = min(self._most, self._left + (now - self._at) * self._per_s)
        self._at = now


class Hedging:
    """Whether a late send may be repeated on other replicas.

    The budget of hedges pays, or that of retries once the send is so late that it may be lost.
    """

    def __init__(self, latencies: Latencies, budget: TokenBucket, retrying: TokenBucket) -> None:
        self.latencies = latencies
        self._budget = budget
        self._retrying = retrying

    @classmethod
    def of(cls, policy: RouterPolicy) -> Hedging:
        return cls(
            Latencies(policy.hedge_quantile, policy.hedge_min_s),
            TokenBucket(share=policy.hedge_share, per_s=0.0, most=policy.hedge_burst),
            TokenBucket(
                share=policy.retry_share, per_s=policy.retry_per_s, most=policy.retry_burst
            ),
        )

    def earn(self, sends: int) -> None:
        """Add the share of so many ordinary sends to both budgets."""
        self._budget.earn(sends)
        self._retrying.earn(sends)

    def owe(self, retries: int, now: float) -> float:
        """Charge retries to their budget; return the seconds until it allows another one."""
        return self._retrying.owe(retries, now)

    def due(self, call: LayerCall, send: Send, now: float) -> float:
        """Return when a send that begins now is late enough to be repeated."""
        if not call.kind.hedges:
            return math.inf
        return now + self.latencies.late_after_s(call.key.model, send.assignments.size)

    def pieces(
        self, call: LayerCall, flight: InFlightSend, registry: HostRegistry, now: float
    ) -> list[tuple[HostHealth, SendRows]]:
        """Return how to repeat a late send on other replicas, and pay for it.

        Nothing, if not each of its assignments has one with room, or no budget allows it. A hedge
        that is split over several hosts costs as much as one: its work is that of one send.
        """
        assignments = flight.send.assignments
        host_n = registry.choose(call, assignments, now, besides=flight.send.host)
        if (host_n < 0).any():
            return []
        pieces = list(registry.pieces(call, assignments, host_n))
        asked = Counter(health.entry.host for health, _ in pieces)
        if any(registry.hosts[host].room < sends for host, sends in asked.items()):
            return []
        age_s = now - flight.sent_at
        return pieces if self._allow(call.key.model, assignments.size, age_s, now) else []

    def _allow(self, model: str, assignments: int, age_s: float, now: float) -> bool:
        """Pay for one hedge if a budget allows it; return whether the send may be repeated."""
        if self._budget.spend(1, now):
            return True
        lost = age_s >= _LOST * self.latencies.late_after_s(model, assignments)
        return lost and self._retrying.spend(1, now)
