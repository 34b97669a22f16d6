"""Groups of torch.distributed: pairs by themselves, and routers that fall back to gRPC.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

import pytest
import torch
from torch import Tensor

from moesaic.actors.router import connections
from moesaic.actors.router.router import Router
from moesaic.actors.transport import process_group as pairs
from moesaic.actors.transport.grpc.session import GrpcSession
from moesaic.actors.transport.grpc.stream import GrpcChannel
from moesaic.actors.transport.process_group import HOST_RANK, PIECE_BYTES, ROUTER_RANK, Pair
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing import transports
from moesaic.proto.errors import CallError, ClusterError, HostLost
from tests.helpers.pool.serving import (
    KEY,
    PATIENT,
    Hosts,
    assert_right,
    inputs,
    save_model,
    serving,
)
from tests.helpers.pool.transports import (
    DEADLINE_S,
    accept,
    answer,
    channel_to,
    connected,
    hear,
    hear_end,
    listen,
    open_things,
    process,
    round_trip,
    settles,
    welcome,
)
from tests.helpers.processes.frozen import freeze

pytestmark = pytest.mark.alone  # frozen processes are noticed by the clock

CPU = torch.device("cpu")
LOOPBACK = "127.0.0.1"
SHORT_S = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer is given up soon."""
    monkeypatch.setattr(pairs, "OP_TIMEOUT_S", SHORT_S)
    monkeypatch.setattr(pairs, "MEET_TIMEOUT_S", SHORT_S)


@contextmanager
def met() -> Iterator[tuple[Pair, Pair]]:
    """Both sides of one pair, the host's first."""
    host, router = Pair("router", "gloo", CPU), Pair("host", "gloo", CPU)
    address = host.open(LOOPBACK)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(host.join, HOST_RANK, address)
        router.join(ROUTER_RANK, address)
        joining.result(DEADLINE_S)
    try:
        yield host, router
    finally:
        host.abort()
        router.abort()


def send(pair: Pair, payload: Tensor, written: pairs.Written = None) -> None:
    for piece in pairs.pieces(payload):
        pair.send(piece, written)


def random_bytes(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


# ---- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [-PIECE_BYTES, 1 - PIECE_BYTES, -1, 0, 1, PIECE_BYTES + 7])
def test_bytes_of_all_sizes_both_ways_at_once(extra: int) -> None:
    there, back = (random_bytes(PIECE_BYTES + extra, seed) for seed in (1, 2))
    with met() as (host, router), ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send, host, there), pool.submit(send, router, back)]
        heard = [pool.submit(side.receive, there.numel()) for side in (router, host)]
        for sent in sending:
            sent.result(DEADLINE_S)
        assert torch.equal(heard[0].result(DEADLINE_S), there)
        assert torch.equal(heard[1].result(DEADLINE_S), back)


def test_many_pairs_at_once_and_the_default_group_is_not_touched() -> None:
    with ExitStack() as stack, ThreadPoolExecutor(12) as pool:
        made = [stack.enter_context(met()) for _ in range(6)]
        payloads = [random_bytes(100_000 + index, index) for index in range(6)]
        for (host, _), payload in zip(made, payloads, strict=True):
            pool.submit(send, host, payload)
        heard = [
            pool.submit(router.receive, payload.numel())
            for (_, router), payload in zip(made, payloads, strict=True)
        ]
        for arriving, payload in zip(heard, payloads, strict=True):
            assert torch.equal(arriving.result(DEADLINE_S), payload)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("frozen", [False, True], ids=["killed", "frozen"])
