"""Strangers and an honest router side by side: it is served throughout, with the same answers."""

from __future__ import annotations

import resource
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
import safetensors.torch
import torch
from torch import Tensor

from moesaic.actors import attach
from moesaic.actors.granting import grant_all
from moesaic.actors.host import ExpertHost, local_hosts
from moesaic.actors.router import Router
from moesaic.actors.store import ModelRef
from moesaic.actors.transport import grpc_session, grpc_stream, stalls, weights
from moesaic.actors.transport.grpc_border import from_grpc
from moesaic.actors.transport.pair import Pair
from moesaic.actors.transport.weights import Grant, get_weights, put_weights
from moesaic.cluster.placement import ExpertKey, ModelShape, every_expert
from moesaic.models.trunk import experts_layers
from moesaic.proto.errors import (
    Busy,
    CallError,
    Expired,
    Forbidden,
    HostLost,
    MoesaicError,
    Superseded,
)
from moesaic.proto.expert_pb2 import FLOAT32, Frame, WeightsChunk, WeightsKey
from moesaic.proto.expert_pb2_grpc import WeightsStub
from moesaic.proto.keys import ClusterSecret, secret_of_process
from moesaic.proto.limits import CHUNK_BYTES, HELLO_S
from moesaic.proto.wire import CallLayout
from tests.helpers.architectures import tiny_model
from tests.helpers.pools import granted
from tests.helpers.serving import EXPERTS, HIDDEN, KEY, LAYER, Hosts, inputs, save_model, serving
from tests.helpers.strangers import HTTP2_HELLO, Stream, connections, ended, hello, shown
from tests.helpers.transports import DEADLINE_S, settles

pytestmark = pytest.mark.alone  # deadlines are kept by the clock
MIB = 1 << 20
ONE = ExpertKey("m", LAYER, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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
        first: Tensor | None = None
        try:
            while not stop.is_set():
                began = time.monotonic()
                answer = self.router.forward(KEY, *self.given)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                torch.testing.assert_close(answer, wanted, atol=1e-5, rtol=1e-5)
                first = answer if first is None else first
                assert torch.equal(answer, first)
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
        finally:
            stop.set()
            asking.join(DEADLINE_S)
        if one.failure is not None:
            raise one.failure
        assert one.answers > 0
        assert one.router.stats().retries == 0, "it was served by its only connection"
        assert one.slowest_s < 5.0
        assert one.host._loop.alive


# ---- who says nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("says", [b"", HTTP2_HELLO[:10], HTTP2_HELLO], ids=["tcp", "half", "http2"])
def test_connections_that_say_nothing_end(folder: Path, says: bytes) -> None:
    with honest(folder) as one:
        began = time.monotonic()
        with connections(one.host.entry().grpc_address, 300, says) as made:
            one.newcomer_is_served()
            assert all(map(ended, made))
        assert time.monotonic() - began < HELLO_S + 2.0


def test_streams_that_say_no_hello_end_and_lock_nobody_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than a host has places for: the first ones end in time, others at once."""
    monkeypatch.setattr(grpc_stream, "MAX_UNANNOUNCED", 20)
    with honest(folder) as one, ExitStack() as stack:
        began = time.monotonic()
        streams = []
        for _ in range(60):
            streams.append(Stream(one.host.entry()))
            stack.callback(streams[-1].close)
        errors = [stream.error() for stream in streams]
        assert time.monotonic() - began < HELLO_S + 8.0
        kinds = {type(error) for error in errors}
        assert kinds == {Expired, Busy}, kinds
        late = [str(error) for error in errors if isinstance(error, Expired)]
        assert "hello: a router says it within 2 s" in late[0]
        one.newcomer_is_served()
        assert settles(lambda: one.host.report().loop.routers == 1)


def test_routers_have_places_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "MAX_ROUTERS", 3)
    with honest(folder) as one:
        entry = one.host.entry()
        seconds = [Stream(entry) for _ in range(2)]
        for stream in seconds:
            stream.send(hello())
            assert stream.hear().HasField("welcome")
        one_more = Stream(entry)
        one_more.send(hello())
        error = one_more.error()
        assert isinstance(error, Busy)
        assert "routers: 3 of 3 are in use" in str(error)
        # Weights go on, and so does the next router when one has left.
        most = one.host._store.most_bytes(ONE)
        fetched(one.host, most)
        seconds[0].close()
        assert settles(lambda: one.host.report().loop.routers == 2)
        one.newcomer_is_served()
        for stream in (*seconds, one_more):
            stream.close()


def test_a_loop_without_descriptors_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever took them: what cannot be accepted now is no reason to leave."""
    with honest(folder) as one:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        address = "\0" + one.host.entry().shm_address
        with ExitStack() as stack:
            silent = [
                stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                for _ in range(3)
            ]
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(), hard))
            for each in silent:
                each.settimeout(DEADLINE_S)
                each.connect(address)
            answers = one.answers
            assert settles(lambda: one.answers > answers + 20)
            assert one.host._loop.alive
            assert "cannot accept a connection" in caplog.text
        over_shm = one.pool.router(transport="shm")
        over_shm.forward(KEY, *one.given)


