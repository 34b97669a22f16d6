"""What gRPC streams add to the common interface: turns, bounds, and what happens beyond them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from moesaic.actors.transport.grpc import session as grpc_session
from moesaic.actors.transport.grpc import stream as grpc_stream
from moesaic.actors.transport.grpc.stream import METHOD, SERVICE, GrpcChannel, GrpcListener
from moesaic.proto.errors import ClusterError, HostLost
from moesaic.proto.expert_pb2 import FLOAT32, Frame
from moesaic.proto.wire import WIRE_VERSION
from tests.helpers.pool.transports import (
    DEADLINE_S,
    HIDDEN,
    accept,
    answer,
    check_reply,
    connected,
    greet,
    hear,
    hear_end,
    layout_of,
    member,
    process,
    readable,
    send_call,
    settles,
)
from tests.helpers.processes.frozen import freeze

MIB = 1 << 20


def rows_of(size: int) -> int:
    return size // (HIDDEN * 4)


@contextlib.contextmanager
def bounded(max_inflight_bytes: int) -> Iterator[tuple[GrpcChannel, grpc_session.GrpcSession]]:
    listener = GrpcListener()
    channel = GrpcChannel(
        "host", listener.address, router="r", max_inflight_bytes=max_inflight_bytes
    )
    session = greet(listener)
    assert isinstance(session, grpc_session.GrpcSession)
    hear(channel)
    try:
        yield channel, session
    finally:
        for side in (channel, session, listener):
            side.close()


def test_a_small_call_overtakes_a_large_one() -> None:
    with connected("grpc") as (_, channel, session):
        large = rows_of(16 * MIB)
        send_call(channel, 1, large)
        send_call(channel, 2)
        calls = hear(session, 2)
        assert [inbound.frame.call.seq for inbound in calls] == [2, 1]
        answer(session, calls[1])
        answer(session, calls[0])
        small, big = hear(channel, 2)
        assert (check_reply(small), check_reply(big, large)) == (2, 1)


def test_a_cancel_stays_behind_its_call() -> None:
    with connected("grpc") as (_, channel, session):
        send_call(channel, 1, rows_of(8 * MIB))
        cancel = Frame()
        cancel.cancel.seq = 1
        channel.send(cancel)
        assert [i.frame.WhichOneof("kind") for i in hear(session, 2)] == ["call", "cancel"]


def test_a_call_beyond_the_bound_waits_for_answers() -> None:
    with bounded(MIB) as (channel, session):
        rows = rows_of(MIB // 2)
        send_call(channel, 1, rows)
        (first,) = hear(session)

        def answer_later() -> None:
            answer(session, first)
            answer(session, hear(session)[0])

        helper = threading.Timer(0.1, answer_later)
        helper.start()
        start = time.monotonic()
        send_call(channel, 2, rows)
        assert time.monotonic() - start >= 0.1
        assert [check_reply(reply, rows) for reply in hear(channel, 2)] == [1, 2]
        helper.join(DEADLINE_S)


def test_a_call_beyond_the_bound_expires_with_its_own_deadline() -> None:
    with bounded(MIB) as (channel, session):
        rows = rows_of(MIB // 2)
        send_call(channel, 1, rows)
        send_call(channel, 2, rows, timeout_s=0.05)
        (refused,) = hear(channel)
        assert (refused.frame.refusal.seq, refused.frame.refusal.code) == (2, "Expired")
        # The host never heard of it, and the connection goes on.
        answer(session, hear(session)[0])
        assert check_reply(hear(channel)[0], rows) == 1
        send_call(channel, 3, rows)
        assert hear(session)[0].frame.call.seq == 3


def test_one_call_larger_than_the_bound_goes_alone() -> None:
    with bounded(MIB) as (channel, session):
        rows = rows_of(4 * MIB)
        send_call(channel, 1, rows)
        answer(session, hear(session)[0])
        assert check_reply(hear(channel)[0], rows) == 1


def test_a_host_that_takes_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "STALL_S", 0.3)
    with process("host", "grpc") as (child, address):
        channel = GrpcChannel("host", address, router="r", max_inflight_bytes=MIB)
        hear(channel)
        freeze(child.pid)
        send_call(channel, 1, rows_of(24 * MIB))  # more than sockets hold
        with pytest.raises(HostLost, match="read nothing"):
            send_call(channel, 2, timeout_s=DEADLINE_S)
        hear_end(channel)
        channel.close()


class MuteRouter:
    """Sends calls as fast as the host takes them, and reads nothing."""

    def __init__(self, address: str, calls: int, size: int) -> None:
        self.sent = 0
        self._calls = calls
        self._layout = layout_of(rows_of(size))
        self._channel = member(address)
        self._stream = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._frames())

    def _frames(self) -> Iterator[bytes]:
        hello, frame = Frame(), Frame()
        hello.hello.wire_version, hello.hello.router = WIRE_VERSION, "mute"
        yield hello.SerializeToString()
        call, layout = frame.call, self._layout
        call.rows, call.hidden, call.top_k = layout.rows, layout.hidden, layout.top_k
        call.dtype, call.payload_bytes = FLOAT32, layout.call_bytes
        buffer = torch.empty(layout.call_bytes, dtype=torch.uint8)
        x_TH, ids_TK, weights_TK = layout.call_tensors(buffer)
        x_TH.fill_(1)
        ids_TK.fill_(3)
        weights_TK.fill_(0.5)
        call.payload = buffer.numpy().tobytes()
        for seq in range(self._calls):
            call.seq = seq
            yield frame.SerializeToString()
            self.sent += 1

    def close(self) -> None:
        self._stream.cancel()
        self._channel.close()


def test_a_host_asks_for_no_more_than_it_holds() -> None:
    listener = GrpcListener(max_held_bytes=2 * MIB)
    router = MuteRouter(listener.address, calls=200, size=MIB // 2)
    session = accept(listener)
    seen = -1

    def stands_still() -> bool:
        nonlocal seen
        seen, before = router.sent, seen
        threading.Event().wait(0.2)
        return seen == before > 0

    assert settles(stands_still)
    assert router.sent < 100
    heard = session.receive()
    assert sum(i.payload.numel() for i in heard if i.payload is not None) <= 3 * MIB
    # Taking what is there brings the rest.
    calls = len(heard) - 1
    while calls < 200:
        assert readable(session)
        calls += len(session.receive())
    for side in (router, session, listener):
        side.close()


def test_a_router_that_takes_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_session, "STALL_S", 0.3)
    listener = GrpcListener(max_held_bytes=2 * MIB)
    router = MuteRouter(listener.address, calls=100, size=MIB // 2)
    session = accept(listener)
    with pytest.raises(HostLost, match="read nothing"):
        while readable(session):
            for inbound in session.receive():
                if inbound.frame.HasField("call"):
                    answer(session, inbound)
    session.close()
    router.close()
    listener.close()


def test_a_port_that_is_taken() -> None:
    listener = GrpcListener()
    with pytest.raises(ClusterError, match=listener.address):
        GrpcListener(listener.address)
    listener.close()
