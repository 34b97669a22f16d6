"""The target: the placement that the controller moves the pool to."""

from __future__ import annotations

from collections.abc import Sequence

from ..expert_keys import ExpertKey, LayerKey
from ..placement import LayerPlacement, experts_of


class Target:
    """The layers of a plan, and what each host is to hold according to them."""

    def __init__(self) -> None:
        # None before the first plan.
        self.layers: dict[LayerKey, LayerPlacement] | None = None
        # Experts for which no host had room in the last plan.
        self.unplaced: tuple[ExpertKey, ...] = ()
        self.version = 0
        self._wanted: dict[str, list[ExpertKey]] = {}

    def set_layers(self, layers: dict[LayerKey, LayerPlacement]) -> None:
        """Replace the layers."""
        self.layers = layers
        self.version += 1
        self._wanted.clear()

    def wanted(self, host: str) -> list[ExpertKey]:
        """Return the experts that the target places on a host."""
        if host not in self._wanted:
            self._wanted[host] = experts_of(self.layers or {}, host)
        return self._wanted[host]

    def replicas(self) -> int:
        """Return how many replicas the target has."""
        return sum(len(r) for layer in (self.layers or {}).values() for r in layer.replicas)

    def give_up(self, key: ExpertKey, host: str, holders: Sequence[str]) -> None:
        """Take a replica that cannot be loaded out of the target.

        If it is the expert's only replica there, the present ``holders`` take its place.
        """
        layer_key = LayerKey(key.model, key.layer)
        layer = (self.layers or {}).get(layer_key)
        if self.layers is None or layer is None or host not in layer.hosts(key.expert):
            return
        left = layer.without(key.expert, host, otherwise=holders)
        self.set_layers({**self.layers, layer_key: left})
