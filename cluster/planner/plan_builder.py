"""A plan in the making: what stands where, what is free, what has been decided so far.

Shapes: E experts of one layer, H hosts, R experts that a domain holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, Replica
from .balance import balancedness, even_split, shares
from .consolidation import gather, least_use
from .moves import Limits, Rooms, Step
from .plan import Move, Plan, Policy, PoolHost, Wishes
from .search import LayerSearch

UNLIMITED = np.iinfo(np.int64).max // 4


def _known(loads: Mapping[LayerKey, np.ndarray], key: LayerKey) -> np.ndarray | None:
    """(E,) float; None for a layer that has no load yet."""
    load_E = loads.get(key)
    return None if load_E is None or not load_E.any() else load_E.astype(float)


class Draft:
    def __init__(
        self,
        models: Sequence[ModelShape],
        hosts: Sequence[PoolHost],
        current: Mapping[LayerKey, LayerPlacement],
        loads: Mapping[LayerKey, np.ndarray],
        policy: Policy,
        wishes: Wishes,
    ) -> None:
        self.hosts = [host for host in hosts if host.name not in wishes.leaving]
        if not self.hosts:
            raise ValueError("hosts: there is none to place experts on")
        self.names = [host.name for host in self.hosts]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.speed_H = np.array([host.speed for host in self.hosts], dtype=float)
        self.current = current
        self.policy = policy
        self.wishes = wishes
        self.rooms = Rooms(
            np.array([UNLIMITED if h.slots is None else h.slots for h in self.hosts]),
            np.array([UNLIMITED if h.memory_bytes is None else h.memory_bytes for h in self.hosts]),
        )
        domains = {d: i for i, d in enumerate(sorted({h.domain or h.name for h in self.hosts}))}
        self.domain_H = np.array([domains[h.domain or h.name] for h in self.hosts])
        keys = [LayerKey(shape.model, layer) for shape in models for layer in shape.experts]
        known = [load_E for key in keys if (load_E := _known(loads, key)) is not None]
        self.least_use = least_use(known, self.speed_H, policy.fan_out)
        self.searches: dict[LayerKey, LayerSearch] = {}
        self.load_before_H = {}
        for shape in models:
            for layer, experts in sorted(shape.experts.items()):
                self._add_layer(shape, LayerKey(shape.model, layer), experts, loads)
        # Each layer's part of the slots of a host.
        free_H = self.rooms.slots_H + sum(s.held_EH.sum(axis=0) for s in self.searches.values())
        self.quota_H = np.ceil(free_H / max(len(self.searches), 1))
        # What stood, on hosts that are left.
        self.stood = {key: search.held_EH.copy() for key, search in self.searches.items()}
        # By layers with much and with little load: what is even among the former after they were
        # balanced says nothing of the latter.
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
        # Nobody knows how much a layer without load will have: it is spread over all hosts.
        known = _known(loads, key)
        load_E = np.ones(experts) if known is None else known
        for expert, replicas in enumerate(self.current.get(key, LayerPlacement(())).replicas):
            for host, share in replicas:
                if host in self.index:
                    held_EH[expert, self.index[host]] = True
                    before_H[self.index[host]] += load_E[expert] * share
        least_E = np.full(experts, max(1, shape.replicas))
        pinned_EH = np.zeros_like(held_EH)
        for expert in range(experts):
            expert_key = key.expert(expert)
            least_E[expert] = max(least_E[expert], self.wishes.least.get(expert_key, 1))
            for host in self.wishes.pins.get(expert_key, ()):
                if host in self.index:
                    pinned_EH[expert, self.index[host]] = True
        counts = held_EH.sum(axis=0)
        self.rooms.slots_H -= counts
        self.rooms.bytes_H -= counts * shape.expert_bytes
        self.load_before_H[key] = before_H
        self.searches[key] = LayerSearch(
            held_EH,
            load_E,
            self.speed_H,
            rooms=self.rooms,
            expert_bytes=shape.expert_bytes,
            limits=Limits(
                domain_H=self.domain_H,
                domains=self.policy.redundancy + 1,
                least_E=np.minimum(least_E, len(self.hosts)),
                pinned_EH=pinned_EH,
            ),
            least=0.0 if known is None else self.least_use,
        )

    def add(
        self,
        key: LayerKey,
        expert: int,
        kind: str,
        reason: str,
        *,
        among_H: np.ndarray | None = None,
    ) -> bool:
        """Put a replica on the host with the least load of those with room; False without one."""
        search = self.searches[key]
        able_H = ~search.held_EH[expert] & (True if among_H is None else among_H)
        fits_H = self.rooms.fits(search.expert_bytes) & able_H
        bare = not search.held_EH[expert].any()
        drops: tuple[tuple[LayerKey, int, int], ...] = ()
        if not fits_H.any():
            # That an expert lives counts more than that another one is protected.
            drops = self._cheapest_drop(search.expert_bytes, able_H, bare=bare)
            if not drops:
                return False
            for other, victim, host in drops:
                self.searches[other].apply(Step((), ((victim, host),)))
            fits_H = np.arange(len(self.hosts)) == drops[0][2]
        order = self._order(search, expert)
        host = int(next(h for h in order if fits_H[h]))
        replaces = tuple(other.expert(victim) for other, victim, _ in drops)
        self.note(key, Step(((expert, host),)), kind, reason, replaces)
        search.apply(Step(((expert, host),)))
        self.use_H[search.is_light][host] += search.load_E[expert] / search.held_EH[expert].sum()
        return True

    def _order(self, search: LayerSearch, expert: int) -> np.ndarray:
        """Hosts for one more replica, the best first."""
        load, bare = float(search.load_E[expert]), not search.held_EH[expert].any()
        layer_H = search.even_load()
        held_H = search.held_EH.sum(axis=0)
        # A fair part of each host first, so that layers that come later find room everywhere.
        quota_H = self.quota_H
        # Those with so little load that they stay on the hosts that they have.
        far_H = np.zeros(len(self.hosts), dtype=bool)
        if search.is_light:
            far_H = (held_H == 0) | ((layer_H + load) / self.speed_H > search.least)
            # What is gathered must leave room for what protects it.
            quota_H = np.ceil(quota_H / (self.policy.redundancy + 1)) if bare else quota_H
        return np.lexsort(
            (
                -self.rooms.slots_H,
                np.round(self.use_H[search.is_light] / self.speed_H, 9),
                np.round((layer_H + self._inherited(search, expert)) / self.speed_H, 9),
                far_H,
                held_H >= quota_H,
            )
        )

    def _inherited(self, search: LayerSearch, expert: int) -> np.ndarray:
        """(H,): the load that each host would get besides its own if a domain were lost that holds
        the expert; the largest over these domains. Replicas of what stands together are spread
        by it, so that many hosts share what one leaves behind."""
        found_H = np.zeros(len(self.hosts))
        for domain in set(self.domains(search, expert)):
            lost_H = self.domain_H == domain
            here_E = search.held_EH[:, lost_H].any(axis=1)
            held_RH, load_R = search.held_EH[here_E], search.load_E[here_E]
            now_R, left_R = held_RH.sum(axis=1), held_RH[:, ~lost_H].sum(axis=1)
            more_R = load_R * np.where(left_R > 0, 1 / np.maximum(left_R, 1) - 1 / now_R, 0.0)
            found_H = np.maximum(found_H, np.where(lost_H, 0.0, more_R @ held_RH))
        return found_H

    def _cheapest_drop(
        self, expert_bytes: int, able_H: np.ndarray, *, bare: bool
    ) -> tuple[tuple[LayerKey, int, int], ...]:
        """A spare replica, the one with the least load of all, whose slot would be enough."""
        best: tuple[float, LayerKey, int, int] | None = None
        for key, search in self.searches.items():
            if (search.expert_bytes < expert_bytes) or not able_H.any():
                continue
            droppable_EH = search.limits.droppable(search.held_EH, bare=bare) & able_H
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
        return [int(d) for d in self.domain_H[search.held_EH[expert]]]

    def unprotected(self) -> list[tuple[LayerKey, int]]:
        """Placed experts in too few domains, the rarest and hottest first."""
        need = min(self.policy.redundancy + 1, len(set(self.domain_H.tolist())))
        found = [
            (len(set(self.domains(search, expert))), -search.load_E[expert], key, expert)
            for key, search in self.searches.items()
            for expert in range(len(search.load_E))
        ]
        return [(key, expert) for count, _, key, expert in sorted(found) if 0 < count < need]

    def result(self) -> Plan:
        layers: dict[LayerKey, LayerPlacement] = {}
        before: dict[LayerKey, float] = {}
        after: dict[LayerKey, float] = {}
        drops: list[tuple[ExpertKey, str]] = []
        use_H = np.zeros(len(self.hosts))
        # Those with much load first: the others follow what these leave.
        for key, search in sorted(self.searches.items(), key=lambda one: one[1].is_light):
            flow_EH = gather(
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
            # What is gathered on few hosts stays there.
            part_H = load_H if search.is_light and load_H.any() else self.speed_H
            layers[key] = self._layer(key, search.held_EH, share_EH, part_H / part_H.sum())
            drops += [
                (key.expert(int(expert)), self.names[host])
                for expert, host in np.argwhere(self.stood[key] & ~search.held_EH)
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
        """Without replicas that were there before, or that a later step took away again."""
        last = {(move.key, move.host): move for move in self.moves}
        found = []
        for (key, host), move in last.items():
            layer, where = LayerKey(key.model, key.layer), (key.expert, self.index[host])
            if self.searches[layer].held_EH[where] and not self.stood[layer][where]:
                found.append(move)
        return tuple(found)

    def _layer(
        self, key: LayerKey, held_EH: np.ndarray, share_EH: np.ndarray, part_H: np.ndarray
    ) -> LayerPlacement:
        """The preferred replica has the largest share; among equals it rotates with expert and
        layer, so that small calls, which take preferred replicas alone, load all hosts alike."""
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
        parts = tuple(zip(self.names, part_H.tolist(), strict=True))
        return LayerPlacement(tuple(replicas), parts)
