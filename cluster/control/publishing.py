"""From the target and what hosts hold to placements, and to what hosts may forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, Number, Placement, Replica
from .pool_view import View

Target = Mapping[LayerKey, LayerPlacement]


class Publisher:
    """Knows what was published, to which routers it has come, and what was taken out of it."""

    def __init__(self, view: View, *, term: int, lease_s: float) -> None:
        """A router that is silent for ``lease_s`` seconds holds no eviction up."""
        self.number = Number(term, 0)
        self.placement: Placement | None = None
        self._view = view
        self._lease_s = lease_s
        # Leases run while the controller listens. One that was frozen has heard nobody, so what
        # passes between two rounds counts for a third of a lease at most.
        self._listened_s = 0.0
        self._looked: float | None = None
        self._since_s: float | None = None
        self._routers: dict[str, tuple[Number | None, float]] = {}
        # Replicas that are held and not published, with the number that is to be acknowledged.
        self._retired: dict[tuple[ExpertKey, str], Number] = {}
        # The last placement that told routers of each host.
        self._told: dict[str, Number] = {}

    def acknowledged(self, router: str, number: Number | None, now: float) -> None:
        self._routers[router] = (number, self._listened(now))

    def routers(self, now: float) -> dict[str, Number | None]:
        """Live routers, and the placement that each follows."""
        over_s = self._listened(now) - self._lease_s
        self._routers = {r: v for r, v in self._routers.items() if v[1] >= over_s}
        return {name: number for name, (number, _) in self._routers.items()}

    def appeared(self, model: str) -> bool:
        return self.placement is not None and any(k.model == model for k in self.placement.layers)

    def publish(self, target: Target, models: Mapping[str, ModelShape]) -> Placement | None:
        """The placement of what is ready; None if it is what was published last."""
        whole = {model: self._whole(model, target) for model in models}
        layers = {}
        for key, layer in target.items():
            # A model appears when every expert of it can be computed; later some may be away.
            if self.appeared(key.model) or whole.get(key.model):
                before = self.placement.layers.get(key) if self.placement is not None else None
                layers[key] = LayerPlacement(
                    tuple(
                        self._ready(key.expert(e), replicas, before.replicas[e] if before else ())
                        for e, replicas in enumerate(layer.replicas)
                    ),
                    layer.parts,
                )
        hosts = self._view.entries()
        exact = frozenset(model for model, shape in models.items() if shape.exact)
        last = self.placement
        if last is not None and (last.hosts, last.layers, last.exact) == (hosts, layers, exact):
            return None
        if last is None and not layers:
            return None
        self.number = Number(self.number.term, self.number.epoch + 1)
        self.placement = Placement(number=self.number, hosts=hosts, layers=layers, exact=exact)
        self._told.update(dict.fromkeys(hosts, self.number))
        return self.placement

    def evictable(
        self, target: Target, now: float, asleep: Collection[str] = ()
    ) -> dict[str, list[ExpertKey]]:
        """What each host holds that neither the target nor any live router's placement names. The
        last replica of an expert stays, unless its model is ``asleep``."""
        if not self._knows_routers(now) or self.placement is None:
            return {}
        named, wanted = _named(self.placement.layers), _named(target)
        held = {(key, host) for host, seen in self._view.seen.items() for key in seen.experts()}
        self._retired = {
            where: self._retired.get(where, self.number) for where in sorted(held - named)
        }
        acknowledged = list(self.routers(now).values())
        found: dict[str, list[ExpertKey]] = {}
        going: Counter[ExpertKey] = Counter()
        for (key, host), number in self._retired.items():
            # Models that this controller does not know may have been put just now.
            known = LayerKey(key.model, key.layer) in target
            # One holder stays, even if no target names it and its model is not placed yet.
            last = len(self._view.holders(key)) - going[key] <= 1
            spare = (known and (key, host) not in wanted and not last) or key.model in asleep
            if spare and all(ack is not None and ack >= number for ack in acknowledged):
                found.setdefault(host, []).append(key)
                going[key] += 1
        return found

    def _listened(self, now: float) -> float:
        passed_s = 0.0 if self._looked is None else now - self._looked
        return self._listened_s + min(passed_s, self._lease_s / 3)

    def has_left(self, host: str, now: float) -> bool:
        """Whether no live router follows a placement that tells of ``host``."""
        if not self._knows_routers(now):
            return False
        if self.placement is not None and host in self.placement.hosts:
            return False
        # What an earlier controller told of it is over with any placement of this one.
        told = self._told.get(host, Number(self.number.term, 0))
        return all(ack is not None and ack > told for ack in self.routers(now).values())

    def forget(self, host: str) -> None:
        """A host was removed."""
        self._told.pop(host, None)

    def _knows_routers(self, now: float) -> bool:
        """Behind a change of controllers, routers get a lease's time to say that they live."""
        self._listened_s, self._looked = self._listened(now), now
        self._since_s = self._listened_s if self._since_s is None else self._since_s
        return self._listened_s - self._since_s >= self._lease_s

    def _ready(
        self, key: ExpertKey, target: tuple[Replica, ...], before: tuple[Replica, ...]
    ) -> tuple[Replica, ...]:
        """The target's replicas that are ready; until all are, those that stood before help."""
        ready = tuple(r for r in target if self._view.holds(r.host, key))
        if len(ready) == len(target) > 0:
            return ready
        named = {r.host for r in target}
        stood = [r.host for r in before if r.host not in named and self._view.holds(r.host, key)]
        if not ready and not stood:
            # What nobody planned but somebody has, as behind a change of controllers.
            stood = self._view.holders(key)
        left = max(0.0, 1.0 - sum(r.share for r in ready))
        return ready + tuple(Replica(host, left / len(stood)) for host in stood)

    def _whole(self, model: str, target: Target) -> bool:
        return all(
            self._view.holders(key.expert(expert))
            for key, layer in target.items()
            if key.model == model
            for expert in range(len(layer.replicas))
        )


def _named(layers: Target) -> set[tuple[ExpertKey, str]]:
    return {
        (key.expert(expert), replica.host)
        for key, layer in layers.items()
        for expert, replicas in enumerate(layer.replicas)
        for replica in replicas
    }
