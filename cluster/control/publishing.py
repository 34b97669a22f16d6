"""Derive from the target and the hosts' holdings what to publish and what hosts may evict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ..expert_keys import ExpertKey, ExpertVersion, LayerKey
from ..placement import (
    LayerPlacement,
    ModelShape,
    Placement,
    PlacementId,
    PlacementNews,
    Replica,
    VersionChange,
)
from ..versions import WeightVersions
from .pool_view import PoolView

TargetLayers = Mapping[LayerKey, LayerPlacement]


class Publisher:
    """Tracks what was published, which routers acknowledged it, and what has left it since."""

    def __init__(self, view: PoolView, *, term: int, lease_s: float) -> None:
        """Start with nothing published; a router silent for ``lease_s`` s delays no eviction."""
        self.placement_id = PlacementId(term, 0)
        self.placement: Placement | None = None
        self._same_since = self.placement_id  # from which placement on only versions differ
        self._view = view
        self.lease_s = lease_s
        # Leases are measured in the time that the controller has listened. A controller that was
        # frozen has heard no router, so the time between two rounds counts for at most a third of a
        # lease.
        self._listened_s = 0.0
        self._looked: float | None = None
        self._since_s: float | None = None
        self._routers: dict[str, tuple[PlacementId | None, float]] = {}
        # Replicas that hosts hold and the placement does not name, each with the number of the
        # first placement without it: once acknowledged, no router can ask for the replica.
        self._retired: dict[tuple[ExpertVersion, str], PlacementId] = {}
        # The last placement that named each host.
        self._told: dict[str, PlacementId] = {}

    def acknowledged(self, router: str, number: PlacementId | None, now: float) -> None:
        """Take note of the placement that a router follows; this renews its lease."""
        self._routers[router] = (number, self._listened(now))

    def routers(self, now: float) -> dict[str, PlacementId | None]:
        """Return the live routers, and the number of the placement that each follows."""
        over_s = self._listened(now) - self.lease_s
        self._routers = {r: v for r, v in self._routers.items() if v[1] >= over_s}
        return {name: number for name, (number, _) in self._routers.items()}

    def has_published(self, model: str) -> bool:
        """Return whether the published placement has a model."""
        return self.placement is not None and any(k.model == model for k in self.placement.layers)

    def news(self, after: PlacementId | None) -> PlacementNews | None:
        """Return what a router has to hear that has received the placement ``after``, if any."""
        now = self.placement
        if now is None or (after is not None and now.id <= after):
            return None
        if after is not None and after >= self._same_since:
            return VersionChange(since=self._same_since, id=now.id, versions=now.versions)
        return now

    def publish(
        self,
        target: TargetLayers,
        models: Mapping[str, ModelShape],
        is_lost: Callable[[ExpertKey], bool] = lambda _: False,
    ) -> Placement | None:
        """Publish a placement of what is ready; None if that is what was published last.

        Experts that are lost for good do not keep the rest of their model out of it.
        """
        # A model appears once hosts hold all of its experts. Later some may be missing.
        appeared = {
            model
            for model in models
            if self.has_published(model) or self._whole(model, target, is_lost)
        }
        layers = {}
        for key, layer in target.items():
            if key.model in appeared:
                before = self.placement.layers.get(key) if self.placement is not None else None
                layers[key] = LayerPlacement(
                    tuple(
                        self._ready(key.expert(e), replicas, before.replicas[e] if before else ())
                        for e, replicas in enumerate(layer.replicas)
                    ),
                    layer.load_shares,
                )
        hosts = self._view.entries()
        exact = frozenset(model for model, shape in models.items() if shape.exact)
        last = self.placement
        versions = self._view.versions
        found = hosts, layers, exact, versions
        if last is not None and (last.hosts, last.layers, last.exact, last.versions) == found:
            return None
        if last is None and not layers:
            return None
        self.placement_id = PlacementId(self.placement_id.term, self.placement_id.epoch + 1)
        if last is not None and (last.hosts, last.layers, last.exact) == found[:3]:
            self.placement = replace(last, id=self.placement_id, versions=versions)
        else:
            self._same_since = self.placement_id
            self.placement = Placement(
                id=self.placement_id, hosts=hosts, layers=layers, exact=exact, versions=versions
            )
        self._told.update(dict.fromkeys(hosts, self.placement_id))
        return self.placement

    def renumber(self) -> Placement | None:
        """Publish the served versions alone; None if hosts have changed, too.

        Every replica that the placement names must hold them.
        """
        last = self.placement
        if last is None or last.hosts != self._view.entries():
            return None
        self.placement_id = PlacementId(self.placement_id.term, self.placement_id.epoch + 1)
        self.placement = replace(last, id=self.placement_id, versions=self._view.versions)
        self._told.update(dict.fromkeys(last.hosts, self.placement_id))
        return self.placement

    def evictable(
        self,
        target: TargetLayers,
        now: float,
        asleep: Collection[str] = (),
        is_arriving: Callable[[ExpertVersion], bool] = lambda _: False,
    ) -> dict[str, list[ExpertVersion]]:
        """Return for each host the replicas that neither the target nor any live router needs.

        A router needs what its placement names. The last replica of an expert stays, unless its
        model is ``asleep``. Versions that are arriving are about to be served, and stay.
        """
        if not self._knows_routers(now) or self.placement is None:
            return {}
        named = _named(self.placement.layers, self.placement.versions)
        wanted = _named(target, self._view.versions)
        held = {
            (one, host)
            for host, seen in self._view.observations.items()
            for one in seen.weights()
            if not is_arriving(one)
        }
        self._retired = {
            where: self._retired.get(where, self.placement_id) for where in sorted(held - named)
        }
        acknowledged = list(self.routers(now).values())
        found: dict[str, list[ExpertVersion]] = {}
        going: Counter[ExpertVersion] = Counter()
        for (one, host), number in self._retired.items():
            key = one.key
            # The target does not know models that somebody is just loading into hosts.
            known = LayerKey(key.model, key.layer) in target
            # One holder of each expert stays, even if no target names it; an older version stays
            # until some host holds the served one.
            served = self._view.versions.served(key)
            least = 1 if one == served else 0
            last = len(self._view.holders(key)) - going[served] <= least
            spare = (known and (one, host) not in wanted and not last) or key.model in asleep
            if spare and all(ack is not None and ack >= number for ack in acknowledged):
                found.setdefault(host, []).append(one)
                going[one] += 1
        return found

    def _listened(self, now: float) -> float:
        """Return for how many seconds the controller has listened to routers."""
        passed_s = 0.0 if self._looked is None else now - self._looked
        return self._listened_s + min(passed_s, self.lease_s / 3)

    def has_left(self, host: str, now: float) -> bool:
        """Return whether no live router follows a placement that names ``host``."""
        if not self._knows_routers(now):
            return False
        if self.placement is not None and host in self.placement.hosts:
            return False
        # If this controller never named it, an earlier one may have; any placement of this term
        # replaces those.
        told = self._told.get(host, PlacementId(self.placement_id.term, 0))
        return all(ack is not None and ack > told for ack in self.routers(now).values())

    def forget(self, host: str) -> None:
        """Forget a host that was removed."""
        self._told.pop(host, None)

    def _knows_routers(self, now: float) -> bool:
        """Return whether all live routers have had the time to report.

        After a change of controllers, this takes one lease.
        """
        self._listened_s, self._looked = self._listened(now), now
        self._since_s = self._listened_s if self._since_s is None else self._since_s
        return self._listened_s - self._since_s >= self.lease_s

    def _ready(
        self, key: ExpertKey, target: tuple[Replica, ...], before: tuple[Replica, ...]
    ) -> tuple[Replica, ...]:
        """Return the target's replicas that are ready, with earlier replicas until all are."""
        ready = tuple(r for r in target if self._view.holds(r.host, key))
        if len(ready) == len(target) > 0:
            return ready
        named = {r.host for r in target}
        stood = [r.host for r in before if r.host not in named and self._view.holds(r.host, key)]
        if not ready and not stood:
            # Use any host that holds the expert though no plan says so, for example after a change
            # of controllers.
            stood = self._view.holders(key)
        # The earlier replicas share what the ready ones leave.
        left = max(0.0, 1.0 - sum(r.share for r in ready))
        return ready + tuple(Replica(host, left / len(stood)) for host in stood)

    def _whole(
        self, model: str, target: TargetLayers, is_lost: Callable[[ExpertKey], bool]
    ) -> bool:
        """Return whether hosts hold every expert of a model that is not lost."""
        return all(
            self._view.holders(key.expert(expert)) or is_lost(key.expert(expert))
            for key, layer in target.items()
            if key.model == model
            for expert in range(len(layer.replicas))
        )


def _named(layers: TargetLayers, versions: WeightVersions) -> set[tuple[ExpertVersion, str]]:
    """Return all replicas of a placement as (version of an expert, host)."""
    return {
        (versions.served(key.expert(expert)), replica.host)
        for key, layer in layers.items()
        for expert, replicas in enumerate(layer.replicas)
        for replica in replicas
    }