def test_a_peer_that_is_lost_in_the_middle_of_a_transfer(frozen: bool, hasty: None) -> None:
    before = open_things()
    with process("pair", "1") as (child, address), ThreadPoolExecutor(2) as pool:
        router = Pair("host", "gloo", CPU)
        router.join(ROUTER_RANK, address)
        router.send(random_bytes(PIECE_BYTES))
        hearing = pool.submit(router.receive, 1)
        sending = pool.submit(router.send, random_bytes(PIECE_BYTES))
        if frozen:
            freeze(child.pid)
        else:
            child.kill()
        for waiting in (sending, hearing):
            with pytest.raises(HostLost, match="host: gloo"):
                waiting.result(DEADLINE_S)
        with pytest.raises(HostLost, match="no group"):
            router.send(random_bytes(1))
    # Before the frozen one is awake, and whether or not it ever will be.
    assert settles(lambda: all(a <= b + 1 for a, b in zip(open_things(), before, strict=True)))


def test_abort_ends_what_waits_at_once_and_on_the_other_side_too() -> None:
    with met() as (host, router), ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(router.send, random_bytes(PIECE_BYTES)),
            pool.submit(router.receive, 1),
        ]
        began = time.monotonic()
        router.abort()
        router.abort()
        for ended in waiting:
            with pytest.raises(HostLost):
                ended.result(DEADLINE_S)
        with pytest.raises(HostLost):
            host.receive(1)
        assert time.monotonic() - began < pairs.OP_TIMEOUT_S


def test_nobody_comes_to_the_store(hasty: None) -> None:
    before = open_things()
    host = Pair("router", "gloo", CPU)
    address = host.open(LOOPBACK)
    with pytest.raises(HostLost, match="router: gloo"):
        host.join(HOST_RANK, address)
    router = Pair("host", "gloo", CPU)
    del host
    with pytest.raises(HostLost, match="host: gloo"):
        router.join(ROUTER_RANK, address)
    assert settles(lambda: all(a <= b + 1 for a, b in zip(open_things(), before, strict=True)))


def test_backends_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallError, match="group: 'mpi' is not a backend"):
        Pair("host", "mpi", CPU)
    with pytest.raises(HostLost, match=r"group: '?nccl"):
        GrpcChannel("host", "127.0.0.1:1", router="router", group="nccl")
    monkeypatch.setattr(connections, "backends", lambda: ())
    with pytest.raises(ClusterError, match="transport: 'group' needs"):
        Router(name="router", node="here", transport="group")


def test_twenty_connections_leave_nothing() -> None:
    def use() -> None:
        with connected("group") as (_, channel, session):
            round_trip(channel, session, 1, rows=1000)

    use()
    before = open_things()
    for _ in range(20):
        use()
    assert settles(lambda: all(a <= b + 4 for a, b in zip(open_things(), before, strict=True)))


def test_a_frozen_router_does_not_hold_up_its_host(hasty: None) -> None:
    listener = listen("group")
    with process("router", "group", listener.address) as (child, _):
        session = accept(listener)
        call = hear(session, 2)[1]
        freeze(child.pid)
        began = time.monotonic()
        answer(session, call)
        assert time.monotonic() - began < SHORT_S
        assert "gloo: " in str(hear_end(session))
        session.close()
    listener.close()


def test_a_host_that_makes_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrpcSession, "_meet", lambda *_: None)
    listener = listen("group")
    channel = channel_to("group", listener.address)
    session = accept(listener)
    welcome(session)
    assert "group" in str(hear_end(channel))
    for side in (channel, session, listener):
        side.close()


