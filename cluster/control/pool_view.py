"""The controller's view of the pool: hosts as they reported, and since when others are away."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..expert_keys import ExpertKey, ExpertVersion, LayerKey
from ..load.training_times import TrainingTimes
from ..placement import HostEntry, LayerPlacement, ModelShape, Replica
from ..planner.plan import PoolHost
from ..versions import VERSIONS_AT_ONCE, WeightVersions
from .host_speed import HostSpeeds, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A host's report: its incarnation, and the experts that it can compute."""

    entry: HostEntry
    holdings: Mapping[LayerKey, Mapping[int, Collection[int]]]  # experts, with their versions
    loading: bool
    work: Work | None = field(default=None, compare=False)  # None: not reported
    device_bytes: int | None = None  # what its device has for experts; None: unknown
    run: int = 0  # the training run that it knows; 0: none
    owned: int = 0  # keys that it owns for that run
    # What is free of its machine's memory, or of its GPU's that it may take; None: unknown.
    free_bytes: int | None = field(default=None, compare=False)

    @property
    def bare(self) -> bool:
        """Whether it holds and loads no expert."""
        return not (self.loading or any(True for _ in self.experts()))

    def holds(self, weights: ExpertVersion) -> bool:
        model, layer, expert = weights.key
        return weights.version in self.holdings.get(LayerKey(model, layer), {}).get(expert, ())

    def has_room(self, key: ExpertKey) -> bool:
        """Return whether the host has room for one more version of an expert."""
        held = self.holdings.get(LayerKey(key.model, key.layer), {})
        return len(held.get(key.expert, ())) < VERSIONS_AT_ONCE

    def experts(self) -> Iterator[ExpertKey]:
        for layer, experts in self.holdings.items():
            yield from (layer.expert(expert) for expert in experts)

    def weights(self) -> Iterator[ExpertVersion]:
        for layer, experts in self.holdings.items():
            for expert, versions in experts.items():
                yield from (ExpertVersion(layer.expert(expert), version) for version in versions)


def without(
    holdings: Mapping[LayerKey, Mapping[int, Collection[int]]], gone: Collection[ExpertVersion]
) -> dict[LayerKey, dict[int, tuple[int, ...]]]:
    """Return the holdings of a host without ``gone``, which it may be dropping right now."""
    left: dict[LayerKey, dict[int, tuple[int, ...]]] = {}
    for layer, experts in holdings.items():
        left[layer] = {}
        for expert, versions in experts.items():
            key = layer.expert(expert)
            kept = tuple(v for v in versions if ExpertVersion(key, v) not in gone)
            if kept:
                left[layer][expert] = kept
    return left


