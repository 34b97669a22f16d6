"""Our strategy: the real controller, planner and autoscaler over simulated hosts.

Shapes: E experts of a layer, H hosts that are up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..control.commands import Evict, MakePlan, Publish
from ..control.control import Control, ControlPolicy
from ..control.loading import LoadExperts
from ..control.pool_view import Observation
from ..expert_keys import ExpertKey, ExpertVersion, LayerKey, first_versions
from ..load.meter import HostTimes, LoadReport
from ..placement import HostEntry, LayerPlacement, experts_of
from ..planner.plan import FleetGroup
from ..scaling.autoscaler import ScalePolicy
from ..scaling.fleet import Fleet
from .placement_strategies import Counts, Pool, WindowResult, shares_of
from .queues import Queues

_ROUTER = "trunk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Elastic:
    """How a simulated pool may grow and shrink."""

    min_hosts: int
    max_hosts: int
    start_s: float = 60.0  # from the request for a host to its first report
    cost_per_hour: float = 1.0  # cost of one host
    policy: ScalePolicy = field(default_factory=ScalePolicy)

    def __post_init__(self) -> None:
        if not 1 <= self.min_hosts <= self.max_hosts:
            raise ValueError(
                f"min_hosts, max_hosts: {self.min_hosts}, {self.max_hosts}; "
                "1 <= min_hosts <= max_hosts"
            )


@dataclass(slots=True)
class _Host:
    """A simulated host: the experts that it holds, and those that it is loading."""

    name: str
    up_at: float
    held: set[ExpertVersion] = field(default_factory=set)
    loading: tuple[ExpertVersion, ...] = ()
    done_at: float = 0.0
    seen: Observation | None = None  # its report, kept until something changes

    def observe(self) -> Observation:
        if self.seen is None:
            holdings: dict[LayerKey, dict[int, tuple[int, ...]]] = {}
            for key, version in self.held:
                layer = holdings.setdefault(LayerKey(key.model, key.layer), {})
                layer[key.expert] = (version,)
            entry = HostEntry(
                host=self.name, incarnation=1, node="n", shm_address="", grpc_address=self.name
            )
            self.seen = Observation(entry=entry, holdings=holdings, loading=bool(self.loading))
        return self.seen


class MoesaicStrategy:
    """Runs the controller in ticks through each window.

    A load takes the time that its bytes take, and a new host the time that hosts take to start.
    """

    def __init__(
        self, pool: Pool, policy: ControlPolicy, *, ticks: int, elastic: Elastic | None = None
    ) -> None:
        """Run the controller ``ticks`` times in a window, with the hosts that ``elastic`` allows.

        Without ``elastic`` the number of hosts is fixed. Raises ValueError if it allows no pool
        that holds all experts.
        """
        self.name = "ours" if elastic is None else "ours, autoscaled"
        count = len(pool.hosts)
        bounds = elastic or Elastic(min_hosts=count, max_hosts=count)
        group = FleetGroup(
            count=min(max(count, bounds.min_hosts), bounds.max_hosts),
            min_count=bounds.min_hosts,
            max_count=bounds.max_hosts,
            cost_per_hour=bounds.cost_per_hour,
            slots=pool.hosts[0].slots,
            speed=pool.hosts[0].speed,
        )
        self._fleet = Fleet([group], bounds.policy, pending_s=10 * bounds.start_s + 60.0)
        self._pool = replace(pool, hosts=tuple(self._fleet.pool_hosts()))
        self._start_s = bounds.start_s
        self._ticks = ticks
        self._now = 0.0
        self._layers: Mapping[LayerKey, LayerPlacement] = self._pool.even()
        self._hosts = {
            host.name: _Host(
                host.name, 0.0, set(first_versions(experts_of(self._layers, host.name)))
            )
            for host in self._pool.hosts
        }
        self._up: list[str] = []
        self._share_EH: dict[LayerKey, np.ndarray] = {}
        self._index()
        self._queues = Queues()
        self._control = Control(self._pool.hosts, term=1, policy=policy)
        for shape in pool.shapes:
            self._control.add_model(shape, on_disk=True)
        self._moved: list[int] = []

    def serve(self, counts: Counts, window_s: float) -> WindowResult:
        self._moved = []
        load: dict[LayerKey, Counter[str]] = {key: Counter() for key in counts}
        up_s: Counter[str] = Counter()
        delay_s = host_s = 0.0
        scalings = self._scalings()
        tick_s = window_s / self._ticks
        for tick in range(self._ticks):
            # Each tick's part, in whole assignments that add up to the window's.
            part = {
                key: count_E * (tick + 1) // self._ticks - count_E * tick // self._ticks
                for key, count_E in counts.items()
            }
            arrived_H = np.zeros(len(self._up))
            for key, count_E in part.items():
                load_H = count_E @ self._share_EH[key]
                load[key].update(dict(zip(self._up, load_H.tolist(), strict=True)))
                arrived_H += load_H
            up_s.update(dict.fromkeys(self._up, tick_s))
            host_s += tick_s * len(self._hosts)
            waits_s, computed_H = self._queues.advance(
                self._up, arrived_H, np.full(len(self._up), self._speed), tick_s
            )
            delay_s = max(delay_s, waits_s)
            self._now += tick_s
            self._tick(part, computed_H)
        return WindowResult(
            load_H={key: np.array([found[h] for h in up_s]) for key, found in load.items()},
            capacity_H=np.array([seconds * self._speed for seconds in up_s.values()]),
            delay_s=delay_s,
            host_s=host_s,
            moved_slots=len(self._moved),
            moved_bytes=sum(self._moved),
            scalings=self._scalings() - scalings,
        )

    @property
    def _speed(self) -> float:
        return float(self._pool.speeds[0])

    def _tick(self, counts: Mapping[LayerKey, np.ndarray], computed_H: np.ndarray) -> None:
        control, now = self._control, self._now
        self._report(counts, computed_H)
        for host in self._hosts.values():
            if host.loading and now >= host.done_at:
                host.held |= set(host.loading)
                self._moved += [self._bytes(key) for key, _ in host.loading]
                host.loading, host.seen = (), None
        reports = {name: h.observe() for name, h in self._hosts.items() if now >= h.up_at}
        for command in control.tick(reports, now):
            match command:
                case MakePlan():
                    control.planned(command, command.run(), now)
                case LoadExperts(host=name, weights=weights):
                    host = self._hosts[name]
                    host.loading, host.seen = weights, None
                    size = sum(self._bytes(key) for key, _ in weights)
                    host.done_at = now + size / self._pool.loading_bytes_per_s
                case Evict(host=name, weights=weights):
                    self._hosts[name].held -= set(weights)
                    self._hosts[name].seen = None
                case Publish(placement=placement):
                    self._layers = placement.layers
        self._fleet.tick(control, now)
        self._follow()
        self._index()

    def _follow(self) -> None:
        """Start and end hosts as the fleet wants, like the owner of a cluster."""
        desired = self._fleet.desired()
        self._hosts = {name: host for name, host in self._hosts.items() if name in desired}
        for name in desired.keys() - self._hosts.keys():
            self._hosts[name] = _Host(name, self._now + self._start_s)

    def _index(self) -> None:
        """Update the hosts that are up, and the fraction of each expert's load that each gets."""
        self._up = [name for name, host in self._hosts.items() if self._now >= host.up_at]
        self._share_EH = {key: shares_of(layer, self._up) for key, layer in self._layers.items()}

    def _report(self, counts: Mapping[LayerKey, np.ndarray], computed_H: np.ndarray) -> None:
        """Report to the controller what routers would have counted since the last tick."""
        times = {
            host: HostTimes(calls=1, assignments=int(computed), busy_s=computed / self._speed)
            for host, computed in zip(self._up, computed_H.tolist(), strict=True)
        }
        placement = self._control.placement
        number = None if placement is None else placement.id
        report = LoadReport(
            router=_ROUTER, placement_id=number, received=number, counts=counts, hosts=times
        )
        self._control.hear(report, self._now)

    def _scalings(self) -> int:
        """Return how many changes of the pool's size there were so far."""
        past = self._fleet.scalings.all
        return past[-1].id if past else 0

    def _bytes(self, key: ExpertKey) -> int:
        return self._pool.expert_bytes(LayerKey(key.model, key.layer))
