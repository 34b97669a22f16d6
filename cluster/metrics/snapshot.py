"""What the controller tells at a scrape: its reports, and sums that no report has.

Routers are told of as sums alone, so hundreds of them make no more series than one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..control.watchdog import PlanCounts
from ..load.meter import HostPath
from ..load.router_counts import RouterCounts
from ..reports.activity import Activity
from ..reports.status import ClusterStatus


@dataclass(slots=True)
class LoadCounts:
    """Experts of one model that hosts were told to load, since the controller's start."""

    loaded: int = 0
    loaded_bytes: int = 0
    failed: int = 0

    def count(self, size_bytes: int, *, failed: bool) -> None:
        """Count one expert of so many bytes."""
        if failed:
            self.failed += 1
        else:
            self.loaded += 1
            self.loaded_bytes += size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PathCounts:
    """The ways from routers to hosts."""

    connections: Mapping[str, int]  # by transport
    lending: Mapping[str, int]  # by host: routers that compute with its memory

    @classmethod
    def of(cls, paths: Iterable[HostPath]) -> PathCounts:
        connections: Counter[str] = Counter()
        lending: Counter[str] = Counter()
        for path in paths:
            if path.transport is not None:
                connections[path.transport] += 1
            lending[path.host] += path.lent
        return cls(connections=dict(connections), lending=dict(lending))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """What `ModelStatus` and `ModelActivity` lack."""

    assignments: int  # since the controller's start
    version: int  # of its experts' weights
    wanted_replicas: int  # that each expert should have at least
    unprotected_experts: int
    loads: LoadCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSnapshot:
    """The pool at one moment; counts are since the controller's start."""

    status: ClusterStatus  # without its routers
    activity: Activity  # with as many of the hottest experts as have series
    routers: RouterCounts
    router_count: int
    paths: PathCounts
    host_queued_s: Mapping[str, float]  # sum of the times that calls waited in a host's queue
    models: Mapping[str, ModelFigures]
    plans: PlanCounts
    last_change: int  # the number of the last change of the placement; 0: there was none
