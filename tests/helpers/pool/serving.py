"""Hosts with one tiny model in the test's own process, and what each layer should answer.

Shape suffixes: T = tokens, H = hidden size, K = choices of a token.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost, local_hosts
from moesaic.actors.host.memory.expert_memory import SlotMemory
from moesaic.actors.host.weight_store import ExpertStore, HostedModel, open_model
from moesaic.actors.router.router import Router
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.host.residency import HostLimits
from moesaic.cluster.placement import ModelRef, ModelShape, Placement, PlacementId
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.routing.transports import TransportChoice
from moesaic.kernels.ffn import ExpertForm, ExpertWeights, reference_kernel
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config, torch_dtype
from moesaic.models.trunk.experts_layers import ExpertsLayer, experts_layers
from moesaic.models.trunk.trunk import meta_model
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.slots import HostMemory
from tests.helpers.pool.pools import place

HIDDEN, EXPERTS, LAYER = 32, 8, 1
KEY = LayerKey("m", LAYER)
# Long where a test must not depend on it, short where it waits for it.
PATIENT = RouterPolicy(deadline_s=30.0, attempt_s=10.0)
HASTY = RouterPolicy(deadline_s=1.0, attempt_s=1.0)
KINDS: tuple[TransportChoice, ...] = ("shm", "grpc", "group")


def save_model(folder: Path) -> Path:
    tiny_model("mixtral").save_pretrained(folder)
    return folder


@dataclass
class Hosts:
    """Hosts with a model, and what each layer should answer."""

    hosts: list[ExpertHost]
    placement: Placement
    layers: list[ExpertsLayer]
    expected: dict[int, tuple[ExpertForm, dict[int, ExpertWeights]]]
    ref: ModelRef
    shape: ModelShape
    stack: ExitStack = field(repr=False)
    device: str = "cpu"

    def router(
        self,
        *,
        policy: RouterPolicy = PATIENT,
        transport: TransportChoice = "shm",
        placed: bool = True,
        refresh: Callable[[], None] | None = None,
        borrows: bool = False,
        forms: dict[LayerKey, ExpertForm] | None = None,
        clock: Callable[[], float] = time.monotonic,
        numa: int | None = None,
    ) -> Router:
        """With ``borrows`` it knows the arithmetic of all layers, else that in ``forms``.

        What hosts lend of a device is played by the CPU's memory.
        """
        known = {LayerKey("m", layer): form for layer, (form, _) in self.expected.items()}
        router = Router(
            name="test",
            node="here",
            policy=policy,
            transport=transport,
            refresh=refresh,
            forms=known if borrows else forms,
            clock=clock,
            numa=numa,
            device=torch.device(self.device),
            allocate=HostMemory if self.device == "cpu" else None,
        )
        self.stack.callback(router.close)
        if placed:
            router.place(self.placement)
            router.wait_ready(10.0)
        return router

    def answer(self, x_TH: Tensor, ids_TK: Tensor, w_TK: Tensor, layer: int = LAYER) -> Tensor:
        form, experts = self.expected[layer]
        out_TH = torch.empty(x_TH.shape)
        ids_TK = torch.where(ids_TK < EXPERTS, ids_TK, -1)
        reference_kernel(form, experts, x_TH, ids_TK, w_TK, out_TH)
        return out_TH

    def holders(self, expert: int) -> list[ExpertHost]:
        named = self.placement.layers[KEY].hosts(expert)
        return [host for host in self.hosts if host.name in named]

    def swap(self, one: str, other: str) -> None:
        """Place all replicas of one host on the other, and the other way round."""
        names = {one: other, other: one}
        placement, layers = self.placement, {}
        for key, layer in placement.layers.items():
            swapped = [[r._replace(host=names[r.host]) for r in own] for own in layer.replicas]
            layers[key] = replace(layer, replicas=tuple(map(tuple, swapped)))
        number = PlacementId(placement.id.term, placement.id.epoch + 1)
        self.placement = replace(placement, id=number, layers=layers)

    def refused(self) -> int:
        return sum(host.report().loop.refused for host in self.hosts)


def open_in_slots(ref: ModelRef, device: torch.device, about: Mapping[str, Any]) -> HostedModel:
    model = open_model(ref, device, about)
    model.memory.close()
    dtype = torch_dtype(ref.dtype)
    model.memory = SlotMemory(
        ref.name, model.layers, dtype, device, about, HostMemory, chunk_bytes=mmap.PAGESIZE
    )
    return model


def store_in_slots(device: torch.device, *_: object) -> ExpertStore:
    return ExpertStore(device, open_in_slots)


@contextmanager
def serving(
    folder: Path,
    *,
    hosts: int = 2,
    replicas: int = 1,
    exact: bool = False,
    limits: HostLimits | None = None,
    transport: TransportChoice = "group",
    lends: bool = False,
    on_device: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    learns: bool = False,
) -> Iterator[Hosts]:
    """Routers of the tests reach them over whichever transport they like, unless ``transport``
    says what the spec does. ``on_device``: experts lie in a device's slots; those of ``cpu`` are
    played by the CPU's memory."""
    layers = experts_layers(meta_model(read_config(folder)))
    name = str(dtype).removeprefix("torch.")
    ref = ModelRef(name="m", dtype=name, path=str(folder), learns=learns)
    checkpoint = Checkpoint(folder, read_config(folder), dtype=dtype)
    expected = {
        la.layer: (
            checkpoint.form(la.layer),
            {e: checkpoint.read(la.layer, e) for e in range(la.num_experts)},
        )
        for la in layers
    }
    with ExitStack() as stack:
        running = stack.enter_context(
            local_hosts(hosts, limits=limits, transport=transport, lends=lends, device=device)
        )
        for host in running if on_device and device == "cpu" else ():
            host._store._open_model = open_in_slots
        placement = place(layers, running, ref, replicas=replicas, exact=exact)
        shape = ModelShape(model="m", experts={la.layer: la.num_experts for la in layers})
        yield Hosts(running, placement, layers, expected, ref, shape, stack, device)


def inputs(tokens: int, top_k: int = 2, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.stack(ids),
        torch.rand(tokens, top_k, generator=generator),
    )


def assert_right(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


def sent(router: Router) -> int:
    """Calls that are on their way to hosts now."""
    return sum(len(health.occupied) for health in router._dispatcher.hosts.values())


@contextmanager
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit
