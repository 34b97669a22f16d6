"""The router service over real sockets and real hosts: answers, merging, failures, overload.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

import moesaic
from moesaic.actors.host.host import ExpertHost
from moesaic.actors.router_service.catalog import Catalog
from moesaic.actors.router_service.service import SERVICE, RouterService, ServicePolicy
from moesaic.clients.router_keys import VARIABLE
from moesaic.cluster.batching.batch_queue import MergePolicy
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey, first_versions
from moesaic.cluster.placement import ModelShape, Placement, PlacementId
from moesaic.proto.errors import (
    BadExpert,
    Busy,
    CallError,
    ClusterError,
    ExpertUnavailable,
    Expired,
    HostLost,
    InternalError,
    RequestError,
    UnknownModel,
)
from moesaic.proto.router_pb2 import ComputeRequest
from moesaic.proto.router_pb2_grpc import RouterStub
from moesaic.session import ClusterSession, write_session
from tests.helpers.documented import blocks
from tests.helpers.pool.pools import pool
from tests.helpers.pool.router_services import KEY, Served, head_of, router_service
from tests.helpers.pool.served_pool import held
from tests.helpers.pool.serving import (
    EXPERTS,
    HIDDEN,
    LAYER,
    assert_right,
    inputs,
    save_model,
    sent,
)
from tests.helpers.pool.transports import open_things, settles

ADDRESS = "127.0.0.1:8001"  # of the examples


@pytest.fixture(autouse=True)
def key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """For tests that break nothing."""
    with router_service(folder, hosts=2) as running:
        yield running


@contextmanager
def in_background() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_answers_are_those_of_plain_experts(folder: Path, exact: bool) -> None:
    with router_service(folder, hosts=3, replicas=2, exact=exact) as served:
        client = served.client()
        for tokens, top_k in ((1, 1), (7, 3), (300, 2)):
            given = inputs(tokens, top_k, seed=tokens)
            served.answers(client, given)
            as_numpy = client.experts("m", LAYER)(*(tensor.numpy() for tensor in given))
            assert isinstance(as_numpy, np.ndarray)
            assert as_numpy.dtype == np.float32
            assert_right(torch.from_numpy(as_numpy), served.pool.answer(*given))
        x, ids, weights = inputs(12, 3)
        ids[::2, 1] = -1
        ids[5:8, 2] = EXPERTS  # transformers' own mark
        served.answers(client, (x, ids, weights))
        assert client.experts("m", LAYER)(x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


def test_bfloat16_comes_back_as_it_went(folder: Path) -> None:
    key = LayerKey("m", LAYER)
    with pool(folder, dtype=torch.bfloat16) as running:
        x, ids, weights = inputs(9)
        x = x.bfloat16()
        expected = running.router.forward(key, x, ids, weights)
        shape = {layer.layer: layer.num_experts for layer in running.layers}
        ref = running.hosts[0]._store._models["m"].ref  # as the pool was made
        catalog = Catalog(lambda: [(ref, ModelShape(model="m", experts=shape))])
        service = RouterService(running.router, catalog, key=KEY)
        try:
            with moesaic.RouterClient(f"moesaic://{service.address}", key=KEY) as client:
                (model,) = client.models()
                assert model.dtype == "bfloat16"
                given = client.experts("m", LAYER)(x, ids, weights.bfloat16().float())
                assert given.dtype == torch.bfloat16
                again = client.experts("m", LAYER)(x, ids, weights)
                assert torch.equal(again, expected)
                with pytest.raises(CallError, match="FLOAT32, but m is computed in BFLOAT16"):
                    client.experts("m", LAYER)(x.float(), ids, weights)
        finally:
            service.close()


def test_models_are_listed(served: Served) -> None:
    with moesaic.connect(served.target) as client:
        (model,) = client.models()
        assert (model.name, model.dtype, model.exact) == ("m", "float32", False)
        assert [one.layer for one in model.layers] == [0, 1]
        assert {(one.experts, one.hidden, one.max_top_k) for one in model.layers} == {
            (EXPERTS, HIDDEN, EXPERTS)
        }
        with pytest.raises(UnknownModel, match="'other' is not served; the router service has m"):
            client.experts("other", 0)
        with pytest.raises(
            CallError, match=r"layer 7 of m has no experts; choose one of layers \[0, 1\]"
        ):
            client.experts("m", 7)


def test_a_call_that_is_too_large_goes_in_several(folder: Path) -> None:
    policy = ServicePolicy(max_call_bytes=10_000)
    with router_service(folder, policy=policy) as served:
        served.answers(served.client(), inputs(200))
        assert served.service.report().calls == -(-200 // (10_000 // (HIDDEN * 4 + 2 * 8)))


def test_a_client_needs_neither_ray_nor_torch(
    served: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))  # no cluster of this machine
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", THIN, served.target],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    x, ids, weights = (torch.full((3, HIDDEN), 0.5), torch.tensor([[0, 3]] * 3), torch.ones(3, 2))
    (first,) = {float(value) for value in served.pool.answer(x, ids, weights)[:, 0]}
    assert float(done.stdout) == pytest.approx(first, abs=1e-5)


THIN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {
            "ray", "torch", "transformers", "safetensors", "pydantic", "yaml", "httpx", "psutil",
            "xxhash", "scipy", "fastapi", "rich", "typer",
        }:
            raise AssertionError(f"a thin client imports {name}")

sys.meta_path.insert(0, Blocked())
import numpy as np
import moesaic

with moesaic.connect(sys.argv[1]) as router:
    x, ids = np.full((3, 32), 0.5, np.float32), np.array([[0, 3]] * 3)
    print(router.experts("m", 1)(x, ids, np.ones((3, 2)))[0, 0])
    try:
        router.experts("m", 1)(x, ids + 90, np.ones((3, 2)))
    except moesaic.MoesaicError as error:
        assert error.code == "CallError", error
"""


