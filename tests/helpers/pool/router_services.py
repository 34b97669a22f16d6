"""Router services over hosts in the test's own process, and clients that see nothing else of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import torch
from torch import Tensor

from moesaic import RouterClient
from moesaic.actors.router.router import Router
from moesaic.actors.router_service.catalog import Catalog
from moesaic.actors.router_service.service import RouterService, ServicePolicy
from moesaic.actors.transport.grpc.interceptors import show_key
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.kernels.ffn import ExpertForm
from moesaic.proto.router_pb2 import ComputeHead
from tests.helpers.pool.serving import LAYER, PATIENT, Hosts, assert_right, inputs, serving
from tests.helpers.pool.transports import settles

KEY = "a-key-of-the-tests"
Inputs = tuple[Tensor, Tensor, Tensor]


@dataclass
class Served:
    pool: Hosts
    router: Router
    service: RouterService
    stack: ExitStack = field(repr=False)

    @property
    def target(self) -> str:
        return f"moesaic://{self.service.address}"

    def client(self, *, timeout_s: float = 30.0, retries: int = 0) -> RouterClient:
        """On a connection of its own."""
        client = RouterClient(self.target, key=KEY, timeout_s=timeout_s, retries=retries)
        return self.stack.enter_context(client)

    def channel(self) -> grpc.Channel:
        """For stubs of the test's own, with the key."""
        return show_key(grpc.insecure_channel(self.service.address), KEY)

    def ask(self, client: RouterClient, given: Inputs, layer: int = LAYER) -> Tensor:
        return client.experts("m", layer)(*given)

    def answers(self, client: RouterClient, given: Inputs) -> None:
        assert_right(self.ask(client, given), self.pool.answer(*given))

    def goes_on(self) -> None:
        """It answers, and holds nothing."""
        self.answers(self.client(), inputs(5))
        assert settles(lambda: self.held_calls == 0)
        assert self.service.report().held_bytes == 0

    @property
    def held_calls(self) -> int:
        return self.service.report().held_calls

    def holds(self, calls: int) -> bool:
        """Whether so many calls come to be held, with all their tensors."""
        merger = self.service._calls._queue

        def here() -> bool:
            held = list(merger._calls.values())
            return len(held) == calls and all(call.phase.value != "arriving" for call in held)

        return settles(here)


@contextmanager
def router_service(
    folder: Path,
    *,
    hosts: int = 2,
    replicas: int = 1,
    exact: bool = False,
    routing: RouterPolicy = PATIENT,
    policy: ServicePolicy | None = None,
    lends: bool = False,
) -> Iterator[Served]:
    """With ``lends`` hosts lend, and the service computes what it knows the arithmetic of."""
    forms: dict[LayerKey, ExpertForm] = {}
    with ExitStack() as stack:
        pool = stack.enter_context(
            serving(folder, hosts=hosts, replicas=replicas, exact=exact, lends=lends)
        )
        router = pool.router(policy=routing, forms=forms if lends else None)
        catalog = Catalog(lambda: [(pool.ref, pool.shape)], forms=forms)
        service = RouterService(router, catalog, key=KEY, policy=policy)
        stack.callback(service.close)
        yield Served(pool, router, service, stack)


def data_of(given: Inputs) -> bytes:
    """The tensors of a call as they are sent."""
    x, ids, weights = given
    parts = ids.int(), weights.float(), x
    return b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)


def head_of(given: Inputs, **changes: Any) -> ComputeHead:
    """Their head, with some fields changed."""
    x, ids, _ = given
    fields: dict[str, Any] = {
        "model": "m",
        "layer": LAYER,
        "rows": x.shape[0],
        "hidden": x.shape[1],
        "top_k": ids.shape[1],
        "dtype": "FLOAT32",
        "crc32": zlib.crc32(data_of(given)),
    }
    return ComputeHead(**{**fields, **changes})