@pytest.mark.cuda
def test_a_pair_over_nccl() -> None:
    """NCCL has no two ranks on one GPU."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    host = Pair("router", "nccl", torch.device("cuda:0"))
    router = Pair("host", "nccl", torch.device("cuda:1"))
    address = host.open(LOOPBACK)
    payload = random_bytes(2 * PIECE_BYTES + 5)
    with ThreadPoolExecutor(2) as pool:
        joining = pool.submit(host.join, HOST_RANK, address)
        router.join(ROUTER_RANK, address)
        joining.result(DEADLINE_S)
        there = torch.empty_like(payload, device="cuda:0")
        with torch.cuda.stream(torch.cuda.Stream("cuda:0")):
            torch.cuda._sleep(1 << 28)  # the payload is written long after it is sent
            there.copy_(payload.pin_memory(), non_blocking=True)
            written = host.written()
        sending = pool.submit(send, host, there, written)
        assert torch.equal(router.receive(payload.numel()).cpu(), payload)
        sending.result(DEADLINE_S)
        waiting = pool.submit(router.receive, 1)
        host.abort()
        router.abort()
        with pytest.raises(HostLost):
            waiting.result(DEADLINE_S)


# ---- routers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_answers_are_those_of_shared_memory(folder: Path, exact: bool) -> None:
    with serving(folder, exact=exact) as pool:
        over_shm, over_group = pool.router(), pool.router(transport="group")
        assert set(over_group.stats().transports.values()) == {"gloo"}
        for tokens in (1, 7, 300):
            x, ids, weights = inputs(tokens, seed=tokens)
            given = over_group.forward(KEY, x, ids, weights)
            assert_right(given, pool.answer(x, ids, weights))
            if exact:
                assert torch.equal(given, over_shm.forward(KEY, x, ids, weights))


@contextmanager
def with_another(pool: Hosts, folder: Path) -> Iterator[tuple[Popen[str], str, Placement]]:
    """A host in a process of its own, and a placement with every expert there and, behind it, on
    the pool's only host."""
    with process("serve", str(folder), "other", "cpu") as (child, line):
        entry = HostEntry(**json.loads(line))
        hosts = {**pool.placement.hosts, entry.host: entry}
        (here,) = pool.placement.hosts
        both = (Replica(entry.host, 0.5), Replica(here, 0.5))
        layers = {
            key: LayerPlacement((both,) * len(layer.replicas))
            for key, layer in pool.placement.layers.items()
        }
        yield child, entry.host, Placement(PlacementId(1, 2), hosts, layers)


def placed(pool: Hosts, placement: Placement) -> Router:
    router = pool.router(
        policy=replace(PATIENT, attempt_s=SHORT_S, hedge_share=0.0, hedge_burst=0.0),
        transport="group",
        placed=False,
    )
    router.place(placement)
    router.wait_ready(DEADLINE_S)
    return router


def ask(pool: Hosts, router: Router, calls: int = 4) -> None:
    for seed in range(calls):
        x, ids, weights = inputs(40, seed=seed)
        assert_right(router.forward(KEY, x, ids, weights), pool.answer(x, ids, weights))


def test_a_frozen_host_comes_back_over_grpc_and_a_killed_one_costs_no_call(
    folder: Path, hasty: None
) -> None:
    with serving(folder, hosts=1) as pool, with_another(pool, folder) as (child, name, placement):
        router = placed(pool, placement)
        assert router.stats().transports == dict.fromkeys(placement.hosts, "gloo")
        ask(pool, router)
        freeze(child.pid)
        ask(pool, router)
        assert router.stats().retries > 0
        # Its connection ends when it has not taken a call in time, whoever else answered it.
        assert settles(lambda: (ask(pool, router, 1), router.stats().hosts[name])[1] != "ejected")
        child.send_signal(signal.SIGCONT)
        router.wait_ready(DEADLINE_S)
        others = {host: "gloo" for host in placement.hosts if host != name}
        assert router.stats().transports == {name: "grpc", **others}
        ask(pool, router)
        child.kill()
        ask(pool, router)
        assert router.stats().hosts[name] != "up"


def test_a_connection_that_is_lost_again_and_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is given up for a while after each loss, and then made anew."""
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        router = pool.router(transport="group")
        for pause_s, expected in ((60.0, "grpc"), (0.0, "gloo"), (60.0, "grpc")):
            monkeypatch.setattr(transports, "PAUSE_S", pause_s)
            ask(pool, router, 1)
            host._loop.call(lambda: drop_all(pool))
            ask(pool, router, 2)
            assert router.stats().transports == {host.name: expected}


def drop_all(pool: Hosts) -> None:
    loop = pool.hosts[0]._loop
    for session in list(loop._sessions.values()):
        loop._drop(session, HostLost("dropped by the test"))
