"""A host, and an honest router that asks it all the time while others do what they like."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router.router import Router
from moesaic.actors.transport.grpc import weights
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.proto.expert_pb2 import WeightsKey
from moesaic.proto.expert_pb2_grpc import WeightsStub
from tests.helpers.pool.serving import KEY, LAYER, Hosts, inputs, serving
from tests.helpers.pool.strangers import shown
from tests.helpers.pool.transports import DEADLINE_S, settles

ONE = ExpertKey("m", LAYER, 1)
FIRST = ExpertVersion(ONE, 1)


@dataclass
class Honest:
    """A host, and a router that asks it all the time over gRPC."""

    pool: Hosts
    router: Router
    given: tuple[Tensor, Tensor, Tensor] = field(default_factory=lambda: inputs(3))
    answers: int = 0
    slowest_s: float = 0.0
    failure: Exception | None = None

    @property
    def host(self) -> ExpertHost:
        (host,) = self.pool.hosts
        return host

    def run(self, stop: threading.Event) -> None:
        wanted = self.pool.answer(*self.given)
        try:
            while not stop.is_set():
                began = time.monotonic()
                answer = self.router.forward(KEY, *self.given)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)
                self.answers += 1
                stop.wait(0.005)
        except Exception as error:
            self.failure = error

    def newcomer_is_served(self) -> None:
        """Somebody who comes now, and connects anew."""
        router = self.pool.router(transport="grpc")
        answer = router.forward(KEY, *self.given)
        torch.testing.assert_close(answer, self.pool.answer(*self.given), atol=1e-5, rtol=1e-5)
        router.close()


@contextmanager
def honest(folder: Path, **options: object) -> Iterator[Honest]:
    with serving(folder, hosts=1, **options) as pool:  # pyright: ignore[reportArgumentType]
        one = Honest(pool, pool.router(transport="grpc"))
        stop = threading.Event()
        asking = threading.Thread(target=one.run, args=(stop,))
        asking.start()
        try:
            yield one
            answers = one.answers
            assert settles(lambda: one.answers > answers or one.failure is not None)
        finally:
            stop.set()
            asking.join(DEADLINE_S)
        if one.failure is not None:
            raise one.failure
        assert one.router.stats().retries == 0, "it was served by its only connection"
        assert one.slowest_s < 5.0
        assert one.host._loop.alive


def fetched(host: ExpertHost, most: int, timeout_s: float = DEADLINE_S) -> dict[str, Tensor]:
    entry = host.entry()
    with grpc.insecure_channel(entry.grpc_address) as channel:
        wanted = WeightsKey(model="m", layer=LAYER, expert=1, version=1)
        try:
            chunks = WeightsStub(channel).Get(
                wanted, timeout=timeout_s, metadata=shown(entry, "weights")
            )
            return weights.tensors_in(weights._join(weights._head(chunks), chunks, most))
        except grpc.RpcError as error:
            raise from_grpc(error, "host") from error
