"""A host's listener answers three questions to members of its cluster, whatever its loop does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from moesaic.actors.host.host import ExpertHost, local_hosts
from moesaic.actors.transport.grpc.health import probe
from moesaic.actors.transport.grpc.interceptors import show_proof
from moesaic.cluster.host.questions import TURNS_S
from moesaic.cluster.host_answers import HostAnswers
from moesaic.proto.errors import HostLost, MoesaicError, Unauthenticated
from moesaic.proto.keys import ClusterSecret, secret_of_process, target
from tests.helpers.cluster.fake_clock import FakeClock

DEADLINE_S = 30.0
WELL = HostAnswers(startup=True, liveness=True, readiness=True)


@pytest.fixture
def host() -> Iterator[ExpertHost]:
    with local_hosts(1) as (host,):
        yield host


def proof_for(host: ExpertHost, plane: Any = "health") -> bytes:
    return secret_of_process().proof(plane, host.entry().target)


def asked(host: ExpertHost) -> HostAnswers:
    return probe(host.entry().grpc_address, proof_for(host), DEADLINE_S).result(DEADLINE_S)


def test_an_idle_host_is_ready_once_a_controller_has_its_report(host: ExpertHost) -> None:
    assert asked(host) == HostAnswers(startup=True, liveness=True, readiness=False)
    host.report()  # an operator's question lists nothing
    assert not asked(host).readiness
    host.report(term=1)
    assert asked(host) == WELL
    assert host.probe() == WELL
    assert host.report().loop.routers == 0  # a probe is no router
    host.leave()
    assert asked(host) == HostAnswers(startup=True, liveness=True, readiness=False)


def test_each_question_has_a_name(host: ExpertHost) -> None:
    host.report(term=1)
    with grpc.insecure_channel(host.entry().grpc_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(show_proof(channel, proof_for(host)))
        for name in HostAnswers._fields:
            request = health_pb2.HealthCheckRequest(service=name)
            answer = stub.Check(request, timeout=DEADLINE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        for name in ("", "Readiness", "x"):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_loop_that_hangs_is_answered_for_by_the_listener() -> None:
    clock = FakeClock()
    with local_hosts(1, clock=clock) as (host,):
        host.report(term=1)
        assert asked(host) == WELL
        stuck, leave = threading.Event(), threading.Event()

        def hang() -> None:
            stuck.set()
            assert leave.wait(DEADLINE_S)

        host._loop.post(hang)
        assert stuck.wait(DEADLINE_S)
        clock.now += TURNS_S
        assert asked(host) == HostAnswers(startup=True, liveness=False, readiness=False)
        leave.set()
        host._loop.call(lambda: None)  # it turns
        host._loop.call(lambda: None)
        assert asked(host) == WELL


def test_only_members_are_answered_and_nobody_else_makes_a_host_ready(host: ExpertHost) -> None:
    address, other = host.entry().grpc_address, ClusterSecret.new()
    host.report(term=1)
    wrong = [
        other.proof("health", host.entry().target),
        proof_for(host, "experts"),
        secret_of_process().proof("health", target("host-0", 1)),
    ]
    for proof in wrong:
        with pytest.raises(Unauthenticated):
            probe(address, proof, DEADLINE_S).result(DEADLINE_S)
    assert not host.questions.answers().readiness
    assert asked(host) == WELL


def test_no_listener_and_another_listener_are_errors(host: ExpertHost) -> None:
    with pytest.raises(HostLost, match="UNAVAILABLE"):
        probe("127.0.0.1:1", proof_for(host), DEADLINE_S).result(DEADLINE_S)
    impostor = grpc.server(ThreadPoolExecutor(1), handlers=[_anything()])
    port = impostor.add_insecure_port("127.0.0.1:0")
    impostor.start()
    try:
        with pytest.raises(HostLost, match="did not prove"):
            probe(f"127.0.0.1:{port}", proof_for(host), DEADLINE_S).result(DEADLINE_S)
    finally:
        impostor.stop(0).wait(DEADLINE_S)


def test_a_probe_that_is_not_answered_ends_at_its_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(MoesaicError):
            probe(address, b"x" * 32, 0.2).result(DEADLINE_S)


def _anything() -> grpc.GenericRpcHandler:
    """Answers every health check with yes, and proves nothing."""
    yes = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    pb2: Any = health_pb2  # its type stubs lack `List`
    answer = pb2.HealthListResponse(statuses=dict.fromkeys(HostAnswers._fields, yes))
    handler = grpc.unary_unary_rpc_method_handler(
        lambda request, context: answer,
        request_deserializer=pb2.HealthListRequest.FromString,
        response_serializer=pb2.HealthListResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"List": handler})
