"""Who may connect: strangers learn nothing and hold nothing, and an honest router beside them is
served throughout."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
import xxhash

from moesaic.actors.host.host import ExpertHost, local_hosts
from moesaic.actors.router.connect import connect
from moesaic.actors.transport import shm
from moesaic.actors.transport.base import Channel, Session
from moesaic.actors.transport.grpc import stream as grpc_stream
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.interceptors import show_key, show_proof
from moesaic.actors.transport.grpc.stream import METHOD, SERVICE, GrpcChannel, GrpcListener
from moesaic.actors.transport.grpc.weights import get_weights, put_weights
from moesaic.actors.transport.shm import ShmChannel, ShmListener
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, LayerKey
from moesaic.cluster.routing.transports import Transport
from moesaic.proto.errors import Busy, Expired, HostLost, Unauthenticated
from moesaic.proto.expert_pb2 import Frame, WeightsChunk, WeightsKey
from moesaic.proto.expert_pb2_grpc import WeightsStub
from moesaic.proto.keys import ClusterSecret, Plane, proof_hash, reply_hash, target
from moesaic.proto.limits import HELLO_S, MAX_UNANNOUNCED
from moesaic.proto.wire import WIRE_VERSION
from tests.helpers.pool.serving import save_model, serving
from tests.helpers.pool.transports import (
    DEADLINE_S,
    DictStore,
    accept,
    greet,
    hear,
    hear_end,
    readable,
    round_trip,
    settles,
)

OURS, THEIRS = ClusterSecret.new(), ClusterSecret.new()
MEANT = target("host", 7)
KEY = ExpertKey("model", 0, 0)
ONE = ExpertVersion(KEY, 1)
MOST = 1 << 20
PLANES: tuple[Plane, ...] = ("experts", "weights", "shm")

# What a stranger may show at the door of experts.
SHOWN: dict[str, Callable[[grpc.Channel], grpc.Channel]] = {
    "nothing": lambda channel: channel,
    "no bytes": lambda channel: show_proof(channel, b""),
    "rubbish": lambda channel: show_proof(channel, os.urandom(32)),
    "the proof of another cluster": lambda channel: show_proof(
        channel, THEIRS.proof("experts", MEANT)
    ),
    "the proof for another start of the host": lambda channel: show_proof(
        channel, OURS.proof("experts", target("host", 8))
    ),
    "the proof for another host": lambda channel: show_proof(
        channel, OURS.proof("experts", target("host-1", 7))
    ),
    "the proof of shared memory": lambda channel: show_proof(channel, OURS.proof("shm", MEANT)),
    "the router service's key": lambda channel: show_key(channel, OURS.router_key),
}


@pytest.fixture
def listener() -> Iterator[GrpcListener]:
    store = DictStore()
    store.held[ONE] = {"up": torch.ones(3)}
    one = GrpcListener(weights=store, secret=OURS, target=MEANT)
    yield one
    one.close()


@contextlib.contextmanager
def served(listener: GrpcListener | ShmListener) -> Iterator[Callable[[], None]]:
    """An honest router; what is given makes a call and checks its answer."""
    if isinstance(listener, GrpcListener):
        proof = OURS.proof("experts", MEANT)
        channel: Channel = GrpcChannel("host", listener.address, router="r", proof=proof)
    else:
        proof = OURS.proof("shm", MEANT)
        channel = ShmChannel(
            "host", listener.address, router="r", slots=2, slot_bytes=4096, proof=proof
        )
    session = greet(listener)
    hear(channel)
    numbers = iter(range(1, 1000))
    round_trip(channel, session, next(numbers))
    try:
        yield lambda: round_trip(channel, session, next(numbers))
    finally:
        channel.close()
        session.close()


def _error(call: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_grpc(caught.value, "host")


def hello() -> bytes:
    frame = Frame()
    frame.hello.wire_version, frame.hello.router = WIRE_VERSION, "stranger"
    return frame.SerializeToString()


@pytest.mark.parametrize("shown", SHOWN)
def test_who_shows_no_proof_is_refused_by_every_service(listener: GrpcListener, shown: str) -> None:
    with served(listener) as call, grpc.insecure_channel(listener.address) as bare:
        stranger = SHOWN[shown](bare)
        threads = threading.active_count()
        stream = stranger.stream_stream(f"/{SERVICE}/{METHOD}")
        stub = WeightsStub(stranger)
        wanted = WeightsKey(model=KEY.model, layer=KEY.layer, expert=KEY.expert, version=1)
        chunk = WeightsChunk(key=wanted, total_bytes=4, data=b"1234")
        for error in (
            _error(lambda: list(stream(iter([hello()]), timeout=DEADLINE_S))),
            _error(lambda: list(stub.Get(wanted, timeout=DEADLINE_S))),
            _error(lambda: stub.Put(iter([chunk]), timeout=DEADLINE_S)),
            _error(lambda: stranger.unary_unary("/a.Service/Anything")(b"", timeout=DEADLINE_S)),
        ):
            assert isinstance(error, Unauthenticated), error
            assert "proof: it is missing" in str(error)
            call()
        assert not listener.accept(), "no session was made"
        assert threading.active_count() <= threads + 1, "but for gRPC's own of the client"


def test_a_proof_opens_its_own_service_alone(listener: GrpcListener) -> None:
    experts, weights = OURS.proof("experts", MEANT), OURS.proof("weights", MEANT)
    address = listener.address
    assert torch.equal(
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST, proof=weights)["up"],
        torch.ones(3),
    )
    with pytest.raises(Unauthenticated):
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=MOST, proof=experts)
    with pytest.raises(Unauthenticated):
        put_weights(
            address,
            ONE,
            {"up": torch.ones(1)},
            timeout_s=DEADLINE_S,
            proof=experts,
        )
    channel = GrpcChannel("host", address, router="r", proof=weights)
    assert "proof" in str(hear_end(channel))
    channel.close()


def test_strangers_take_no_thread_and_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a host serves at a time, each for as long as it likes."""
    monkeypatch.setattr(grpc_stream, "MAX_RPCS", 2)
    listener = GrpcListener(weights=DictStore(), secret=OURS, target=MEANT)
    never = threading.Event()

    def silent() -> Iterator[bytes]:
        never.wait(DEADLINE_S)
        yield b""

    with served(listener) as call, grpc.insecure_channel(listener.address) as stranger:
        streams = [
            stranger.stream_stream(f"/{SERVICE}/{METHOD}")(silent(), timeout=DEADLINE_S)
            for _ in range(20)
        ]
        for stream in streams:
            error = _error(lambda s=stream: list(s))
            # So many at once that gRPC itself turned it away, as Busy or by refusing the stream.
            refused = isinstance(error, HostLost) and "RST_STREAM with error code 7" in str(error)
            assert refused or isinstance(error, Unauthenticated | Busy)
            call()
        with served(listener) as second:
            second()
            call()
            assert len(listener._threads._running) <= 2 * 2, "those of the honest"
            assert listener._server._state.active_rpc_count == 2  # pyright: ignore[reportAttributeAccessIssue]
        never.set()
    listener.close()


