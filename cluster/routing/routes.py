"""A placement as arrays for a router; those of a layer are made when it is first used.

Shape suffixes: E = experts of a layer, H = hosts of the placement by name, S = SHARE_STEPS,
R = replicas of the expert that has the most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..expert_keys import LayerKey
from ..placement import LayerPlacement, Placement

# Length of the round robin of one expert's replicas: shares are exact to within 1 / 64.
SHARE_STEPS = 64


@dataclass(frozen=True)
class LayerRoutes:
    """The replicas of one layer as arrays."""

    table_ES: np.ndarray  # int16: the host at each step of an expert's round robin, -1: no replica
    held_EH: np.ndarray  # bool: the host has a replica of the expert
    load_share_H: (
        np.ndarray
    )  # planned part of the layer's load on each host; all 0: only shares count

    @cached_property
    def by_step(self) -> np.ndarray:
        """Return ``table_ES`` as (S, E): each step lies together."""
        return np.ascontiguousarray(self.table_ES.T)

    @cached_property
    def has_load_shares(self) -> bool:
        return bool(self.load_share_H.any())

    @cached_property
    def movable(self) -> list[list[tuple[int, list[int]]]]:
        """For each host, its experts that other hosts hold too, each with those hosts."""
        found: list[list[tuple[int, list[int]]]] = [[] for _ in self.load_share_H]
        for expert in np.flatnonzero(self.held_EH.sum(axis=1) > 1).tolist():
            hosts = np.flatnonzero(self.held_EH[expert]).tolist()
            for host in hosts:
                found[host].append((expert, [other for other in hosts if other != host]))
        return found


class Routes:
    def __init__(self, placement: Placement) -> None:
        layers = placement.layers.values()
        self.hosts = sorted({r.host for layer in layers for e in layer.replicas for r in e})
        self.index = {host: i for i, host in enumerate(self.hosts)}
        self._placement = placement
        self._layers: dict[LayerKey, LayerRoutes] = {}

    def layer(self, key: LayerKey) -> LayerRoutes:
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = self._make(self._placement.layers[key])
        return found

    def _make(self, layer: LayerPlacement) -> LayerRoutes:
        held_EH = np.zeros((len(layer.replicas), len(self.hosts)), dtype=bool)
        most = max((len(replicas) for replicas in layer.replicas), default=0)
        host_ER = np.full((len(layer.replicas), max(most, 1)), -1, dtype=np.int16)
        share_ER = np.zeros(host_ER.shape)
        for expert, replicas in enumerate(layer.replicas):
            for place, (host, share) in enumerate(replicas):
                held_EH[expert, self.index[host]] = True
                host_ER[expert, place] = self.index[host]
                share_ER[expert, place] = max(share, 0.0)
        load_share_H = np.zeros(len(self.hosts))
        for host, part in layer.load_shares:
            if host in self.index:
                load_share_H[self.index[host]] = part
        return LayerRoutes(_turns(host_ER, share_ER), held_EH, load_share_H)


def _turns(host_ER: np.ndarray, share_ER: np.ndarray) -> np.ndarray:
    """Return the hosts (E, S) of a smooth weighted round robin over each expert's replicas.

    Any run of steps has nearly the shares of the whole. An expert without shares gets even ones.
    """
    # Each step adds every replica's share to its credit; the replica with the most credit gets the
    # step and pays 1 for it. Shares sum to 1, so that credits stay near 0 (the algorithm of nginx).
    there_ER = host_ER >= 0
    none_E = share_ER.sum(axis=1) == 0
    share_ER = np.where(none_E[:, None], there_ER, share_ER)
    total_E = share_ER.sum(axis=1)
    share_ER = share_ER / np.where(total_E > 0, total_E, 1.0)[:, None]
    experts = np.arange(len(host_ER))
    credit_ER = np.where(there_ER, 0.0, -np.inf)
    table_ES = np.empty((len(host_ER), SHARE_STEPS), dtype=np.int16)
    for step in range(SHARE_STEPS):
        credit_ER += share_ER
        winner_E = np.argmax(credit_ER, axis=1)
        credit_ER[experts, winner_E] -= 1.0
        table_ES[:, step] = host_ER[experts, winner_E]
    return table_ES
