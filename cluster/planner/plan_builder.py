"""The draft of a plan: which host holds what, what is free, and the moves decided so far.

Shapes: E experts of one layer, H hosts, R experts that stand in one failure domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..expert_keys import ExpertKey, LayerKey
from ..placement import LayerPlacement, ModelShape, Replica
from .balance import balancedness, even_split, shares
from .consolidation import consolidate, consolidation_level
from .moves import FreeCapacity, LayerConstraints, Step
from .plan import Move, OperatorConstraints, Plan, PlannerPolicy, PoolHost
from .search import LayerSearch
from .upkeep import ReplicaUpkeep

UNLIMITED = np.iinfo(np.int64).max // 4


def _known(loads: Mapping[LayerKey, np.ndarray], key: LayerKey) -> np.ndarray | None:
    """Return a layer's load, (E,) float; None if it has no load yet."""
    load_E = loads.get(key)
    return None if load_E is None or not load_E.any() else load_E.astype(float)


class PlanBuilder:
    """All layers of a pool while the planner changes them; `result` makes the plan."""

    def __init__(
        self,
        models: Sequence[ModelShape],
        hosts: Sequence[PoolHost],
        current: Mapping[LayerKey, LayerPlacement],
        loads: Mapping[LayerKey, np.ndarray],
        policy: PlannerPolicy,
        constraints: OperatorConstraints,
        upkeep: ReplicaUpkeep | None = None,
    ) -> None:
        self.hosts = [host for host in hosts if host.name not in constraints.leaving]
        if not self.hosts:
            raise ValueError("hosts: no host is left to place experts on")
        self.names = [host.name for host in self.hosts]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.speed_H = np.array([host.speed for host in self.hosts], dtype=float)
        self.current = current
        self.policy = policy
        self.constraints = constraints
        self.upkeep = upkeep
        self.free = FreeCapacity(
            np.array([UNLIMITED if h.slots is None else h.slots for h in self.hosts]),
            np.array([UNLIMITED if h.room_bytes is None else h.room_bytes for h in self.hosts]),
        )
        domains = {d: i for i, d in enumerate(sorted({h.domain or h.name for h in self.hosts}))}
        self.domain_H = np.array([domains[h.domain or h.name] for h in self.hosts])
        keys = [LayerKey(shape.model, layer) for shape in models for layer in shape.experts]
        known = [load_E for key in keys if (load_E := _known(loads, key)) is not None]
        self.consolidation_level = consolidation_level(
            known, self.speed_H, policy.consolidate_below
        )
        self.searches: dict[LayerKey, LayerSearch] = {}
        self.load_before_H = {}
        for shape in models:
            for layer, experts in sorted(shape.experts.items()):
                self._add_layer(shape, LayerKey(shape.model, layer), experts, loads)
        # quota_H: each layer's even part of a host's slots, those that it uses now included.
        free_H = self.free.slots_H + sum(s.held_EH.sum(axis=0) for s in self.searches.values())
        self.quota_H = np.ceil(free_H / max(len(self.searches), 1))
        # The replicas of the current placement, on hosts that are not leaving.
        self.current_EH = {key: search.held_EH.copy() for key, search in self.searches.items()}
        # Load of each host, separately for light layers and for all others: the others are balanced
        # afterwards, so their load now does not say where light layers should go, and vice versa.
        self.use_H = {light: np.zeros(len(self.hosts)) for light in (False, True)}
        for search in self.searches.values():
            self.use_H[search.is_light] += search.even_load()
        self.moves: list[Move] = []
        self.unplaced: list[ExpertKey] = []

    def _add_layer(
        self,
        shape: ModelShape,
        key: LayerKey,
        experts: int,
        loads: Mapping[LayerKey, np.ndarray],
    ) -> None:
        held_EH = np.zeros((experts, len(self.hosts)), dtype=bool)
        before_H = np.zeros(len(self.hosts))
        # The load that a layer without load will have is unknown, so it is spread over all hosts.
        known = _known(loads, key)
        load_E = np.ones(experts) if known is None else known
        for expert, replicas in enumerate(self.current.get(key, LayerPlacement(())).replicas):
            for host, share in replicas:
                if host in self.index:
                    held_EH[expert, self.index[host]] = True
                    before_H[self.index[host]] += load_E[expert] * share
        min_replicas_E = np.full(experts, max(1, shape.replicas))
        pinned_EH = np.zeros_like(held_EH)
        for expert in range(experts):
            expert_key = key.expert(expert)
            min_replicas_E[expert] = max(
                min_replicas_E[expert], self.constraints.min_replicas.get(expert_key, 1)
            )
            for host in self.constraints.pins.get(expert_key, ()):
                if host in self.index:
                    pinned_EH[expert, self.index[host]] = True
        counts = held_EH.sum(axis=0)
        self.free.slots_H -= counts
        self.free.bytes_H -= counts * shape.expert_bytes
        self.load_before_H[key] = before_H
        self.searches[key] = LayerSearch(
            held_EH,
            load_E,
            self.speed_H,
            free=self.free,
            expert_bytes=shape.expert_bytes,
            constraints=LayerConstraints(
                domain_H=self.domain_H,
                domains=self.policy.redundancy + 1,
                min_replicas_E=np.minimum(min_replicas_E, len(self.hosts)),
                pinned_EH=pinned_EH,
            ),
            least=0.0 if known is None else self.consolidation_level,
            upkeep_EH=None if known is None else self._upkeep(key, experts),
        )

    def _upkeep(self, key: LayerKey, experts: int) -> np.ndarray | None:
        """Return what each replica of a layer costs, as load, (E, H); None: nothing."""
        if self.upkeep is None:
            return None
        busy_EH = self.upkeep.busy(key, experts, self.names)
        return None if busy_EH is None else busy_EH * float(self.speed_H.mean())

    def add(
        self,
        key: LayerKey,
        expert: int,
        kind: str,
        reason: str,
        *,
        among_H: np.ndarray | None = None,
    ) -> bool:
        """Put a replica of an expert on the best host with room; return False if there is none.

        ``among_H``, (H,) bool, are the hosts that may get it; None: all. If none of them has room,
        a replica that can be spared is dropped to make room.
        """
        search = self.searches[key]
        able_H = ~search.held_EH[expert] & (True if among_H is None else among_H)
        fits_H = self.free.fits(search.expert_bytes) & able_H
        bare = not search.held_EH[expert].any()
        drops: tuple[tuple[LayerKey, int, int], ...] = ()
        if not fits_H.any():
            # An expert without any replica counts more than the protection of another one.
            drops = self._cheapest_drop(search.expert_bytes, able_H, bare=bare)
            if not drops:
                return False
            for other, victim, host in drops:
                self.apply(self.searches[other], Step((), ((victim, host),)))
            fits_H = np.arange(len(self.hosts)) == drops[0][2]
        order = self._order(search, expert)
        host = int(next(h for h in order if fits_H[h]))
        replaces = tuple(other.expert(victim) for other, victim, _ in drops)
        self.note(key, Step(((expert, host),)), kind, reason, replaces)
        self.apply(search, Step(((expert, host),)))
        return True

    def apply(self, search: LayerSearch, step: Step) -> None:
        """Carry out a step in one of the layers, and keep count of the load of each host."""
        use_H = self.use_H[search.is_light]
        use_H -= search.even_load()
        search.apply(step)
        use_H += search.even_load()

    def _order(self, search: LayerSearch, expert: int) -> np.ndarray:
        """Return the hosts, (H,) indices, in the order of preference for one more replica.

        The keys, the weightiest first: hosts below the layer's quota; for light layers, hosts that
        they use already; the layer's load / speed, as it would be after the loss of a domain; the
        load / speed of all layers of the same class; the number of free slots.
        """
        load, bare = float(search.load_E[expert]), not search.held_EH[expert].any()
        layer_H = search.even_load()
        held_H = search.held_EH.sum(axis=0)
        # No layer exceeds its quota while another host is below it, so that layers that are placed
        # later find room everywhere.
        quota_H = self.quota_H
        # A light layer takes a new host only when the hosts that it has are full to its level.
        far_H = np.zeros(len(self.hosts), dtype=bool)
        if search.is_light:
            far_H = (held_H == 0) | ((layer_H + load) / self.speed_H > search.least)
            # First replicas, gathered on few hosts, must leave slots for those that protect them.
            quota_H = np.ceil(quota_H / (self.policy.redundancy + 1)) if bare else quota_H
        # np.lexsort sorts by its last key first.
        return np.lexsort(
            (
                -self.free.slots_H,
                np.round(self.use_H[search.is_light] / self.speed_H, 9),
                np.round((layer_H + self._inherited(search, expert)) / self.speed_H, 9),
                far_H,
                held_H >= quota_H,
            )
        )

    def _inherited(self, search: LayerSearch, expert: int) -> np.ndarray:
        """Return the most load that each host would inherit if a domain of the expert were lost.

        (H,), the maximum over the failure domains that hold the expert. If a domain is lost, each
        expert in it splits its load evenly over its remaining replicas. Preferring hosts that would
        inherit little spreads the replicas of experts that stand together, so that many hosts share
        the load that one of them leaves.
        """
        found_H = np.zeros(len(self.hosts))
        for domain in set(self.domains(search, expert)):
            lost_H = self.domain_H == domain
            here_E = search.held_EH[:, lost_H].any(axis=1)
            held_RH, load_R = search.held_EH[here_E], search.load_E[here_E]
            now_R, left_R = held_RH.sum(axis=1), held_RH[:, ~lost_H].sum(axis=1)
            # What each remaining replica of an expert has after the loss, less what it has now.
            more_R = load_R * np.where(left_R > 0, 1 / np.maximum(left_R, 1) - 1 / now_R, 0.0)
            found_H = np.maximum(found_H, np.where(lost_H, 0.0, more_R @ held_RH))
        return found_H

    def _cheapest_drop(
        self, expert_bytes: int, able_H: np.ndarray, *, bare: bool
    ) -> tuple[tuple[LayerKey, int, int], ...]:
        """Return the droppable replica with the least load that leaves room for an expert.

        Its slot, and its bytes with those that are free beside it, are enough. As ((layer, expert,
        host),), or () if there is none. ``bare``: see `LayerConstraints.droppable`.
        """
        best: tuple[float, LayerKey, int, int] | None = None
        free_H = np.maximum(self.free.bytes_H, 0)
        for key, search in self.searches.items():
            enough_H = able_H & (search.expert_bytes + free_H >= expert_bytes)
            if not enough_H.any():
                continue
            droppable_EH = search.constraints.droppable(search.held_EH, bare=bare) & enough_H
            part_E = search.load_E / np.maximum(search.held_EH.sum(axis=1), 1)
            for expert, host in np.argwhere(droppable_EH):
                if best is None or part_E[expert] < best[0]:
                    best = float(part_E[expert]), key, int(expert), int(host)
        return () if best is None else (best[1:],)

    def note(
        self,
        key: LayerKey,
        step: Step,
        kind: str,
        reason: str,
        replaces: tuple[ExpertKey, ...] = (),
    ) -> None:
        """Record a move for each replica that a step adds; the caller applies the step."""
        for expert, host in step.adds:
            gone = tuple(key.expert(e) for e, h in step.drops if h == host)
            self.moves.append(
                Move(
                    key=key.expert(expert),
                    host=self.names[host],
                    kind=kind,
                    reason=reason,
                    expert_bytes=self.searches[key].expert_bytes,
                    replaces=replaces + gone,
                )
            )

    def domains(self, search: LayerSearch, expert: int) -> list[int]:
        """Return the failure domain of each replica of an expert."""
        return [int(d) for d in self.domain_H[search.held_EH[expert]]]

    def unprotected(self) -> list[tuple[LayerKey, int]]:
        """Return the experts with replicas in too few domains, the rarest and hottest first."""
        need = min(self.policy.redundancy + 1, len(set(self.domain_H.tolist())))
        found = [
            (len(set(self.domains(search, expert))), -search.load_E[expert], key, expert)
            for key, search in self.searches.items()
            for expert in range(len(search.load_E))
        ]
        return [(key, expert) for count, _, key, expert in sorted(found) if 0 < count < need]

    def result(self) -> Plan:
        """Return the plan: the placement with its shares, its net moves, and its balancedness."""
        layers: dict[LayerKey, LayerPlacement] = {}
        before: dict[LayerKey, float] = {}
        after: dict[LayerKey, float] = {}
        drops: list[tuple[ExpertKey, str]] = []
        use_H = np.zeros(len(self.hosts))
        # Light layers come last: they use hosts that the others leave idle.
        for key, search in sorted(self.searches.items(), key=lambda one: one[1].is_light):
            flow_EH = consolidate(
                even_split(search.held_EH, search.load_E, self.speed_H),
                search.held_EH,
                self.speed_H,
                search.least,
                use_H,
            )
            load_H = flow_EH.sum(axis=0)
            use_H += load_H / self.speed_H
            before[key] = balancedness(self.load_before_H[key], self.speed_H, search.least)
            after[key] = balancedness(load_H, self.speed_H, search.least)
            share_EH = shares(flow_EH, search.held_EH, self.speed_H)
            # Routers level calls to these parts; a gathered layer must stay on its few hosts.
            load_share_H = load_H if search.is_light and load_H.any() else self.speed_H
            layers[key] = self._layer(
                key, search.held_EH, share_EH, load_share_H / load_share_H.sum()
            )
            drops += [
                (key.expert(int(expert)), self.names[host])
                for expert, host in np.argwhere(self.current_EH[key] & ~search.held_EH)
            ]
        unprotected = self.unprotected()
        return Plan(
            layers=layers,
            moves=self._net_moves(),
            drops=tuple(drops),
            before=before,
            after=after,
            unplaced=tuple(self.unplaced),
            unprotected=tuple(key.expert(expert) for key, expert in unprotected),
            lacking_bytes=sum(self.searches[key].expert_bytes for key, _ in unprotected),
        )

    def _net_moves(self) -> tuple[Move, ...]:
        """Return the moves whose replicas are new and were not dropped again by a later step."""
        last = {(move.key, move.host): move for move in self.moves}
        found = []
        for (key, host), move in last.items():
            layer, where = LayerKey(key.model, key.layer), (key.expert, self.index[host])
            if self.searches[layer].held_EH[where] and not self.current_EH[layer][where]:
                found.append(move)
        return tuple(found)

    def _layer(
        self, key: LayerKey, held_EH: np.ndarray, share_EH: np.ndarray, load_share_H: np.ndarray
    ) -> LayerPlacement:
        """Make a layer's placement, the preferred replica of each expert first.

        The preferred replica has the largest share. Among equal shares it rotates with expert and
        layer, because small calls use only preferred replicas and must load all hosts alike.
        """
        count = len(self.names)
        replicas = []
        for expert in range(len(held_EH)):
            hosts = sorted(
                (int(h) for h in np.flatnonzero(held_EH[expert])),
                key=lambda h: (
                    -round(float(share_EH[expert, h]), 2),
                    (h - expert - key.layer) % count,
                ),
            )
            replicas.append(
                tuple(Replica(self.names[h], float(share_EH[expert, h])) for h in hosts)
            )
        parts = tuple(zip(self.names, load_share_H.tolist(), strict=True))
        return LayerPlacement(tuple(replicas), parts)