# ---- impostors -----------------------------------------------------------------------------------


class Impostor:
    """Listens where a host did, and lets in whoever comes."""

    def __init__(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        self.heard: list[bytes] = []
        self._metadata = metadata
        self._server = grpc.server(ThreadPoolExecutor(4), handlers=[self])  # pyright: ignore[reportArgumentType]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        answers = {"Dispatch": self.welcome(), "Put": b"", "Get": self.weights()}
        said = answers[details.method.rpartition("/")[2]]

        def everything(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            context.send_initial_metadata(self._metadata)
            if details.method.endswith("Dispatch"):
                self.heard.append(next(messages))
                yield said
            self.heard += messages
            if not details.method.endswith("Dispatch"):
                yield said

        return grpc.stream_stream_rpc_method_handler(everything)

    def welcome(self) -> bytes:
        frame = Frame()
        frame.welcome.wire_version, frame.welcome.incarnation = WIRE_VERSION, 7
        return frame.SerializeToString()

    def weights(self) -> bytes:
        data = safetensors.torch.save({"up": torch.full((3,), float("nan"))})
        key = WeightsKey(model=KEY.model, layer=KEY.layer, expert=KEY.expert, version=1)
        checksum = xxhash.xxh3_64_intdigest(data)
        return WeightsChunk(
            key=key, total_bytes=len(data), checksum=checksum, data=data
        ).SerializeToString()

    def close(self) -> None:
        self._server.stop(None).wait(DEADLINE_S)


# All that an impostor can know: what routers show it, and the proofs of hosts of its own.
ANSWERS: dict[str, bytes | None] = {
    "nothing": None,
    "what it was shown": proof_hash(OURS.proof("experts", MEANT)),
    "the answer of another cluster": reply_hash(THEIRS.proof("experts", MEANT)),
    "the answer of an earlier start": reply_hash(OURS.proof("experts", target("host", 6))),
}


@pytest.mark.parametrize("given", ANSWERS)
def test_an_impostor_is_told_nothing_and_believed_nothing(given: str) -> None:
    value = ANSWERS[given]
    impostor = Impostor(() if value is None else (("moesaic-answer-bin", value),))
    try:
        proof = OURS.proof("experts", MEANT)
        channel = GrpcChannel("host", impostor.address, router="r", proof=proof)
        with (
            pytest.raises(AssertionError, match="only 0 of 1")
            if value is None
            else (pytest.raises(HostLost, match="did not prove"))
        ):
            hear(channel, timeout_s=2.0)
        channel.close()
        proof = OURS.proof("weights", MEANT)
        with pytest.raises((HostLost, Expired)):
            get_weights(impostor.address, ONE, timeout_s=2.0, max_bytes=MOST, proof=proof)
        with pytest.raises((HostLost, Expired)):
            secret = {"up": torch.full((64,), 3.25)}
            put_weights(impostor.address, ONE, secret, timeout_s=2.0, proof=proof)
        hidden = torch.full((64,), 3.25).numpy().tobytes()
        assert not any(hidden in message for message in impostor.heard), "weights were sent"
        assert not any(OURS.proof(plane, MEANT) in b"".join(impostor.heard) for plane in PLANES)
    finally:
        impostor.close()


# ---- shared memory -------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def local(clock: Clock) -> Iterator[ShmListener]:
    one = ShmListener(secret=OURS, target=MEANT, clock=clock)
    yield one
    one.close()


def silent_socket(listener: ShmListener) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("\0" + listener.address)
    return sock


def ended(session: Session) -> bool:
    if not readable(session, 0):
        return False
    with pytest.raises(HostLost):
        session.receive()
    return True


@pytest.mark.parametrize(
    "proof",
    [
        os.urandom(32),
        THEIRS.proof("shm", MEANT),
        OURS.proof("shm", target("host", 8)),
        OURS.proof("experts", MEANT),
        OURS.reveal(),
    ],
    ids=["rubbish", "another cluster", "another start", "another service", "the secret itself"],
)
def test_of_a_hello_without_the_proof_nothing_is_looked_at(
    local: ShmListener, proof: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(local) as call:
        stranger = ShmChannel(
            "host", local.address, router="x", slots=2, slot_bytes=4096, proof=proof
        )

        def looked_at(*_: object) -> None:
            raise AssertionError("a stranger's memory is looked at")

        for name in ("_sealed", "_Memory", "open_shared"):
            monkeypatch.setattr(shm, name, looked_at)
        session = accept(local)
        assert "proof" in str(hear_end(session))
        session.close()
        hear_end(stranger)
        stranger.close()
        call()


def test_a_hello_is_due_in_time(local: ShmListener, clock: Clock) -> None:
    with served(local) as call, silent_socket(local):
        session = accept(local)
        clock.now += HELLO_S - 0.1
        assert not local.accept()
        assert not ended(session)
        clock.now += 0.2
        assert not local.accept()
        assert ended(session)
        session.close()
        call()
        clock.now += 100
        assert not local.accept()
        call()


def test_a_hello_that_has_come_counts_however_late_the_host_looks(
    local: ShmListener, clock: Clock
) -> None:
    channel = ShmChannel(
        "host",
        local.address,
        router="r",
        slots=2,
        slot_bytes=4096,
        proof=OURS.proof("shm", MEANT),
    )
    session = accept(local)
    clock.now += 10 * HELLO_S
    assert hear(session)[0].frame.HasField("hello")
    assert not local.accept()
    assert not ended(session)
    channel.close()
    session.close()


def test_those_that_say_nothing_are_bounded(local: ShmListener) -> None:
    with contextlib.ExitStack() as stack:
        sessions: list[Session] = []
        for _ in range(MAX_UNANNOUNCED + 5):
            stack.enter_context(silent_socket(local))
            sessions += local.accept()
        for session in sessions:
            stack.callback(session.close)
        assert [ended(one) for one in sessions] == [True] * 5 + [False] * MAX_UNANNOUNCED
        call = stack.enter_context(served(local))
        call()


# ---- whole hosts ---------------------------------------------------------------------------------


def routers(host: ExpertHost) -> int:
    return host.report().loop.routers


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_host_welcomes_its_own_cluster_alone(transport: Transport) -> None:
    with local_hosts(1, secret=OURS) as (host,):
        honest = connect(host.entry(), transport, router="r", slots=1, secret=OURS)
        assert hear(honest)[0].frame.welcome.host == host.name
        stranger = connect(host.entry(), transport, router="x", slots=1, secret=THEIRS)
        hear_end(stranger)
        stranger.close()
        assert settles(lambda: routers(host) == 1)
        ping = Frame()
        ping.ping.seq = 3
        honest.send(ping)
        assert hear(honest)[0].frame.pong.seq == 3
        honest.close()


def test_a_host_sends_away_who_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "HELLO_S", 0.2)
    with local_hosts(1, secret=OURS) as (host,), contextlib.ExitStack() as stack:
        honest = connect(host.entry(), "shm", router="r", slots=1, secret=OURS)
        stack.callback(honest.close)
        hear(honest)
        silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(10)]
        for sock in silent:
            stack.enter_context(sock)
            sock.settimeout(DEADLINE_S)
            sock.connect("\0" + host.entry().shm_address)
        for sock in silent:
            assert sock.recv(1) == b"", "it hears that it was sent away"
        assert settles(lambda: routers(host) == 1)


def test_an_expert_comes_from_the_start_of_a_peer_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address alone may be another one's by now."""
    with serving(save_model(tmp_path)) as pool:
        giver, taker = pool.hosts
        layer, (expert, *_) = next(iter(giver.report().holdings.items()))
        one = ExpertVersion(layer.expert(expert), 1)
        assert not holds(taker, one)

        def from_disk(wanted: ExpertVersion) -> None:
            raise AssertionError(f"{wanted} is read from the checkpoint")

        monkeypatch.setattr(taker._store, "load", from_disk)
        earlier = replace(giver.entry(), incarnation=giver.incarnation - 1)
        with pytest.raises(Unauthenticated):
            taker.load([(pool.ref, pool.shape)], [one], {one: earlier})
        assert not holds(taker, one)
        taker.load([(pool.ref, pool.shape)], [one], {one: giver.entry()})
        assert holds(taker, one)


def holds(host: ExpertHost, weights: ExpertVersion) -> bool:
    model, layer, expert = weights.key
    held = host.report().holdings.get(LayerKey(model, layer), {})
    return weights.version in held.get(expert, ())