def lowest_free_descriptor() -> int:
    with Path("/dev/null").open() as one:
        return one.fileno()


# ---- groups -------------------------------------------------------------------------------------


def listening() -> set[int]:
    here = psutil.Process().net_connections("tcp")
    return {each.laddr.port for each in here if each.status == psutil.CONN_LISTEN}


def test_no_group_where_the_spec_asks_for_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(Pair, "open", lambda self, bind: opened.append(bind))
    with honest(folder, transport="auto") as one:
        before = listening()
        stream = Stream(one.host.entry())
        stream.send(hello(group="gloo"))
        error = stream.error()
        assert isinstance(error, CallError)
        assert "asks for 'gloo'; this host makes no groups" in str(error)
        stream.close()
        assert listening() == before
        assert not opened


def call_bytes(seq: int, size: int, *, hidden: int = HIDDEN, rows: int = 1) -> bytes:
    frame = Frame()
    call = frame.call
    call.seq, call.model, call.layer, call.dtype = seq, "m", LAYER, FLOAT32
    call.rows, call.hidden, call.top_k, call.payload_bytes = rows, hidden, 2, size
    return frame.SerializeToString()


def honest_size(rows: int, hidden: int = HIDDEN) -> int:
    return CallLayout.of(rows, hidden, 2, torch.float32, False).call_bytes


@pytest.mark.parametrize(
    ("rows", "hidden", "size", "reason"),
    [
        (1, HIDDEN, 40 * MIB, "payload_bytes: 41943040, but 1 rows x 32"),
        (1, HIDDEN, 1, "payload_bytes: 1, but 1 rows"),
        (1, 64, honest_size(1, 64), "hidden: 64, but 'm' has 32"),
        (100_000, HIDDEN, honest_size(100_000), "rows: 100000 exceed this host's 512"),
        (400_000, HIDDEN, honest_size(400_000), "bytes, a slot has"),
    ],
    ids=["larger", "smaller", "hidden", "rows", "slot"],
)
def test_torch_is_not_told_of_a_size_that_no_call_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int, hidden: int, size: int, reason: str
) -> None:
    received: list[int] = []
    real = Pair.receive

    def receive(self: Pair, size: int) -> Tensor:
        received.append(size)
        return real(self, size)

    monkeypatch.setattr(Pair, "receive", receive)
    # Two that meet by themselves: the stranger's own side need not be there for the host's check.
    monkeypatch.setattr(grpc_session.GrpcSession, "_meet", unmet)
    with honest(folder) as one:
        stream = Stream(one.host.entry())
        stream.send(hello(group="gloo"), call_bytes(1, size, rows=rows, hidden=hidden))
        error = stream.error()
        assert isinstance(error, CallError)
        assert reason in str(error)
        assert not received
        stream.close()


def unmet(self: grpc_session.GrpcSession, backend: str) -> None:
    self._pair = Pair(self.router, backend, torch.device("cpu"))
    self._inbox.carry(self._pair)


# ---- calls that fill memory ---------------------------------------------------------------------


