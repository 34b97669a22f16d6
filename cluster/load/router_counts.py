"""What routers count of their calls, besides the load: retries, hedges, transports, latencies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

# Upper bounds of the buckets of `TransportCounts.buckets`; what takes longer is in one more.
LATENCY_BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True)
class TransportCounts:
    """Sends to hosts over one transport: a layer's call is one send to each of its hosts."""

    sends: int = 0
    failures: int = 0  # sends that were refused, or whose connection was lost
    sent_bytes: int = 0  # of tensors
    received_bytes: int = 0
    answer_s: float = 0.0  # sum of the times from sends to their answers
    # How many answers took so long, by `LATENCY_BOUNDS_S`.
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))

    def add(self, other: TransportCounts) -> None:
        self.sends += other.sends
        self.failures += other.failures
        self.sent_bytes += other.sent_bytes
        self.received_bytes += other.received_bytes
        self.answer_s += other.answer_s
        self.buckets = [mine + new for mine, new in zip(self.buckets, other.buckets, strict=True)]


@dataclass(slots=True, kw_only=True)
class RouterCounts:
    """Counts of one router, or of all of them together."""

    calls: int = 0  # of layers
    rows: int = 0
    lent_assignments: int = 0  # that the router computed itself, with memory that hosts lent
    retries: int = 0  # sends whose assignments had to be sent again
    ejections: int = 0
    hedges: int = 0  # sends that repeated a late one
    hedge_wins: int = 0  # hedges that were answered before the send that they repeated
    lost_rows: int = 0  # rows that no host computed in time
    transports: Mapping[str, TransportCounts] = field(default_factory=dict)

    def since(self, before: RouterCounts) -> RouterCounts:
        """Return the difference to an earlier reading; ``transports`` stay as they are."""
        grown = {name: getattr(self, name) - getattr(before, name) for name in _SUMS}
        return replace(self, **grown)

    def add(self, other: RouterCounts) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        transports = dict(self.transports)
        for transport, counts in other.transports.items():
            transports.setdefault(transport, TransportCounts()).add(counts)
        self.transports = transports


_SUMS = tuple(one.name for one in fields(RouterCounts) if one.name != "transports")


class TransportMeter:
    """Counts one router's sends until the next report; used under the router's lock."""

    def __init__(self) -> None:
        self._counts: dict[str, TransportCounts] = {}
        # Sends that somebody waits for: host -> number -> (transport, when it was sent).
        self._under_way: dict[str, dict[int, tuple[str, float]]] = {}

    def sent(self, host: str, seq: int, transport: str, size_bytes: int, now: float) -> None:
        counts = self._of(transport)
        counts.sends += 1
        counts.sent_bytes += size_bytes
        self._under_way.setdefault(host, {})[seq] = transport, now

    def answered(self, host: str, seq: int, size_bytes: int, now: float) -> None:
        if (found := self._end(host, seq)) is not None:
            transport, sent_at = found
            counts = self._of(transport)
            counts.received_bytes += size_bytes
            counts.answer_s += now - sent_at
            counts.buckets[bisect_left(LATENCY_BOUNDS_S, now - sent_at)] += 1

    def refused(self, host: str, seq: int) -> None:
        if (found := self._end(host, seq)) is not None:
            self._of(found[0]).failures += 1

    def cancelled(self, host: str, seq: int) -> None:
        """Forget a send that nobody waits for any more."""
        self._end(host, seq)

    def lost(self, host: str) -> None:
        """Count what was under way to a host when its connection ended."""
        for transport, _ in self._under_way.pop(host, {}).values():
            self._of(transport).failures += 1

    def take(self) -> dict[str, TransportCounts]:
        """Return the counts by transport since the last time, and start from zero."""
        found, self._counts = self._counts, {}
        return found

    def _of(self, transport: str) -> TransportCounts:
        return self._counts.setdefault(transport, TransportCounts())

    def _end(self, host: str, seq: int) -> tuple[str, float] | None:
        return self._under_way.get(host, {}).pop(seq, None)
