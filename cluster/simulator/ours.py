"""The real controller and planner, over simulated hosts that load as fast as they may.

Shapes: E experts of a layer, H hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..control import Control, ControlPolicy
from ..load import HostTimes, LoadReport
from ..loading import Load
from ..observed import Observation
from ..orders import Evict, MakePlan, Publish
from ..placement import ExpertKey, HostEntry, LayerKey, Placement, experts_of
from .ways import Counts, Pool, Served

_ROUTER = "trunk"


@dataclass(slots=True)
class _Host:
    """What a host holds, and the load that it has begun."""

    name: str
    held: set[ExpertKey]
    loading: tuple[ExpertKey, ...] = ()
    done_at: float = 0.0
    seen: Observation | None = field(default=None)  # until something changes

    def observe(self) -> Observation:
        if self.seen is None:
            holdings: dict[LayerKey, set[int]] = {}
            for key in self.held:
                holdings.setdefault(LayerKey(key.model, key.layer), set()).add(key.expert)
            entry = HostEntry(
                host=self.name, incarnation=1, node="n", shm_address="", grpc_address=self.name
            )
            self.seen = Observation(entry=entry, holdings=holdings, loading=bool(self.loading))
        return self.seen


class Ours:
    """Ticks through each window; what a tick decides takes the time that its bytes take."""

    name = "ours"

    def __init__(self, pool: Pool, policy: ControlPolicy, *, ticks: int) -> None:
        """``ticks`` of the controller in a window."""
        self._pool = pool
        self._ticks = ticks
        self._now = 0.0
        begin = pool.even()
        self._hosts = {
            host.name: _Host(host.name, set(experts_of(begin, host.name))) for host in pool.hosts
        }
        self._control = Control(pool.hosts, term=1, policy=policy)
        for shape in pool.shapes:
            self._control.add_model(shape, on_disk=True)
        self._share_EH = {key: pool.shares_of(layer) for key, layer in begin.items()}
        self._moved: list[int] = []

    def serve(self, counts: Counts, window_s: float) -> Served:
        self._moved = []
        load_H = {key: np.zeros(len(self._pool.hosts)) for key in counts}
        for tick in range(self._ticks):
            # Whole choices that add up to the window's.
            part = {
                key: count_E * (tick + 1) // self._ticks - count_E * tick // self._ticks
                for key, count_E in counts.items()
            }
            for key, count_E in part.items():
                load_H[key] += count_E @ self._share_EH[key]
            self._now += window_s / self._ticks
            self._tick(part)
        return Served(load_H, len(self._moved), sum(self._moved))

    def _tick(self, counts: Mapping[LayerKey, np.ndarray]) -> None:
        control, now = self._control, self._now
        for host in self._hosts.values():
            if host.loading and now >= host.done_at:
                host.held |= set(host.loading)
                self._moved += [self._bytes(key) for key in host.loading]
                host.loading, host.seen = (), None
        self._report(counts)
        reports = {name: host.observe() for name, host in self._hosts.items()}
        for command in control.tick(reports, now):
            match command:
                case MakePlan():
                    control.planned(command, command.run(), now)
                case Load(host=name, keys=keys):
                    host = self._hosts[name]
                    host.loading, host.seen = keys, None
                    size = sum(self._bytes(key) for key in keys)
                    host.done_at = now + size / self._pool.load_bytes_per_s
                case Evict(host=name, keys=keys):
                    self._hosts[name].held -= set(keys)
                    self._hosts[name].seen = None
                case Publish(placement=placement):
                    self._follow(placement)

    def _follow(self, placement: Placement) -> None:
        self._share_EH = {
            key: self._pool.shares_of(layer) for key, layer in placement.layers.items()
        }

    def _report(self, counts: Mapping[LayerKey, np.ndarray]) -> None:
        """What routers would count and hear from hosts since the last tick."""
        load_H = sum((c @ self._share_EH[key] for key, c in counts.items()), np.zeros(()))
        times = {
            host.name: HostTimes(calls=1, choices=int(load), busy_s=float(load / speed))
            for host, load, speed in zip(
                self._pool.hosts, np.atleast_1d(load_H), self._pool.speeds, strict=True
            )
        }
        placement = self._control.placement
        number = None if placement is None else placement.number
        report = LoadReport(router=_ROUTER, number=number, counts=counts, hosts=times)
        self._control.hear(report, self._now)

    def _bytes(self, key: ExpertKey) -> int:
        return self._pool.expert_bytes(LayerKey(key.model, key.layer))