def first_chunk(seq: int, rows: int) -> bytes:
    frame = Frame.FromString(call_bytes(seq, honest_size(rows), rows=rows))
    frame.call.payload, frame.call.more = bytes(1000), True
    return frame.SerializeToString()


def rest(seq: int, size: int) -> list[bytes]:
    messages = []
    for start in range(0, size, CHUNK_BYTES):
        frame = Frame()
        frame.call.seq = seq
        frame.call.payload = bytes(min(CHUNK_BYTES, size - start))
        frame.call.more = start + CHUNK_BYTES < size
        messages.append(frame.SerializeToString())
    return messages


def test_arriving_calls_are_bounded_over_all_routers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 500
    monkeypatch.setattr(grpc_stream, "MAX_ARRIVING_BYTES", 2 * honest_size(rows) + 100)
    with honest(folder) as one:
        streams = [Stream(one.host.entry()) for _ in range(3)]
        budget = arriving(one.host)
        for number, stream in enumerate(streams):
            stream.send(hello())
            assert stream.hear().HasField("welcome")
            stream.send(first_chunk(1, rows))
            least = min(number + 1, 2) * honest_size(rows)
            assert settles(lambda least=least: budget.held == least)
        # The third one's bytes are not kept, and it hears so when it has sent them.
        streams[2].send(*rest(1, honest_size(rows) - 1000))
        refusal = streams[2].hear().refusal
        assert (refusal.seq, refusal.code) == (1, "Busy")
        assert "bytes of calls that arrive" in refusal.message
        # One that the host has taken makes room.
        streams[0].send(*rest(1, honest_size(rows) - 1000))
        assert streams[0].hear().refusal.code == "Corrupted"  # it has no checksum
        assert settles(lambda: budget.held == honest_size(rows))
        streams[2].send(first_chunk(2, rows))
        assert settles(lambda: budget.held == 2 * honest_size(rows))
        for stream in streams:
            stream.close()
        assert settles(lambda: budget.held == 0)


def test_a_call_that_stands_still_ends_its_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalls, "STILL_S", 0.3)
    with honest(folder) as one:
        stream = Stream(one.host.entry())
        stream.send(hello())
        stream.hear()
        stream.send(first_chunk(1, 500))
        assert isinstance(stream.error(), HostLost)
        assert settles(lambda: arriving(one.host).held == 0)
        assert settles(lambda: one.host.report().loop.routers == 1)
        stream.close()


def arriving(host: ExpertHost):
    listener = host._loop._listeners[1]
    assert isinstance(listener, grpc_stream.GrpcListener)
    return listener._terms.arriving


# ---- weights ------------------------------------------------------------------------------------


def fetched(host: ExpertHost, most: int, timeout_s: float = DEADLINE_S) -> dict[str, Tensor]:
    entry = host.entry()
    with grpc.insecure_channel(entry.grpc_address) as channel:
        wanted = WeightsKey(model="m", layer=LAYER, expert=1)
        try:
            chunks = WeightsStub(channel).Get(
                wanted, timeout=timeout_s, metadata=shown(entry, "weights")
            )
            return weights._load(weights._join(weights._head(chunks), chunks, most))
        except grpc.RpcError as error:
            raise from_grpc(error, "host") from error


def put_raw(
    host: ExpertHost,
    chunks: Iterator[WeightsChunk],
    *,
    key: ExpertKey = ONE,
    grant: Grant | None = None,
    timeout_s: float = DEADLINE_S,
) -> None:
    entry = host.entry()
    grant = grant or granted(host, key)
    metadata = (
        *shown(entry, "weights"),
        ("moesaic-term", str(grant.term)),
        ("moesaic-grant-bin", grant.proof),
    )
    with grpc.insecure_channel(entry.grpc_address) as channel:
        try:
            stub = WeightsStub(channel)
            stub.Put.future(chunks, timeout=timeout_s, metadata=metadata).result()
        except grpc.RpcError as error:
            raise from_grpc(error, "host") from error


