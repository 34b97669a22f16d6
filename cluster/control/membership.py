"""Hosts that join a pool and leave it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..placement import ModelShape
from ..planner.constraints import without_host
from ..planner.plan import OperatorConstraints, PoolHost
from ..training.room import TrainingHost, replicas_with_room, shortage_without
from ..training.runs import LivingRun, TrainingRuns
from .loading import Loader
from .pool_view import PoolView
from .publishing import Publisher
from .target import Target


class Membership:
    """Which hosts a pool has, and which of them are leaving.

    A host that leaves is retired first: it is drained, then taken out of placements. It is free as
    soon as each live router has acknowledged a placement without it, or its lease has ended.
    """

    def __init__(
        self, view: PoolView, publisher: Publisher, loader: Loader, target: Target
    ) -> None:
        self._view = view
        self._publisher = publisher
        self._loader = loader
        self._target = target
        # What operators want; the next tick of the controller plans for it.
        self.constraints = OperatorConstraints()

    def add(self, host: PoolHost) -> None:
        """Announce a new host; it is used as soon as it reports."""
        self._view.add(host)

    def retire(self, name: str) -> None:
        """Drain a host, so that `remove` may follow; `keep` revokes it."""
        self._view.retiring.add(name)
        self._view.version += 1  # an empty host leaves placements at once

    def keep(self, name: str) -> None:
        """Keep a host that was retired."""
        self._view.retiring.discard(name)
        self._view.version += 1  # the next placement names it to routers again

    def remove(self, name: str) -> None:
        """Forget a host that is free according to `is_free`."""
        self._view.remove(name)
        self._publisher.forget(name)
        self._loader.forget(name)
        self.constraints = without_host(self.constraints, name)

    @property
    def leaving(self) -> frozenset[str]:
        """Hosts that must become empty: drained by operators, or retired."""
        return self.constraints.leaving | self._view.retiring

    def is_free(self, host: str, now: float, *, experts_are_missing: bool) -> bool:
        """Return whether a retired host holds nothing, gets nothing, and no router uses it."""
        view = self._view
        idle = host in view.retiring and view.empty(host) and not self._target.wanted(host)
        # A host that does not answer may hold the experts that are missing: it may have been frozen
        # since before this controller began, or just after it had loaded them.
        if not idle or (view.is_silent(host) and experts_are_missing):
            return False
        return view.is_known(host) and self._publisher.has_left(host, now)

    def drain_blockers(self, models: Mapping[str, ModelShape]) -> dict[str, str]:
        """Return the leaving hosts that cannot leave, with the reason as text.

        They go on serving the experts for which no other host has room, and leave once there is.
        """
        unplaced, words = set(self._target.unplaced), {}
        for host in sorted(self.leaving & self._view.hosts.keys()):
            stuck = unplaced.intersection(self._target.wanted(host))
            if stuck:
                size = sum(models[key.model].expert_bytes for key in stuck)
                words[host] = (
                    f"no other host has room for {len(stuck)} of its experts ({size / 1e6:,.1f} MB)"
                )
        return words

    def training_shortage(self, training: TrainingRuns, more: Collection[str]) -> str:
        """Return why a run that lives would lack what it needs without ``more`` hosts; else empty.

        Hosts that are leaving go, too. Nothing is known of a run before it has told of itself.
        """
        parts, view = training.told.parts, self._view
        leaving = {*self.leaving, *more}
        if training.alive is None or parts is None:
            return ""
        replicas = sum(
            1
            for host in leaving & view.observations.keys()
            for key in view.observations[host].experts()
            if key.model == training.alive.model
        )
        return shortage_without(parts, leaving, replicas, self._training_hosts(leaving))

    def with_training_room(
        self, hosts: Sequence[PoolHost], training: TrainingRuns, models: Mapping[str, ModelShape]
    ) -> list[PoolHost]:
        """Return the hosts with no more room than a run leaves of their machines' free memory.

        A replica of an expert that is trained takes much more than its weights.
        """
        run, parts = training.alive, training.told.parts
        if run is None or parts is None or run.model not in models:
            return list(hosts)
        room = replicas_with_room(parts, self._training_hosts(self.leaving))
        expert_bytes = models[run.model].expert_bytes

        def limited(host: PoolHost) -> PoolHost:
            if host.name not in room:
                return host
            wanted = self._target.wanted(host.name)
            limit = sum(models[key.model].expert_bytes for key in wanted if key.model in models)
            limit += room[host.name] * expert_bytes
            known = host.memory_bytes
            return replace(host, memory_bytes=limit if known is None else min(known, limit))

        return [limited(host) for host in hosts]

    def _training_hosts(self, leaving: Collection[str]) -> dict[str, TrainingHost]:
        """Return the hosts that stay without ``leaving``, and the memory of their machines."""
        hosts, seen = self._view.hosts, self._view.observations
        return {
            name: TrainingHost(one.entry.node, hosts[name].domain or name, one.free_bytes)
            for name, one in seen.items()
            if name not in leaving
        }

    def owners(self, run: LivingRun | None) -> dict[str, str]:
        """Return the leaving hosts that own tensors of the run that lives, with that as text."""
        if run is None:
            return {}
        seen = self._view.observations
        return {
            host: f"owns {seen[host].owned} tensors of the run that trains {run.model}; the run "
            "hands them over between steps"
            for host in sorted(self.leaving & seen.keys())
            if seen[host].owned
        }
