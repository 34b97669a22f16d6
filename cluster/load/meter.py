"""A router's counters of its load, which it reports to the controller.

A router counts each assignment once, when its layer's call begins; padding and retries do not
count. From the hosts' answers it sums up how long calls were queued and computed.

Shape suffixes: E = experts of a layer, N = assignments.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..expert_keys import LayerKey
from ..placement import PlacementId
from .router_counts import RouterCounts


@dataclass(slots=True)
class HostTimes:
    """Sums of what the answers of one host report."""

    calls: int = 0
    assignments: int = 0  # assignments
    queued_s: float = 0.0
    busy_s: float = 0.0  # each call's part of the time of its batch
    batch_s: float = 0.0  # the whole time of each call's batch, added once for each call
    lent_s: float = 0.0  # in which trunks have computed calls of training with its memory

    def add(self, other: HostTimes) -> None:
        self.calls += other.calls
        self.assignments += other.assignments
        self.queued_s += other.queued_s
        self.busy_s += other.busy_s
        self.batch_s += other.batch_s
        self.lent_s += other.lent_s

    def since(self, before: HostTimes | None) -> HostTimes:
        """Return the difference to an earlier reading; None stands for zeros."""
        was = before or HostTimes()
        return HostTimes(
            calls=self.calls - was.calls,
            assignments=self.assignments - was.assignments,
            queued_s=self.queued_s - was.queued_s,
            busy_s=self.busy_s - was.busy_s,
            batch_s=self.batch_s - was.batch_s,
            lent_s=self.lent_s - was.lent_s,
        )

    def part(self, n: int, parts: int) -> HostTimes:
        """Return the ``n``-th of ``parts`` even parts; integers are split so that they add up."""
        return HostTimes(
            calls=self.calls * (n + 1) // parts - self.calls * n // parts,
            assignments=self.assignments * (n + 1) // parts - self.assignments * n // parts,
            queued_s=self.queued_s / parts,
            busy_s=self.busy_s / parts,
            batch_s=self.batch_s / parts,
            lent_s=self.lent_s / parts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPath:
    """The way from one router to one host."""

    host: str
    transport: str | None  # of calls that are sent; None: it is not connected
    lent: bool  # the router computes with this host's memory
    why_sent: str | None = None  # None: it is lent


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One router's counts since its last report, and the number of its placement."""

    router: str
    placement_id: PlacementId | None
    # The number of the newest placement that it received: it follows that one when the forward
    # pass that is running ends.
    received: PlacementId | None = None
    counts: Mapping[LayerKey, np.ndarray] = field(default_factory=dict)  # (E,) int64 each
    hosts: Mapping[str, HostTimes] = field(default_factory=dict)
    unplaced: tuple[LayerKey, ...] = ()  # layers that were called and are not in the placement
    paths: tuple[HostPath, ...] = ()  # how it reaches each host
    router_counts: RouterCounts = field(default_factory=RouterCounts)


class LoadMeter:
    """A router's counters; used under the router's lock."""

    def __init__(self) -> None:
        self._counts: dict[LayerKey, np.ndarray] = {}
        self._hosts: dict[str, HostTimes] = {}

    def count(self, key: LayerKey, ids_N: np.ndarray, experts: int) -> None:
        """Count assignments; ids outside [0, experts) are padding."""
        self.count_used(key, ids_N[(ids_N >= 0) & (ids_N < experts)], experts)

    def count_used(self, key: LayerKey, ids_n: np.ndarray, experts: int) -> None:
        """Count assignments, all of whose ids are in [0, experts)."""
        found = np.bincount(ids_n, minlength=experts)
        counts = self._counts.get(key)
        if counts is None:
            self._counts[key] = found
        else:
            counts += found

    def answered(
        self, host: str, assignments: int, queued_us: int, busy_us: int, batch_us: int
    ) -> None:
        times = self._of(host)
        times.calls += 1
        times.assignments += assignments
        times.queued_s += queued_us * 1e-6
        times.busy_s += busy_us * 1e-6
        times.batch_s += batch_us * 1e-6

    def lent(self, hosts: Collection[str], seconds: float) -> None:
        """Count a training call that the router computed with the memory of ``hosts``.

        Each gets an even part of the time: what it would have to compute otherwise.
        """
        for host in hosts:
            self._of(host).lent_s += seconds / len(hosts)

    def _of(self, host: str) -> HostTimes:
        times = self._hosts.get(host)
        if times is None:
            times = self._hosts[host] = HostTimes()
        return times

    def take(
        self,
        router: str,
        number: PlacementId | None,
        received: PlacementId | None,
        unplaced: tuple[LayerKey, ...] = (),
        paths: tuple[HostPath, ...] = (),
        router_counts: RouterCounts | None = None,
    ) -> LoadReport:
        """Return everything since the last report, and start from zero."""
        report = LoadReport(
            router=router,
            placement_id=number,
            received=received,
            counts=self._counts,
            hosts=self._hosts,
            unplaced=unplaced,
            paths=paths,
            router_counts=router_counts or RouterCounts(),
        )
        self._counts, self._hosts = {}, {}
        return report
