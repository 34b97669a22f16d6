"""A router service that ends: it says so first, and what runs comes to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moesaic.proto.errors import Ending
from tests.helpers.pool.router_services import Served, router_service
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import assert_right, inputs, save_model, sent
from tests.helpers.pool.transports import settles


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@contextmanager
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as threads:
        yield threads.submit


def serves(served: Served) -> bool:
    with grpc.insecure_channel(served.service.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_what_runs_ends_whole_and_what_is_new_is_refused(folder: Path) -> None:
    with router_service(folder, hosts=1) as served, in_background() as start:
        clients = [served.client() for _ in range(3)]
        assert serves(served)
        with held(served.pool.hosts[0]):
            running = start(served.ask, clients[0], inputs(2))
            assert settles(lambda: sent(served.router) == 1)
            waiting = start(served.ask, clients[1], inputs(5, seed=1))
            assert served.holds(2)
            assert served.service.drain(60.0) == 2
            assert not serves(served)
            with pytest.raises(Ending):
                served.ask(clients[2], inputs(3))
            assert served.service.drain(0.0) == 2  # a second call takes nobody's time away
        assert_right(running.result(30), served.pool.answer(*inputs(2)))
        assert_right(waiting.result(30), served.pool.answer(*inputs(5, seed=1)))
        assert settles(lambda: served.service.running == 0)


def test_what_takes_longer_ends_with_words(folder: Path) -> None:
    with (
        router_service(folder, hosts=1) as served,
        in_background() as start,
        held(served.pool.hosts[0]),
    ):
        calls = [start(served.ask, served.client(), inputs(2, seed=n)) for n in range(2)]
        assert served.holds(2)
        served.service.drain(0.2)
        for call in calls:
            with pytest.raises(Ending, match="took longer") as caught:
                call.result(30)
            assert caught.value.retryable
        assert settles(lambda: served.service.running == 0)
