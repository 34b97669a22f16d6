"""Placements: which hosts hold which experts, and what share of its tokens each replica gets.

A placement is immutable and numbered by (term, epoch). It also says how to reach each host, so
that a router needs nothing else; a host that restarts appears as a new incarnation in a new epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Entries of the table that turns shares into choices: shares are kept to within 1 / 64.
SHARE_STEPS = 64


class ExpertKey(NamedTuple):
    model: str
    layer: int
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer} of {self.model}"


class LayerKey(NamedTuple):
    model: str
    layer: int

    def expert(self, expert: int) -> ExpertKey:
        return ExpertKey(self.model, self.layer, expert)


class Number(NamedTuple):
    """Placement number: a new controller claims a higher term, each publication a higher epoch."""

    term: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """One start of one host and how to reach it."""

    host: str
    incarnation: int
    node: str  # hosts and routers on one node share memory
    shm_address: str  # abstract Unix socket
    grpc_address: str  # host:port


class Replica(NamedTuple):
    host: str
    share: float


@dataclass(frozen=True)
class LayerPlacement:
    """One layer: for each expert its replicas, the preferred one first."""

    replicas: tuple[tuple[Replica, ...], ...]

    def hosts(self, expert: int) -> tuple[str, ...]:
        return tuple(replica.host for replica in self.replicas[expert])

    def without(self, expert: int, host: str, *, otherwise: Sequence[str]) -> LayerPlacement:
        """The same without one replica; the others take its share, and if there is none, those
        ``otherwise``."""
        kept = [r for r in self.replicas[expert] if r.host != host]
        names = [r.host for r in kept] or otherwise
        total = sum(r.share for r in kept)
        shares = [r.share / total for r in kept] if total > 0 else [1 / len(names)] * len(names)
        replicas = list(self.replicas)
        replicas[expert] = tuple(map(Replica, names, shares))
        return LayerPlacement(tuple(replicas))


@dataclass(frozen=True)
class Placement:
    number: Number
    hosts: Mapping[str, HostEntry]
    layers: Mapping[LayerKey, LayerPlacement]
    # Models whose calls answer one row for each choice, summed in the order of the choices.
    exact: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for key, layer in self.layers.items():
            for expert, replicas in enumerate(layer.replicas):
                names = [replica.host for replica in replicas]
                if len(set(names)) != len(names):
                    raise ValueError(f"{key.expert(expert)} stands twice on one host: {names}")

    @cached_property
    def host_order(self) -> tuple[str, ...]:
        return tuple(
            sorted({r.host for lp in self.layers.values() for e in lp.replicas for r in e})
        )

    @cached_property
    def host_index(self) -> dict[str, int]:
        return {host: i for i, host in enumerate(self.host_order)}

    @cached_property
    def tables(self) -> dict[LayerKey, np.ndarray]:
        """For each layer (E, SHARE_STEPS) int16: the host's index for each step of the shares."""
        return {
            key: np.stack([self._steps(replicas) for replicas in layer.replicas])
            for key, layer in self.layers.items()
        }

    @cached_property
    def holders(self) -> dict[LayerKey, np.ndarray]:
        """For each layer (E, hosts) bool: who holds what."""
        found: dict[LayerKey, np.ndarray] = {}
        for key, layer in self.layers.items():
            held = np.zeros((len(layer.replicas), len(self.host_order)), dtype=bool)
            for expert, replicas in enumerate(layer.replicas):
                for replica in replicas:
                    held[expert, self.host_index[replica.host]] = True
            found[key] = held
        return found

    def _steps(self, replicas: Sequence[Replica]) -> np.ndarray:
        """Smooth weighted round robin: any run of steps has nearly the shares of the whole."""
        if not replicas:
            return np.full(SHARE_STEPS, -1, dtype=np.int16)
        shares = np.array([max(replica.share, 0.0) for replica in replicas])
        shares = (
            shares / shares.sum() if shares.sum() > 0 else np.full(len(shares), 1 / len(shares))
        )
        credit = np.zeros(len(replicas))
        steps = np.empty(SHARE_STEPS, dtype=np.int16)
        for step in range(SHARE_STEPS):
            credit += shares
            winner = int(np.argmax(credit))
            credit[winner] -= 1.0
            steps[step] = self.host_index[replicas[winner].host]
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What placing a model needs to know of it."""

    model: str
    experts: Mapping[int, int]  # layer -> number of experts
    replicas: int = 1
    exact: bool = False
    expert_bytes: int = 0  # memory of one expert on a host
    idle_s: float | None = None  # it falls asleep when nobody asks for it for so long; None: never


def spread(models: Iterable[ModelShape], hosts: Sequence[str]) -> dict[LayerKey, LayerPlacement]:
    """The first placement: experts dealt out evenly, replicas on neighbouring hosts, even shares.

    The preferred replica rotates with the expert's number and the layer's, so that small calls,
    which take preferred replicas alone, load all hosts alike.

    Raises ValueError when a model wants more replicas than there are hosts.
    """
    layers: dict[LayerKey, LayerPlacement] = {}
    for shape in models:
        if not 1 <= shape.replicas <= len(hosts):
            raise ValueError(
                f"models.{shape.model}.replicas: {shape.replicas} replicas of an expert need as "
                f"many hosts, and there are {len(hosts)}"
            )
        for layer, experts in shape.experts.items():
            dealt = []
            for expert in range(experts):
                start = expert + layer
                stand = [hosts[(start + r) % len(hosts)] for r in range(shape.replicas)]
                dealt.append(tuple(Replica(host, 1 / shape.replicas) for host in stand))
            layers[LayerKey(shape.model, layer)] = LayerPlacement(tuple(dealt))
    return layers


def every_expert(models: Iterable[ModelShape]) -> Iterator[ExpertKey]:
    for shape in models:
        for layer, experts in shape.experts.items():
            for expert in range(experts):
                yield ExpertKey(shape.model, layer, expert)


def experts_of(layers: Mapping[LayerKey, LayerPlacement], host: str) -> list[ExpertKey]:
    """What ``host`` holds, layer by layer."""
    return [
        key.expert(expert)
        for key, layer in sorted(layers.items())
        for expert in range(len(layer.replicas))
        if host in layer.hosts(expert)
    ]