class PoolView:
    """All hosts of a pool, by their last reports."""

    def __init__(self, hosts: Sequence[PoolHost], *, host_timeout_s: float) -> None:
        """Start without reports; a host away for ``host_timeout_s`` seconds is no longer usable."""
        self.hosts = {host.name: host for host in hosts}
        self.observations: dict[str, Observation] = {}
        self.retiring: set[str] = set()  # hosts that are leaving the pool
        self.version = 0  # grows with every change of the view
        # Only the served version of an expert counts as held, in most methods.
        self.versions = WeightVersions()
        # The speed factor of each slow or silent host.
        self.speed_factors: dict[str, float] = {}
        self._host_speeds = HostSpeeds()
        self.training_times = TrainingTimes()
        self.host_timeout_s = host_timeout_s
        self._away_since: dict[str, float] = {}
        self._arrived: set[str] = set()
        self._heard_at: dict[str, float] = {}
        # What hosts held that do not answer any more; since when a host's process is known to be
        # gone, and until when: its next process may be there since then.
        self._lost: dict[str, Observation] = {}
        self._gone_since: dict[str, float] = {}
        self._gone_until: dict[str, float] = {}
        self._now = 0.0

    def add(self, host: PoolHost) -> None:
        """Announce a new host; nothing is planned for it before it has reported."""
        self.hosts[host.name] = host
        self._away_since[host.name] = -math.inf

    def change(self, host: PoolHost) -> None:
        """Take over what is new about a host: its room, its speed, its failure domain."""
        known = self.hosts[host.name]
        self.hosts[host.name] = replace(host, device_bytes=known.device_bytes)
        self.version += 1

    def remove(self, host: str) -> None:
        """Forget a host that left the pool."""
        del self.hosts[host]
        self.observations.pop(host, None)
        self._away_since.pop(host, None)
        self.retiring.discard(host)
        self._arrived.discard(host)
        self._heard_at.pop(host, None)
        self._lost.pop(host, None)
        self._gone_since.pop(host, None)
        self._gone_until.pop(host, None)
        self._host_speeds.forget(host)
        self.training_times.forget(host)
        self.version += 1

    def note(self, reports: Mapping[str, Observation | None], now: float) -> None:
        """Take in reports: None is a host that is gone; a missing one did not answer in time."""
        asked_at, self._now = self._now, now  # the answers came between these
        for host, observation in reports.items():
            if host not in self.hosts:
                continue  # it was removed after it was asked
            self._heard_at[host] = now
            if self.observations.get(host) != observation:
                self.version += 1
            if observation is None:
                before = self.observations.pop(host, None)
                self._gone_since.setdefault(host, now)
                self._gone_until[host] = asked_at
                if before is not None:
                    self._lost[host] = before
            else:
                self._lost.pop(host, None)
                self._gone_since.pop(host, None)
                self.observations[host] = observation
                if self.hosts[host].device_bytes != observation.device_bytes:
                    new = replace(self.hosts[host], device_bytes=observation.device_bytes)
                    self.hosts[host] = new
                self._away_since.pop(host, None)
                self._arrived.add(host)
                if observation.work is not None:
                    incarnation = observation.entry.incarnation
                    self._host_speeds.note(host, incarnation, observation.work, now)
                    work = observation.work
                    self.training_times.note(host, incarnation, work.backward_s, work.owner_s)
        for host in [h for h in self.retiring & self.observations.keys() if self._is_lost(h)]:
            self._lost[host] = self.observations.pop(host)
            self.version += 1
        for host in self.hosts.keys() - self.observations.keys():
            self._away_since.setdefault(host, now)
        speeds = {host: known.speed for host, known in self.hosts.items() if host in self._arrived}
        silent = {host for host in speeds if reports.get(host) is None}
        self.speed_factors = self._host_speeds.speed_factors(speeds, silent)

    def serve(self, versions: WeightVersions) -> None:
        """Count these versions of experts from now on."""
        self.versions = versions
        self.version += 1

    def forget(self, host: str, gone: Collection[ExpertVersion]) -> None:
        """Remove what a host was told to evict, without waiting for its next report."""
        seen = self.observations[host]
        self.observations[host] = replace(seen, holdings=without(seen.holdings, set(gone)))

    def usable(self, now: float) -> frozenset[str]:
        """Return the hosts that are alive, or have not been away for ``host_timeout_s`` yet."""
        return frozenset(
            host
            for host in self.hosts
            if host in self.observations
            or now - self._away_since.get(host, now) < self.host_timeout_s
        )

    def never_seen(self, host: str) -> bool:
        """Return whether a host has never reported."""
        return host not in self._arrived

    def is_silent(self, host: str) -> bool:
        """Return whether nothing is known of what a host holds, although it may be there."""
        return host not in self.observations and host not in self._gone_since

    def empty(self, host: str) -> bool:
        """Return whether a host holds and loads nothing, and owns nothing that is trained.

        If it does not answer: whether other hosts hold all that it held. A host whose process is
        gone is empty after ``host_timeout_s``; until then its next process may have its memory.
        """
        seen, lost = self.observations.get(host), self._lost.get(host)
        if seen is None:
            gone_s = self._gone_until.get(host, 0.0) - self._gone_since.get(host, self._now)
            if lost is None or gone_s >= self.host_timeout_s:
                return True
            return all(self.holders(key) for key in lost.experts())
        return seen.bare and not seen.owned

    def is_known(self, host: str) -> bool:
        """Return whether a host reported in the last round, or is known to be gone."""
        return host not in self.observations or self._heard_at.get(host) == self._now

    def _is_lost(self, host: str) -> bool:
        """Return whether a retiring host is silent too long, and others hold all it held."""
        silent = self._now - self._heard_at.get(host, self._now) >= self.host_timeout_s
        return silent and all(
            len(self.holders(key)) > 1 for key in self.observations[host].experts()
        )

    def entries(self) -> dict[str, HostEntry]:
        """Return the hosts that routers may connect to."""
        return {
            host: seen.entry
            for host, seen in self.observations.items()
            if host not in self.retiring or not self.empty(host)
        }

    def holders(self, key: ExpertKey, version: int | None = None) -> list[str]:
        """Return the hosts that hold a version of an expert (None: the served one)."""
        weights = ExpertVersion(key, self.versions.of(key) if version is None else version)
        return [host for host, seen in self.observations.items() if seen.holds(weights)]

    def holds(self, host: str, key: ExpertKey) -> bool:
        """Return whether a host holds the served version of an expert."""
        seen = self.observations.get(host)
        return seen is not None and seen.holds(self.versions.served(key))

    def held_by(self) -> dict[ExpertKey, list[str]]:
        """Return the holders of every expert that has some: `holders` of a whole pool at once."""
        found: dict[ExpertKey, list[str]] = {}
        served = self.versions.of
        for host, seen in self.observations.items():
            for layer, experts in seen.holdings.items():
                for expert, versions in experts.items():
                    key = layer.expert(expert)
                    if served(key) in versions:
                        found.setdefault(key, []).append(host)
        return found

    def domains(self, key: ExpertKey) -> set[str]:
        """Return the failure domains in which a host holds an expert."""
        return {self.hosts[host].domain or host for host in self.holders(key)}

    def held_placement(self, models: Sequence[ModelShape]) -> dict[LayerKey, LayerPlacement]:
        """Return a placement of what hosts hold, with even shares."""
        layers = {}
        for shape in models:
            for layer, experts in shape.experts.items():
                key = LayerKey(shape.model, layer)
                holders = [self.holders(key.expert(expert)) for expert in range(experts)]
                layers[key] = LayerPlacement(
                    tuple(tuple(Replica(host, 1 / len(h)) for host in h) for h in holders)
                )
        return layers
