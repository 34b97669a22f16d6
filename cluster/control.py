"""The controller's state machine: what hosts report goes in, loads and placements come out.

It decides by what hosts really hold, never by what it asked for, so a controller that starts anew
picks up where the last one ended. A placement names only replicas that are ready.

No clock, no Ray: `actors/controller.py` brings those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .placement import (
    ExpertKey,
    HostEntry,
    LayerKey,
    LayerPlacement,
    ModelShape,
    Number,
    Placement,
    Replica,
    experts_of,
    spread,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One host as it reported: one incarnation and the experts it can compute."""

    entry: HostEntry
    holdings: Mapping[LayerKey, Collection[int]]
    loading: bool

    def holds(self, key: ExpertKey) -> bool:
        return key.expert in self.holdings.get(LayerKey(key.model, key.layer), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Let ``host`` get ``keys``: from a checkpoint, or from the peers that are named."""

    host: str
    keys: tuple[ExpertKey, ...]
    peers: Mapping[ExpertKey, str]  # gRPC addresses; keys without one are read from disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    placement: Placement


Command = Load | Publish


class Control:
    """The one writer of placements."""

    def __init__(self, hosts: Sequence[str], *, term: int) -> None:
        self.number = Number(term, 0)
        self.placement: Placement | None = None
        self._hosts = tuple(hosts)
        self._models: dict[str, ModelShape] = {}
        self._on_disk: set[str] = set()
        self._wanted: dict[LayerKey, LayerPlacement] = {}
        self._seen: dict[str, Observation] = {}

    def add_model(self, shape: ModelShape, *, on_disk: bool) -> None:
        """Serve a model from now on. Raises ValueError when it cannot be placed."""
        models = {**self._models, shape.model: shape}
        self._wanted = spread(models.values(), self._hosts)
        self._models = models
        if on_disk:
            self._on_disk.add(shape.model)

    def wanted(self, host: str) -> list[ExpertKey]:
        return experts_of(self._wanted, host)

    def tick(self, reports: Mapping[str, Observation | None]) -> list[Command]:
        """One round. A host that is missing from ``reports`` did not answer in time and is left
        as it was, routers see for themselves; None stands for a host that Ray says is gone."""
        # Step 1: take note of who lives.
        for host, observation in reports.items():
            if observation is None:
                self._seen.pop(host, None)
            else:
                self._seen[host] = observation
        # Step 2: let hosts get what they lack.
        commands: list[Command] = []
        for host in self._hosts:
            observation = self._seen.get(host)
            if host in reports and observation is not None and not observation.loading:
                commands += self._loads(host, observation)
        # Step 3: publish what is ready, if it is not what was published last.
        placement = self._ready_placement()
        if placement is not None:
            self.number, self.placement = placement.number, placement
            commands.append(Publish(placement=placement))
        return commands

    def missing(self) -> dict[ExpertKey, str]:
        """Experts that no host holds now, and why."""
        found = {}
        for key, layer in self._wanted.items():
            for expert in range(len(layer.replicas)):
                expert_key = key.expert(expert)
                if not self._holders(expert_key):
                    on_disk = key.model in self._on_disk
                    found[expert_key] = "loading" if on_disk else "lost: its model was in memory"
        return found

    def unprotected(self) -> list[ExpertKey]:
        """Experts that the loss of one host would take away."""
        return [
            key.expert(expert)
            for key, layer in self._wanted.items()
            for expert in range(len(layer.replicas))
            if len(self._holders(key.expert(expert))) == 1
        ]

    # ---- steps ----------------------------------------------------------------------------------

    def _holders(self, key: ExpertKey) -> list[str]:
        return [host for host, seen in self._seen.items() if seen.holds(key)]

    def _loads(self, host: str, observation: Observation) -> list[Command]:
        keys, peers = [], {}
        for key in self.wanted(host):
            if observation.holds(key):
                continue
            if key.model in self._on_disk:
                keys.append(key)
                continue
            holders = self._holders(key)
            if holders:
                keys.append(key)
                peers[key] = self._seen[holders[0]].entry.grpc_address
        return [Load(host=host, keys=tuple(keys), peers=peers)] if keys else []

    def _ready_placement(self) -> Placement | None:
        layers = {}
        for key, wanted in self._wanted.items():
            ready = [
                tuple(r for r in replicas if self._holds(r, key.expert(expert)))
                for expert, replicas in enumerate(wanted.replicas)
            ]
            # A model appears when it is whole; later, experts may be away for a while.
            published = self.placement is not None and key in self.placement.layers
            if published or self._whole(key.model):
                layers[key] = LayerPlacement(tuple(ready))
        hosts = {host: seen.entry for host, seen in self._seen.items()}
        exact = frozenset(model for model, shape in self._models.items() if shape.exact)
        last = self.placement
        if last is not None and (last.hosts, last.layers, last.exact) == (hosts, layers, exact):
            return None
        if not layers:
            return None
        number = Number(self.number.term, self.number.epoch + 1)
        return Placement(number=number, hosts=hosts, layers=layers, exact=exact)

    def _holds(self, replica: Replica, key: ExpertKey) -> bool:
        seen = self._seen.get(replica.host)
        return seen is not None and seen.holds(key)

    def _whole(self, model: str) -> bool:
        return all(
            self._holds(replica, key.expert(expert))
            for key, layer in self._wanted.items()
            if key.model == model
            for expert, replicas in enumerate(layer.replicas)
            for replica in replicas
        )