def test_weights_that_are_too_large_are_refused_with_the_first_chunk(folder: Path) -> None:
    asked = 0

    def chunks() -> Iterator[WeightsChunk]:
        nonlocal asked
        key = WeightsKey(model="m", layer=LAYER, expert=1, version=1)
        yield WeightsChunk(key=key, total_bytes=400 * MIB, crc32=1, data=bytes(CHUNK_BYTES))
        for _ in range(400):
            asked += 1
            yield WeightsChunk(data=bytes(CHUNK_BYTES))

    with honest(folder) as one:
        rss = psutil.Process().memory_info().rss
        with pytest.raises(
            CallError, match=r"total_bytes: 419430400 .* this expert's have 1?\d{4} "
        ):
            put_raw(one.host, chunks())
        assert asked < 100
        assert psutil.Process().memory_info().rss - rss < 64 * MIB
        tensors = fetched(one.host, one.host._store.most_bytes(ONE))
        assert tensors["up"].shape == (96, HIDDEN)


def files(tensors: dict[str, Tensor], key: ExpertKey = ONE) -> Iterator[WeightsChunk]:
    data = safetensors.torch.save(tensors)
    named = WeightsKey(model=key.model, layer=key.layer, expert=key.expert, version=1)
    yield WeightsChunk(key=named, total_bytes=len(data), crc32=zlib.crc32(data), data=data)


Wrong = Callable[[ExpertHost], Grant]


def of(host: ExpertHost, /, **changed: object) -> Grant:
    given = {
        "secret": secret_of_process(),
        "host": host.name,
        "incarnation": host.incarnation,
        "key": ONE,
        "version": 1,
        "term": 0,
        "shown": 0,
    } | changed
    secret = given.pop("secret")
    shown_term = given.pop("shown")
    assert isinstance(secret, ClusterSecret)
    assert isinstance(shown_term, int)
    return Grant(shown_term, secret.grant(*given.values()))  # pyright: ignore[reportArgumentType]


