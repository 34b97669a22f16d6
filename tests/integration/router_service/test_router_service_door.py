"""The key of the router service: who lacks it is refused by everything but a look at the health,
and a client with it is served beside him."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from moesaic import RouterClient
from moesaic.actors.router_service.service import ServicePolicy
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.cluster.batching.batch_queue import MergePolicy
from moesaic.proto.errors import Unauthenticated
from moesaic.proto.keys import secret_of_process, target
from moesaic.proto.limits import HELLO_S
from moesaic.proto.router_pb2 import ComputeRequest, ModelsRequest
from moesaic.proto.router_pb2_grpc import RouterStub
from tests.helpers.pool.router_services import KEY, Served, head_of, router_service
from tests.helpers.pool.serving import inputs, save_model
from tests.helpers.pool.strangers import HTTP2_HELLO, connections, ended

PLACES = 4  # RPCs at a time


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = save_model(tmp_path_factory.mktemp("model"))
    policy = ServicePolicy(merge=MergePolicy(max_calls=PLACES // 4))
    with router_service(folder, hosts=1, policy=policy) as running:
        yield running


def head() -> ComputeRequest:
    return ComputeRequest(head=head_of(inputs(4)))


def watch(channel: grpc.Channel, **options: Any) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return list(stub.Watch(health_pb2.HealthCheckRequest(), **options))


def reflect(channel: grpc.Channel, **options: Any) -> Any:
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    stub: Any = ServerReflectionStub
    return list(stub(channel).ServerReflectionInfo(iter([asked]), **options))


DOORS: dict[str, Callable[..., Any]] = {
    "models": lambda channel, **how: RouterStub(channel).Models(ModelsRequest(), **how),
    "compute": lambda channel, **how: list(RouterStub(channel).Compute(iter([head()]), **how)),
    "reflection": reflect,
    "watch": watch,
    "anything": lambda channel, **how: channel.unary_unary("/a.Service/Method")(b"", **how),
}
META = {
    "nothing": [],
    "another key": [("authorization", "Bearer another key")],
    "a part of the key": [("authorization", f"Bearer {KEY[:-1]}")],
    "no scheme": [("authorization", KEY)],
    "another scheme": [("authorization", f"Basic {KEY}")],
    "a member's proof": [
        ("moesaic-proof-bin", secret_of_process().proof("experts", target("host-0", 1)))
    ],
}


@pytest.mark.parametrize("shown", META)
@pytest.mark.parametrize("door", DOORS)
def test_who_has_no_key_is_refused(served: Served, door: str, shown: str) -> None:
    with grpc.insecure_channel(served.service.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            DOORS[door](channel, timeout=10, metadata=META[shown])
        error = from_grpc(caught.value, "service")
        assert isinstance(error, Unauthenticated), error
        assert KEY not in str(error)
    served.goes_on()


def test_a_client_with_another_key_is_told_so_and_does_not_try_again(served: Served) -> None:
    with (
        RouterClient(served.target, key="another key", retries=5, timeout_s=20) as client,
        pytest.raises(Unauthenticated, match="authorization: the router service asks for its key"),
    ):
        client.models()
    served.goes_on()


def test_the_scheme_may_be_written_as_http_allows(served: Served) -> None:
    with grpc.insecure_channel(served.service.address) as channel:
        shown = [("authorization", f"bearer  {KEY}")]
        assert RouterStub(channel).Models(ModelsRequest(), timeout=10, metadata=shown).models


@pytest.mark.alone  # a deadline is kept by the clock
@pytest.mark.parametrize("says", [b"", HTTP2_HELLO[:10]], ids=["tcp", "half"])
def test_connections_that_do_not_come_to_speak_http2_end(served: Served, says: bytes) -> None:
    began = time.monotonic()
    with connections(served.service.address, 50, says) as made:
        served.answers(served.client(), inputs(5))
        assert all(map(ended, made))
    assert time.monotonic() - began < HELLO_S + 2.0


def test_strangers_take_no_place(served: Served) -> None:
    """Calls that never say anything, and probes that do not end their question."""
    never = threading.Event()

    def silent() -> Iterator[bytes]:
        never.wait(30)
        yield b""

    with grpc.insecure_channel(served.service.address) as channel:
        check = channel.stream_unary("/grpc.health.v1.Health/Check")
        probes = [check.future(silent(), timeout=30) for _ in range(5 * PLACES)]
        calls = [
            channel.stream_stream("/moesaic.v1.Router/Compute")(silent(), timeout=30)
            for _ in range(5 * PLACES)
        ]
        served.goes_on()
        for probe in probes:
            answer = health_pb2.HealthCheckResponse.FromString(probe.result(timeout=10))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert isinstance(from_grpc(caught.value, "service"), Unauthenticated)
        never.set()
    served.goes_on()


def test_a_probe_needs_no_key(served: Served) -> None:
    with grpc.insecure_channel(served.service.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "moesaic.v1.Router"):
            asked = health_pb2.HealthCheckRequest(service=service)
            assert stub.Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
