"""Placement strategies to compare on the same loads: a static placement, and DeepSeek's EPLB.

`elastic_placement.py` has ours.

Shapes: E experts of a layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..expert_keys import LayerKey
from ..placement import LayerPlacement, ModelShape, initial_placement
from ..planner.plan import PoolHost
from .eplb import changed_slots, eplb
from .queues import Queues

Counts = Mapping[LayerKey, np.ndarray]  # (E,) assignments of one window, by layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The hosts and models that all strategies have."""

    hosts: tuple[PoolHost, ...]
    shapes: tuple[ModelShape, ...]
    slots: int  # slots for each layer on each host
    assignments_per_s: float  # assignments per second that a host of speed 1 computes
    loading_bytes_per_s: float  # how fast one host loads experts

    def __post_init__(self) -> None:
        most = max(experts for shape in self.shapes for experts in shape.experts.values())
        if self.slots * len(self.hosts) < most:
            raise ValueError(
                f"slots: {len(self.hosts)} hosts with {self.slots} for a layer are too few for its "
                f"{most} experts"
            )

    @property
    def speeds(self) -> np.ndarray:
        """Assignments per second that each host computes, (H,)."""
        return np.array([host.speed for host in self.hosts]) * self.assignments_per_s

    def expert_bytes(self, key: LayerKey) -> int:
        return next(shape.expert_bytes for shape in self.shapes if shape.model == key.model)

    def even(self) -> dict[LayerKey, LayerPlacement]:
        """Return the initial placement: as many replicas of every expert as fit, round robin."""
        layers: dict[LayerKey, LayerPlacement] = {}
        for shape in self.shapes:
            for layer, experts in shape.experts.items():
                copies = min(self.slots * len(self.hosts) // experts, len(self.hosts))
                one = ModelShape(model=shape.model, experts={layer: experts}, replicas=copies)
                layers |= initial_placement([one], [host.name for host in self.hosts])
        return layers

    def shares_of(self, layer: LayerPlacement) -> np.ndarray:
        return shares_of(layer, [host.name for host in self.hosts])


def shares_of(layer: LayerPlacement, hosts: Sequence[str]) -> np.ndarray:
    """Return the fraction of each expert's load that goes to each host, (E, H)."""
    index = {host: h for h, host in enumerate(hosts)}
    share_EH = np.zeros((len(layer.replicas), len(hosts)))
    for expert, replicas in enumerate(layer.replicas):
        for replica in replicas:
            share_EH[expert, index[replica.host]] += replica.share
    return share_EH


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowResult:
    """The result of one window; H are the hosts that were up in it."""

    load_H: Mapping[LayerKey, np.ndarray]  # assignments that came to each host, by layer
    capacity_H: np.ndarray  # assignments that each host could have computed while it was up
    delay_s: float  # the longest delay of a host's queue
    host_s: float  # host-seconds of all hosts, each from the request for it to its end
    moved_slots: int = 0
    moved_bytes: int = 0
    scalings: int = 0  # changes of the number of hosts


class PlacementStrategy(Protocol):
    """A placement strategy."""

    name: str

    def serve(self, counts: Counts, window_s: float) -> WindowResult:
        """Serve one window with the current placement, and learn from it."""
        ...


class _Fixed:
    """A strategy whose hosts never change."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._names = [host.name for host in pool.hosts]
        self._queues = Queues()

    def _served(
        self,
        load_H: Mapping[LayerKey, np.ndarray],
        window_s: float,
        moved_slots: int = 0,
        moved_bytes: int = 0,
    ) -> WindowResult:
        arrived_H = np.sum(list(load_H.values()), axis=0)
        speeds_H = self._pool.speeds
        delay_s, _ = self._queues.advance(self._names, arrived_H, speeds_H, window_s)
        return WindowResult(
            load_H=load_H,
            capacity_H=speeds_H * window_s,
            delay_s=delay_s,
            host_s=len(self._names) * window_s,
            moved_slots=moved_slots,
            moved_bytes=moved_bytes,
        )


class Static(_Fixed):
    """The initial, even placement; nothing ever moves."""

    name = "static"

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._share_EH = {key: pool.shares_of(layer) for key, layer in pool.even().items()}

    def serve(self, counts: Counts, window_s: float) -> WindowResult:
        load_H = {key: count_E @ self._share_EH[key] for key, count_E in counts.items()}
        return self._served(load_H, window_s)


class Eplb(_Fixed):
    """EPLB every so many windows, on the loads since the last time.

    The new placement serves once the last host has loaded its part; the old one serves until then.
    """

    def __init__(self, pool: Pool, *, every: int) -> None:
        super().__init__(pool)
        self.name = f"EPLB every {every}"
        self._every = every
        self._copies_EH = {
            key: (pool.shares_of(layer) > 0).astype(np.int64) for key, layer in pool.even().items()
        }
        self._next_EH: dict[LayerKey, np.ndarray] = {}
        self._left_s = 0.0
        self._seen: dict[LayerKey, np.ndarray] = {}
        self._windows = 0

    def serve(self, counts: Counts, window_s: float) -> WindowResult:
        # The fraction of this window in which the old placement still serves.
        part = min(1.0, self._left_s / window_s) if self._next_EH else 1.0
        load_H = {}
        for key, count_E in counts.items():
            load_H[key] = part * _spread(count_E, self._copies_EH[key])
            if part < 1:
                load_H[key] += (1 - part) * _spread(count_E, self._next_EH[key])
        self._left_s -= window_s
        if self._next_EH and self._left_s <= 0:
            self._copies_EH, self._next_EH = self._next_EH, {}
        for key, count_E in counts.items():
            self._seen[key] = self._seen.get(key, 0) + count_E
        self._windows += 1
        if self._windows % self._every or self._next_EH:
            return self._served(load_H, window_s)
        return self._served(load_H, window_s, *self._rebalance())

    def _rebalance(self) -> tuple[int, int]:
        """Make the next placement; return (slots, bytes) that it moves."""
        pool, moved, moved_bytes = self._pool, 0, 0
        bytes_H = np.zeros(len(pool.hosts))
        for key, before_EH in self._copies_EH.items():
            load_E = np.maximum(self._seen[key].astype(float), 1e-9)
            after_EH = self._next_EH[key] = eplb(load_E, len(pool.hosts), pool.slots)
            changed = changed_slots(before_EH, after_EH)
            moved += changed
            moved_bytes += changed * pool.expert_bytes(key)
            bytes_H += np.maximum(after_EH - before_EH, 0).sum(axis=0) * pool.expert_bytes(key)
        self._left_s = float(bytes_H.max()) / pool.loading_bytes_per_s
        self._seen = {}
        return moved, moved_bytes


def _spread(count_E: np.ndarray, copies_EH: np.ndarray) -> np.ndarray:
    """Return each host's load, (H,), if every expert's is split evenly over its replicas."""
    return (count_E / copies_EH.sum(axis=1)) @ copies_EH
