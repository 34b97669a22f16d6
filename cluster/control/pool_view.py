"""What the controller sees: hosts as they reported, and since when the others are away."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..placement import ExpertKey, HostEntry, LayerKey, LayerPlacement, ModelShape, Replica
from ..planner.plan import PoolHost
from .host_speed import Paces, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One host as it reported: one incarnation and the experts it can compute."""

    entry: HostEntry
    holdings: Mapping[LayerKey, Collection[int]]
    loading: bool
    work: Work | None = field(default=None, compare=False)  # None: not told

    def holds(self, key: ExpertKey) -> bool:
        return key.expert in self.holdings.get(LayerKey(key.model, key.layer), ())

    def experts(self) -> Iterator[ExpertKey]:
        for layer, experts in self.holdings.items():
            yield from (layer.expert(expert) for expert in experts)


def without(
    holdings: Mapping[LayerKey, Collection[int]], keys: Collection[ExpertKey]
) -> dict[LayerKey, frozenset[int]]:
    """What a host holds beside ``keys``, which it may be forgetting at this moment."""
    gone = set(keys)
    return {
        layer: frozenset(expert for expert in experts if layer.expert(expert) not in gone)
        for layer, experts in holdings.items()
    }


class View:
    """All hosts of a pool, by their last reports."""

    def __init__(self, hosts: Sequence[PoolHost], *, gone_s: float) -> None:
        """A host that is away for ``gone_s`` seconds is planned around."""
        self.hosts = {host.name: host for host in hosts}
        self.seen: dict[str, Observation] = {}
        self.retiring: set[str] = set()  # hosts that are being taken out of the pool
        self.version = 0  # grows with whatever is seen to have changed
        # Of its speed that each slow or silent host has.
        self.parts: dict[str, float] = {}
        self._paces = Paces()
        self._gone_s = gone_s
        self._away_since: dict[str, float] = {}
        self._arrived: set[str] = set()
        self._heard_at: dict[str, float] = {}
        self._lost: dict[str, Observation] = {}  # hosts that are to leave and do not answer
        self._now = 0.0

    def add(self, host: PoolHost) -> None:
        """A host that is to come; nothing is planned for it before it has reported."""
        self.hosts[host.name] = host
        self._away_since[host.name] = -math.inf

    def remove(self, host: str) -> None:
        del self.hosts[host]
        self.seen.pop(host, None)
        self._away_since.pop(host, None)
        self.retiring.discard(host)
        self._arrived.discard(host)
        self._heard_at.pop(host, None)
        self._lost.pop(host, None)
        self._paces.forget(host)
        self.version += 1

    def note(self, reports: Mapping[str, Observation | None], now: float) -> None:
        """None stands for a host that is gone; one that is missing did not answer in time."""
        self._now = now
        for host, observation in reports.items():
            if host not in self.hosts:
                continue  # it was removed while it answered
            self._heard_at[host] = now
            self._lost.pop(host, None)
            if self.seen.get(host) != observation:
                self.version += 1
            if observation is None:
                self.seen.pop(host, None)
            else:
                self.seen[host] = observation
                self._away_since.pop(host, None)
                self._arrived.add(host)
                if observation.work is not None:
                    incarnation = observation.entry.incarnation
                    self._paces.note(host, incarnation, observation.work, now)
        for host in [h for h in self.retiring & self.seen.keys() if self._is_lost(h)]:
            self._lost[host] = self.seen.pop(host)
            self.version += 1
        for host in self.hosts.keys() - self.seen.keys():
            self._away_since.setdefault(host, now)
        speeds = {host: known.speed for host, known in self.hosts.items() if host in self._arrived}
        silent = {host for host in speeds if reports.get(host) is None}
        self.parts = self._paces.parts(speeds, silent)

    def forget(self, host: str, keys: Collection[ExpertKey]) -> None:
        """What a host was told to forget is not there any more, whenever it reports next."""
        seen = self.seen[host]
        self.seen[host] = replace(seen, holdings=without(seen.holdings, keys))

    def usable(self, now: float) -> frozenset[str]:
        """Hosts that live, or have not been away for long."""
        return frozenset(
            host
            for host in self.hosts
            if host in self.seen or now - self._away_since.get(host, now) < self._gone_s
        )

    def never_seen(self, host: str) -> bool:
        """Whether a host has not reported once."""
        return host not in self._arrived

    def empty(self, host: str) -> bool:
        """Whether a host holds nothing, or nothing that others do not hold if it does not answer,
        and nothing is on its way to it."""
        seen, lost = self.seen.get(host), self._lost.get(host)
        if seen is None:
            return lost is None or all(self.holders(key) for key in lost.experts())
        return not (seen.loading or any(True for _ in seen.experts()))

    def is_known(self, host: str) -> bool:
        """Whether what is known of a host is of the last round."""
        return host not in self.seen or self._heard_at.get(host) == self._now

    def _is_lost(self, host: str) -> bool:
        """Whether a host that is to leave has been silent for long, and nothing needs it."""
        silent = self._now - self._heard_at.get(host, self._now) >= self._gone_s
        return silent and all(len(self.holders(key)) > 1 for key in self.seen[host].experts())

    def entries(self) -> dict[str, HostEntry]:
        """Hosts that routers are to connect to."""
        return {
            host: seen.entry
            for host, seen in self.seen.items()
            if host not in self.retiring or not self.empty(host)
        }

    def holders(self, key: ExpertKey) -> list[str]:
        return [host for host, seen in self.seen.items() if seen.holds(key)]

    def holds(self, host: str, key: ExpertKey) -> bool:
        seen = self.seen.get(host)
        return seen is not None and seen.holds(key)

    def domains(self, key: ExpertKey) -> set[str]:
        """Failure domains in which an expert is alive."""
        return {self.hosts[host].domain or host for host in self.holders(key)}

    def standing(self, models: Sequence[ModelShape]) -> dict[LayerKey, LayerPlacement]:
        """What hosts hold, with even shares."""
        layers = {}
        for shape in models:
            for layer, experts in shape.experts.items():
                key = LayerKey(shape.model, layer)
                holders = [self.holders(key.expert(expert)) for expert in range(experts)]
                layers[key] = LayerPlacement(
                    tuple(tuple(Replica(host, 1 / len(h)) for host in h) for h in holders)
                )
        return layers
