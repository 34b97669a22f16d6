"""Placements: which hosts hold which experts, and what share of its tokens each replica gets.

A placement is immutable and numbered by (term, epoch). It contains the addresses of the hosts, so
that a router needs nothing else. A host that restarts gets a new incarnation in a new epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..proto.keys import target
from .expert_keys import ExpertKey, LayerKey
from .versions import WeightVersions


class PlacementId(NamedTuple):
    """A placement's number: each controller claims a higher term, each publication an epoch."""

    term: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEntry:
    """One incarnation of a host and its addresses."""

    host: str
    incarnation: int
    node: str  # hosts and routers on one node share memory
    shm_address: str  # abstract Unix socket
    grpc_address: str  # host:port
    device: str = "cpu"  # "cpu" or the UUID of its GPU
    numa: int | None = None  # the NUMA node that its process is pinned to, if it is to one
    bulk_address: str = ""  # abstract Unix socket for tensors of a training run; empty: only gRPC

    @property
    def target(self) -> str:
        """The host's identity in proofs of the cluster's secret, so that none fits another host."""
        return target(self.host, self.incarnation)


class Replica(NamedTuple):
    host: str
    share: float


@dataclass(frozen=True)
class LayerPlacement:
    """The replicas of each expert of one layer, the preferred replica first."""

    replicas: tuple[tuple[Replica, ...], ...]
    # (host, its planned part of the layer's load): routers aim at these parts in every large call.
    # Empty: only the shares decide.
    load_shares: tuple[tuple[str, float], ...] = ()

    def hosts(self, expert: int) -> tuple[str, ...]:
        return tuple(replica.host for replica in self.replicas[expert])

    def without(self, expert: int, host: str, *, otherwise: Sequence[str]) -> LayerPlacement:
        """Return this layer without one replica, whose share the expert's other replicas take.

        If there is no other replica, the hosts ``otherwise`` get replicas with even shares.
        """
        kept = [r for r in self.replicas[expert] if r.host != host]
        names = [r.host for r in kept] or otherwise
        total = sum(r.share for r in kept)
        shares = [r.share / total for r in kept] if total > 0 else [1 / len(names)] * len(names)
        replicas = list(self.replicas)
        replicas[expert] = tuple(map(Replica, names, shares))
        return LayerPlacement(tuple(replicas), self.load_shares)


@dataclass(frozen=True)
class Placement:
    id: PlacementId
    hosts: Mapping[str, HostEntry]
    layers: Mapping[LayerKey, LayerPlacement]
    # Exact models: hosts answer one row per assignment, and routers add them in a fixed order.
    exact: frozenset[str] = field(default_factory=frozenset)
    versions: WeightVersions = field(default_factory=WeightVersions)

    def __post_init__(self) -> None:
        for key, layer in self.layers.items():
            for expert, replicas in enumerate(layer.replicas):
                names = [replica.host for replica in replicas]
                if len(set(names)) != len(names):
                    raise ValueError(f"{key.expert(expert)} has two replicas on one host: {names}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionChange:
    """A placement that differs from an earlier one in the versions of weights alone.

    So what routers are told after a training step does not grow with the model. It has only the
    experts that were updated one by one since their model's last step.
    """

    since: PlacementId  # it applies to this placement and to later ones
    id: PlacementId
    versions: WeightVersions

    def applied_to(self, placement: Placement) -> Placement:
        """Return the new placement. Raises ValueError for one that it does not apply to."""
        if not self.since <= placement.id < self.id:
            raise ValueError(
                f"placement {tuple(self.id)} says what has changed since {tuple(self.since)}, "
                f"and not since {tuple(placement.id)}"
            )
        return replace(placement, id=self.id, versions=self.versions)


# What the controller answers to a router's report.
PlacementNews = Placement | VersionChange


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The properties of a model that placing its experts depends on."""

    model: str
    experts: Mapping[int, int]  # layer -> number of experts
    replicas: int = 1
    exact: bool = False
    expert_bytes: int = 0  # memory of one expert on a host
    idle_s: float | None = None  # seconds without a request until it falls asleep; None: never
    experts_per_token: int | None = None  # that its gates choose; None: unknown


def initial_placement(
    models: Iterable[ModelShape], hosts: Sequence[str]
) -> dict[LayerKey, LayerPlacement]:
    """Return a first placement: experts dealt out evenly, replicas on the next hosts, even shares.

    Expert e of layer l has its preferred replica on host (e + l) mod H, and further replicas on the
    hosts after it. So the preferred replicas of each layer are spread over all hosts.

    Raises ValueError when a model wants more replicas than there are hosts.
    """
    layers: dict[LayerKey, LayerPlacement] = {}
    for shape in models:
        if not 1 <= shape.replicas <= len(hosts):
            raise ValueError(
                f"models.{shape.model}.replicas: {shape.replicas} replicas of an expert need as "
                f"many hosts, but there are only {len(hosts)}; lower replicas, or add hosts"
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
    """Return the experts that ``host`` holds, layer by layer."""
    return [
        key.expert(expert)
        for key, layer in sorted(layers.items())
        for expert in range(len(layer.replicas))
        if host in layer.hosts(expert)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as hosts load it.

    It is a folder of safetensors, or a configuration whose weights arrive on the weights channel.
    """

    name: str
    dtype: str
    path: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    updates: str | None = None  # the folder with later versions of experts (`UpdateFolder`)
    learns: bool = False  # its experts are trained