def test_the_example_of_the_page_runs_on_the_clusters_machine(
    served: Served, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The key is in the session file."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    # Its Ray is where the service listens: something does.
    at = served.service.address
    session = ClusterSession(name="x", pid=1, started=0.0, ray_address=at)
    write_session(replace(session, router=at, router_key=KEY))
    (example,) = (
        text for page, text in blocks("python") if page == "router.md" and "RouterStub" not in text
    )
    exec(compile(example.replace(ADDRESS, served.service.address), "router.md", "exec"), {})
    assert capsys.readouterr().out == f"(4, {HIDDEN}) float32\n"


def test_the_example_for_other_languages_runs(
    served: Served, capsys: pytest.CaptureFixture
) -> None:
    (example,) = (
        text for page, text in blocks("python") if page == "router.md" and "RouterStub" in text
    )
    exec(compile(example.replace(ADDRESS, served.service.address), "router.md", "exec"), {})
    assert capsys.readouterr().out == "['m']\n"


# ---- several clients ----------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_calls_that_wait_together_are_merged(folder: Path, exact: bool) -> None:
    with router_service(folder, hosts=1, exact=exact) as served, in_background() as start:
        (host,) = served.pool.hosts
        clients = [served.client() for _ in range(4)]
        asked = [inputs(1 + 3 * n, 1 + n, seed=n) for n in range(4)]
        alone = [served.ask(clients[0], one) for one in asked]
        before = served.service.report()
        with held(host):
            first = start(served.ask, clients[0], inputs(2))
            assert settles(lambda: sent(served.router) == 1)
            calls = [start(served.ask, *one) for one in zip(clients, asked, strict=True)]
            assert served.holds(5)
        assert_right(first.result(30), served.pool.answer(*inputs(2)))
        for call, one, by_itself in zip(calls, asked, alone, strict=True):
            given = call.result(30)
            assert_right(given, served.pool.answer(*one))
            if exact:
                assert torch.equal(given, by_itself), "the bits depend on who else asked"
        after = served.service.report()
        assert after.batches - before.batches == 2
        assert after.merged_batches - before.merged_batches == 1
        assert after.calls - before.calls == 5


def test_a_mistake_costs_nobody_else_anything(folder: Path) -> None:
    with router_service(folder, hosts=1) as served, in_background() as start:
        good, bad = served.client(), served.client()
        with held(served.pool.hosts[0]):
            calls = [start(served.ask, good, inputs(4, seed=n)) for n in range(3)]
            assert served.holds(3)
            x, ids, weights = inputs(4)
            ids[2, 1] = 99
            with pytest.raises(CallError, match="ids: row 2 has 99"):
                served.ask(bad, (x, ids, weights))
        for n, call in enumerate(calls):
            assert_right(call.result(30), served.pool.answer(*inputs(4, seed=n)))


def test_an_expert_that_is_not_finite_costs_only_those_who_chose_it(folder: Path) -> None:
    with router_service(folder, hosts=1) as served, in_background() as start:
        (host,) = served.pool.hosts
        broken = ExpertVersion(ExpertKey("m", LAYER, 3), 1)
        host._store.put(broken, {n: t * torch.nan for n, t in host._store.get(broken).items()})
        hit, other = inputs(4), inputs(4, seed=1)
        hit[1][:], other[1][:] = torch.tensor([3, 0]), torch.tensor([1, 0])
        clients = [served.client() for _ in range(3)]
        with held(host):
            first = start(served.ask, clients[2], other)
            assert settles(lambda: sent(served.router) == 1)
            calls = [start(served.ask, *one) for one in zip(clients, (hit, other), strict=False)]
            assert served.holds(3)
        first.result(30)
        with pytest.raises(BadExpert, match=f"expert 3 of layer {LAYER} of m"):
            calls[0].result(30)
        assert_right(calls[1].result(30), served.pool.answer(*other))
        assert served.service.report().merged_batches == 1


# ---- hosts that fail ----------------------------------------------------------------------------


def test_a_host_that_ends_in_the_middle_costs_no_call(folder: Path) -> None:
    with router_service(folder, replicas=2) as served, in_background() as start:
        asked = [inputs(32, seed=n) for n in range(3)]
        clients = [served.client() for _ in asked]
        dying = served.pool.hosts[0]
        with held(dying) as go_on:
            calls = [start(served.ask, *one) for one in zip(clients, asked, strict=True)]
            assert settles(lambda: sent(served.router) >= 1)
            assert served.holds(3)
            closing = start(dying.close)
            assert settles(lambda: dying._loop._stopping)
            go_on()
            for call, one in zip(calls, asked, strict=True):
                assert_right(call.result(30), served.pool.answer(*one))
            closing.result(30)
        assert served.router.stats().hosts["host-0"] != "up"


def test_rows_of_a_lost_expert_wait_for_it_and_others_go_on(folder: Path) -> None:
    with router_service(folder) as served, in_background() as start:
        pool, lost = served.pool, served.pool.hosts[0]
        theirs = {expert for expert in range(EXPERTS) if pool.holders(expert) == [lost]}
        lost.close()
        given = inputs(16)
        call = start(served.ask, served.client(), given)
        assert settles(lambda: served.service.report().expert_waits > 1)
        x, ids, weights = inputs(6, seed=1)
        ids[:] = torch.tensor(sorted(set(range(EXPERTS)) - theirs))[:2]
        served.answers(served.client(), (x, ids, weights))
        assert not call.done()
        again = ExpertHost("host-0", node="here", device="cpu")
        pool.stack.callback(again.close)
        again.load(
            [(pool.ref, pool.shape)],
            first_versions(
                [
                    ExpertKey("m", la.layer, expert)
                    for la in pool.layers
                    for expert in range(EXPERTS)
                ]
            ),
        )
        entries = {**pool.placement.hosts, "host-0": again.entry()}
        served.router.place(Placement(PlacementId(1, 2), entries, pool.placement.layers))
        assert_right(call.result(30), pool.answer(*given))


def test_an_expert_that_stays_away_is_named_when_the_time_is_up(folder: Path) -> None:
    with router_service(folder, policy=ServicePolicy(call_s=1.0)) as served:
        served.pool.hosts[0].close()
        with pytest.raises(ExpertUnavailable, match=f"expert . of layer {LAYER} of m"):
            served.ask(served.client(), inputs(16))
        assert settles(lambda: served.held_calls == 0)


# ---- time and room ------------------------------------------------------------------------------


def test_a_call_that_is_too_late_is_not_computed(folder: Path) -> None:
    with router_service(folder, hosts=1) as served, in_background() as start:
        with held(served.pool.hosts[0]):
            first = start(served.ask, served.client(), inputs(2))
            assert settles(lambda: sent(served.router) == 1)
            with pytest.raises(Expired):
                served.ask(served.client(timeout_s=0.3, retries=2), inputs(50))
            gone = served.client()
            leaving = start(served.ask, gone, inputs(60))
            assert served.holds(2)
            gone.close()
            assert served.holds(1), "a client that went is still waited for"
            with pytest.raises((HostLost, ClusterError)):
                leaving.result(30)
        assert_right(first.result(30), served.pool.answer(*inputs(2)))
        served.goes_on()
        assert served.service.report().rows == 2 + 5


@pytest.mark.parametrize("heads", [0, 1])
def test_who_never_sends_is_cut_when_its_time_is_up(folder: Path, heads: int) -> None:
    """Without a deadline of its own, and without tensors."""
    policy = ServicePolicy(call_s=0.3)
    with router_service(folder, policy=policy) as served:
        waiting = threading.Event()

        def requests() -> Iterator[ComputeRequest]:
            yield from [ComputeRequest(head=head_of(inputs(4)))] * heads
            waiting.wait(30)

        with served.channel() as channel:
            call = RouterStub(channel).Compute(requests())
            with pytest.raises(grpc.RpcError) as caught:
                next(call)
            waiting.set()
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        served.goes_on()


def test_what_finds_no_room_is_told_when_to_come_back(folder: Path) -> None:
    policy = ServicePolicy(merge=MergePolicy(max_calls=2))
    with router_service(folder, hosts=1, policy=policy) as served, in_background() as start:
        with held(served.pool.hosts[0]) as go_on:
            calls = [start(served.ask, served.client(), inputs(2, seed=n)) for n in range(2)]
            assert served.holds(2)
            with pytest.raises(Busy, match=r"queue full \(2 calls\)") as caught:
                served.ask(served.client(), inputs(3))
            assert caught.value.retry_after_s is not None
            assert 0.01 <= caught.value.retry_after_s <= 5.0
            patient = start(served.ask, served.client(retries=30), inputs(3))
            assert settles(lambda: served.service.report().refused_calls > 1)
            go_on()
        assert_right(patient.result(60), served.pool.answer(*inputs(3)))
        for n, call in enumerate(calls):
            assert_right(call.result(30), served.pool.answer(*inputs(2, seed=n)))


def test_a_flood_is_refused_and_others_are_not(folder: Path) -> None:
    policy = ServicePolicy(merge=MergePolicy(max_calls=4))
    with router_service(folder, hosts=1, policy=policy) as served, in_background() as start:
        flood, modest = served.client(), served.client()
        with held(served.pool.hosts[0]):
            # What came together would be computed together, and none of it could be given up.
            floods = [start(served.ask, flood, inputs(2))]
            assert settles(lambda: sent(served.router) == 1)
            floods += [start(served.ask, flood, inputs(2, seed=n)) for n in range(1, 4)]
            assert served.holds(4)
            call = start(served.ask, modest, inputs(3))
            assert settles(lambda: served.service.report().refused_calls == 1)
        assert_right(call.result(30), served.pool.answer(*inputs(3)))
        errors = [one.exception(30) for one in floods]
        assert [type(error) for error in errors if error is not None] == [Busy]


# ---- standard services, life --------------------------------------------------------------------


def health_of(channel: grpc.Channel, service: str) -> str:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_health_and_reflection_answer(folder: Path) -> None:
    with router_service(folder) as served, served.channel() as channel:
        assert health_of(channel, "") == health_of(channel, SERVICE) == "SERVING"
        listed = set(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert {SERVICE, "grpc.health.v1.Health"} <= listed
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            health_of(channel, "another")


def test_a_defect_of_its_thread_is_known_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with router_service(folder) as served:
        client = served.client()
        served.answers(client, inputs(2))
        monkeypatch.setattr(served.service._calls._queue, "batch_over", None)
        with pytest.raises(InternalError, match=r"An internal error of Moesaic.*\(request \w+\)"):
            served.ask(client, inputs(2))
        with pytest.raises(InternalError, match="computes nothing any more"):
            served.service.report()
        with served.channel() as keyed, grpc.insecure_channel(served.service.address) as bare:
            assert health_of(keyed, SERVICE) == health_of(bare, SERVICE) == "NOT_SERVING"
        with pytest.raises(HostLost):
            served.ask(client, inputs(2))


def test_closing_frees_descriptors_and_threads(folder: Path) -> None:
    def round_trip() -> None:
        with router_service(folder) as served, in_background() as start:
            clients = [served.client() for _ in range(3)]
            for client in clients:
                served.answers(client, inputs(20))
            with pytest.raises(CallError):
                served.ask(clients[0], inputs(2, EXPERTS + 1))
            clients[0].close()
            with pytest.raises(ClusterError, match="closed"):
                served.ask(clients[0], inputs(2))
            with held(served.pool.hosts[0]):
                call = start(served.ask, clients[1], inputs(20))
                assert settles(lambda: sent(served.router) >= 1)
                closing = start(served.service.close)
                with pytest.raises(HostLost):
                    call.result(30)
            closing.result(30)

    round_trip()  # what libraries open once
    before = open_things()
    round_trip()
    assert settles(lambda: open_things() <= before), "a service or a client leaves something"


@pytest.mark.parametrize(
    "target", ["moesaic://", "moesaic://host", "http://a:1", "moesaic://a:99999", "moesaic://a:1/x"]
)
def test_an_address_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(RequestError, match="is not the address of a router service"):
        moesaic.connect(target)


def test_nobody_at_an_address_is_an_error_in_time() -> None:
    with moesaic.connect("moesaic://127.0.0.1:1") as client, pytest.raises(HostLost):
        client._retries = 0
        client.models()
