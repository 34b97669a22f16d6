"""Placements: which hosts hold which experts, and what share of its tokens each replica gets.

A placement is immutable and numbered by (term, epoch). It also says how to reach each host, so
that a router needs nothing else; a host that restarts appears as a new incarnation in a new epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..proto.keys import target

# In the place of an expert's number: the tensors that all experts of a layer share.
SHARED = (1 << 32) - 1


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
    device: str = "cpu"  # or the UUID of its GPU

    @property
    def target(self) -> str:
        """Who is meant by a proof for it."""
        return target(self.host, self.incarnation)


class Replica(NamedTuple):
    host: str
    share: float


@dataclass(frozen=True)
class LayerPlacement:
    """One layer: for each expert its replicas, the preferred one first."""

    replicas: tuple[tuple[Replica, ...], ...]
    # Hosts and the part of the layer's load that each is to have, in every call that is large
    # enough; empty: the shares alone decide.
    parts: tuple[tuple[str, float], ...] = ()

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
        return LayerPlacement(tuple(replicas), self.parts)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as hosts need to know it: a folder of safetensors, or a configuration whose weights
    are put through the weights channel."""

    name: str
    dtype: str
    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
