"""Strangers and an honest router side by side: it is served throughout, with the same answers."""

from __future__ import annotations

import resource
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from moesaic.actors.host.host import ExpertHost
from moesaic.actors.transport.grpc import session as grpc_session
from moesaic.actors.transport.grpc import stalls
from moesaic.actors.transport.grpc import stream as grpc_stream
from moesaic.actors.transport.grpc.inbox import Inbox
from moesaic.actors.transport.process_group import Pair
from moesaic.proto.errors import Busy, CallError, Expired, HostLost, MoesaicError
from moesaic.proto.expert_pb2 import FLOAT32, Frame
from moesaic.proto.limits import CHUNK_BYTES, HELLO_S
from moesaic.proto.wire import CallLayout
from tests.helpers.pool.honest import ONE, fetched, honest
from tests.helpers.pool.serving import HIDDEN, KEY, LAYER, save_model
from tests.helpers.pool.strangers import HTTP2_HELLO, Stream, connections, ended, hello
from tests.helpers.pool.transports import DEADLINE_S, settles

pytestmark = pytest.mark.alone  # deadlines are kept by the clock
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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
        assert "hello: the router sent none within 2 s" in late[0]
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
        assert "asks for the backend 'gloo', but" in str(error)
        stream.close()
        assert listening() == before
        assert not opened


def call_bytes(seq: int, size: int, *, hidden: int = HIDDEN, rows: int = 1) -> bytes:
    frame = Frame()
    call = frame.call
    call.seq, call.model, call.layer, call.dtype = seq, "m", LAYER, FLOAT32
    call.version = 1
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
        (400_000, HIDDEN, honest_size(400_000), "bytes, but a slot has"),
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
    end = Inbox.end

    def end_and_wait(inbox: Inbox, error: MoesaicError) -> None:
        end(inbox, error)
        if threading.current_thread().name == "stalls":
            time.sleep(0.2)  # the host closes the session meanwhile

    monkeypatch.setattr(stalls, "STILL_S", 0.3)
    monkeypatch.setattr(Inbox, "end", end_and_wait)
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
