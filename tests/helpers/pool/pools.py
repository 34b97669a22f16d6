"""Pools in the test's own process: real hosts, real transports, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.actors.host.host import ExpertHost, local_hosts
from moesaic.actors.router.router import Router
from moesaic.actors.trunk.trunk import run_in_steps
from moesaic.cluster.expert_keys import FIRST_VERSION, ExpertKey, LayerKey, first_versions
from moesaic.cluster.placement import (
    ModelRef,
    ModelShape,
    Placement,
    PlacementId,
    experts_of,
    initial_placement,
)
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.slabs.layer_arithmetic import CpuLayer
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import ExpertsLayer, experts_layers
from moesaic.models.trunk.trunk import connect_experts, forward_modules, load_trunk, meta_model
from moesaic.proto.keys import Grant, secret_of_process


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A model served from hosts, and the trunk and router that use them."""

    hosts: list[ExpertHost]
    router: Router
    trunk: Any  # a PreTrainedModel, whose `generate` checkers cannot bind
    placement: Placement
    layers: list[ExpertsLayer]


def place(
    layers: list[ExpertsLayer],
    hosts: list[ExpertHost],
    ref: ModelRef,
    *,
    replicas: int = 1,
    exact: bool = False,
    epoch: int = 1,
) -> Placement:
    """Load every host's share of a model."""
    shape = ModelShape(
        model=ref.name,
        experts={layer.layer: layer.num_experts for layer in layers},
        replicas=replicas,
        exact=exact,
    )
    spreading = initial_placement([shape], [host.name for host in hosts])
    for host in hosts:
        host.load([(ref, shape)], first_versions(experts_of(spreading, host.name)))
    return Placement(
        PlacementId(1, epoch),
        {host.name: host.entry() for host in hosts},
        spreading,
        frozenset({ref.name}) if exact else frozenset(),
    )


def granted(host: ExpertHost, key: ExpertKey, *, version: int = 1, term: int = 0) -> Grant:
    """What the controller of these hosts would give whoever is to put an expert."""
    proof = secret_of_process().grant(host.name, host.incarnation, key, version, term)
    return Grant(term, proof)


@contextmanager
def pool(
    path: Path,
    *,
    hosts: int = 2,
    replicas: int = 1,
    exact: bool = False,
    transport: TransportChoice = "shm",
    dtype: torch.dtype = torch.float32,
    policy: RouterPolicy | None = None,
) -> Iterator[Pool]:
    layers = experts_layers(meta_model(read_config(path)))
    ref = ModelRef(name="m", dtype=str(dtype).removeprefix("torch."), path=str(path))
    with local_hosts(hosts, transport=transport) as running:
        placement = place(layers, running, ref, replicas=replicas, exact=exact)
        router = Router(name="test", node="here", transport=transport, policy=policy)
        try:
            router.place(placement)
            router.wait_ready(10.0)
            trunk = load_trunk(path, dtype=dtype, device=torch.device("cpu"))
            connect_experts(trunk, layers, lambda layer: router.experts("m", layer))
            for module in forward_modules(trunk):
                run_in_steps(module, router)
            yield Pool(
                hosts=running, router=router, trunk=trunk, placement=placement, layers=layers
            )
        finally:
            router.close()


def experts_in(host: ExpertHost, key: LayerKey) -> dict[int, ExpertWeights]:
    """The experts of a layer as a host on a CPU computes with them; what is put here is used."""
    layer = host._store.layer(key, FIRST_VERSION, {})
    assert isinstance(layer, CpuLayer)
    assert isinstance(layer.experts, dict)
    return layer.experts