WRONG: dict[str, Wrong] = {
    "nothing": lambda host: Grant(0, b""),
    "another cluster's": lambda host: of(host, secret=ClusterSecret.new()),
    "another host's": lambda host: of(host, host="host-9"),
    "another incarnation's": lambda host: of(host, incarnation=host.incarnation - 1),
    "another expert's": lambda host: of(host, key=ONE._replace(expert=2)),
    "another layer's": lambda host: of(host, key=ONE._replace(layer=0)),
    "another model's": lambda host: of(host, key=ONE._replace(model="n")),
    "another version's": lambda host: of(host, version=2),
    "another term's": lambda host: of(host, term=1),
    "a proof": lambda host: Grant(0, shown(host.entry(), "weights")[0][1]),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("which", WRONG)
def test_a_grant_is_for_one_expert_on_one_host_alone(folder: Path, which: str) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(ONE)
        host.release([ONE])
        wrong = WRONG[which](host)
        with pytest.raises(Forbidden, match="the controller did not grant this"):
            put_raw(host, files(tensors), grant=wrong)
        with pytest.raises(Forbidden):
            put_raw(host, files(tensors), grant=Grant(1 << 40, wrong.proof))
        assert not host._residency.serves(ONE)
        put_raw(host, files(tensors))
        assert host._residency.serves(ONE)


def test_a_grant_of_a_controller_that_is_over_is_refused(folder: Path) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(ONE)
        host.release([ONE], term=4)
        host.report(term=5)
        with pytest.raises(Superseded, match="4 is over"):
            put_raw(host, files(tensors), grant=granted(host, ONE, term=4))
        assert not host._residency.serves(ONE)
        put_raw(host, files(tensors), grant=granted(host, ONE, term=5))
        assert host._residency.serves(ONE)


def test_what_is_served_is_not_replaced(folder: Path) -> None:
    with honest(folder) as one:
        held = {name: tensor.clone() for name, tensor in one.host._store.get(ONE).items()}
        put_raw(one.host, files(held))  # the same once more
        for name, tensor in held.items():
            with pytest.raises(Forbidden, match="serves other tensors under this name"):
                put_raw(one.host, files(held | {name: tensor + 1}))
            with pytest.raises(CallError, match=f"{name} has values that are not finite"):
                put_raw(one.host, files(held | {name: torch.full_like(tensor, torch.nan)}))
        assert all(torch.equal(held[n], t) for n, t in one.host._store.get(ONE).items())


def test_transfers_that_stand_still_end_and_have_bounds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAX_PUTS", 2)
    monkeypatch.setattr(stalls, "STILL_S", 1.0)
    with honest(folder) as one, ExitStack() as stack:
        host, over = one.host, threading.Event()
        stack.callback(over.set)
        tensors = host._store.get(ONE)
        other = ExpertKey("m", 0, 1)
        host.release([other])
        whole = next(files(tensors, other))
        data = whole.data

        def stuck(half: bool) -> Iterator[WeightsChunk]:
            if half:
                whole.data = data[:100]
                yield whole
            over.wait(DEADLINE_S)

        errors: list[MoesaicError] = []

        def put(half: bool) -> None:
            try:
                put_raw(host, stuck(half), key=other)
            except MoesaicError as error:
                errors.append(error)

        putting = [threading.Thread(target=put, args=(half,)) for half in (True, False)]
        for each in putting:
            each.start()
        budget = servicer(host)._puts
        assert settles(lambda: budget.held == 2)
        with pytest.raises(Busy, match="weights that are put: 2 of 2 are in use"):
            put_raw(host, files(tensors, other), key=other)
        fetched(host, host._store.most_bytes(ONE))
        assert settles(lambda: budget.held == 0)
        for each in putting:
            each.join(DEADLINE_S)
        assert [type(error) for error in errors] == [HostLost, HostLost]
        assert servicer(host)._bytes.held == 0
        put_raw(host, files(tensors, other), key=other)


def test_a_put_waits_for_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        tensors = host._store.get(ONE)
        host.release([ONE])
        places = servicer(host)._puts
        held = places.share()
        held.take(places.most)
        threading.Timer(0.3, held.close).start()
        put_weights(
            host.entry().grpc_address,
            ONE,
            tensors,
            timeout_s=DEADLINE_S,
            grant=granted(host, ONE),
            proof=proof_of(host),
        )
        assert host._residency.serves(ONE)


def test_a_fetch_that_is_larger_than_its_model_says(folder: Path) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        most = host._store.most_bytes(ONE)
        address = host.entry().grpc_address
        with pytest.raises(CallError, match="total_bytes"):
            get_weights(
                address, ONE, timeout_s=DEADLINE_S, max_bytes=most // 2, proof=proof_of(host)
            )
        get_weights(address, ONE, timeout_s=DEADLINE_S, max_bytes=most, proof=proof_of(host))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_the_bound_of_a_file_is_near_its_size(folder: Path, expert: int) -> None:
    with serving(folder, hosts=1) as pool:
        (host,) = pool.hosts
        key = ExpertKey("m", LAYER, expert)
        size = len(safetensors.torch.save(host._store.get(key)))
        assert size <= host._store.most_bytes(key) < size + 2048


def servicer(host: ExpertHost) -> weights.Weights:
    listener = host._loop._listeners[1]
    assert isinstance(listener, grpc_stream.GrpcListener)
    return listener._weights


def proof_of(host: ExpertHost) -> bytes:
    return secret_of_process().proof("weights", host.entry().target)


def test_attached_experts_are_put_with_the_controllers_grants() -> None:
    model = tiny_model("mixtral")
    layers = {layer.layer: layer for layer in experts_layers(model)}
    shape = ModelShape(model="memory", experts={n: la.num_experts for n, la in layers.items()})
    ref = ModelRef(name="memory", dtype="float32", config=model.config.to_dict())
    secret, keys = secret_of_process(), list(every_expert([shape]))
    with local_hosts(1) as (host,):
        host.add_models([(ref, shape)])
        granted_keys = grant_all(secret, host.entry(), keys, term=3)
        assert granted_keys.experts == keys
        for _ in range(2):  # a second time nothing changes
            attach._send(granted_keys, secret, layers)
        assert {(k.model, k.layer, e) for k, es in host.report().holdings.items() for e in es} == {
            tuple(key) for key in keys
        }
        for key in keys:
            wanted = attach.expert_tensors(layers[key.layer], key.expert)
            held = host._store.get(key)
            assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())
        host.report(term=4)
        with pytest.raises(Superseded):
            attach._send(granted_keys, secret, layers)
