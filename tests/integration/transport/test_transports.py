"""What all transports promise, through their common interface."""

from __future__ import annotations

import signal
import threading

import pytest

from moesaic.proto.errors import CallError, HostLost, InternalError
from moesaic.proto.expert_pb2 import Frame
from tests.helpers.pool.transports import (
    KINDS,
    accept,
    answer,
    channel_to,
    check_reply,
    connected,
    greet,
    hear,
    hear_end,
    layout_of,
    listen,
    open_things,
    process,
    readable,
    round_trip,
    send_call,
    settles,
    welcome,
)
from tests.helpers.processes.frozen import freeze

pytestmark = pytest.mark.parametrize("kind", KINDS)

MIB = 1 << 20
ROW_BYTES = layout_of(1).hidden * 4


def test_hello_and_welcome(kind: str) -> None:
    listener = listen(kind)
    channel = channel_to(kind, listener.address, router="trunk-0")
    session = accept(listener)
    (hello,) = hear(session)
    assert hello.frame.hello.router == session.router == "trunk-0"
    welcome(session)
    (greeting,) = hear(channel)
    assert (channel.host, greeting.frame.welcome.incarnation) == ("host", 7)
    for side in (channel, session, listener):
        side.close()


def test_nobody_listens(kind: str) -> None:
    listener = listen(kind)
    address = listener.address
    listener.close()
    with pytest.raises(HostLost):
        channel = channel_to(kind, address)
        try:
            raise hear_end(channel)
        finally:
            channel.close()


@pytest.mark.parametrize("size", [ROW_BYTES, 4096, 65536, MIB - 4096, MIB, 3 * MIB, 16 * MIB])
def test_calls_of_all_sizes(kind: str, size: int) -> None:
    with connected(kind) as (_, channel, session):
        for seq in (1, 2):
            round_trip(channel, session, seq, rows=size // ROW_BYTES)


def test_many_calls_at_once(kind: str) -> None:
    with connected(kind) as (_, channel, session):
        rows = 2 * MIB // ROW_BYTES
        for seq in range(1, 5):
            send_call(channel, seq, rows)
        calls = hear(session, 4)
        for inbound in reversed(calls):
            answer(session, inbound)
        assert sorted(check_reply(reply, rows) for reply in hear(channel, 4)) == [1, 2, 3, 4]


def test_a_call_that_is_too_large(kind: str) -> None:
    with connected(kind, slot_bytes=4096) as (_, channel, session):
        with pytest.raises(CallError, match="rows"):
            send_call(channel, 1, rows=64)
        round_trip(channel, session, 2)


def test_refusal_cancel_ping_and_pong(kind: str) -> None:
    with connected(kind) as (_, channel, session):
        send_call(channel, 1)
        cancel, ping = Frame(), Frame()
        cancel.cancel.seq, ping.ping.seq = 1, 5
        channel.send(cancel)
        channel.send(ping)
        kinds = [inbound.frame.WhichOneof("kind") for inbound in hear(session, 3)]
        assert kinds == ["call", "cancel", "ping"]
        refusal, pong = Frame(), Frame()
        refusal.refusal.seq, refusal.refusal.code, pong.pong.seq = 1, "NotHere", 5
        session.send(refusal)
        session.send(pong)
        first, second = (inbound.frame for inbound in hear(channel, 2))
        assert (first.refusal.seq, first.refusal.code, second.pong.seq) == (1, "NotHere", 5)
        # A refused call is as good as answered: there is room for as many as before.
        for seq in range(2, 10):
            round_trip(channel, session, seq)


def test_answered_twice(kind: str) -> None:
    with connected(kind) as (_, channel, session):
        send_call(channel, 1)
        (call,) = hear(session)
        answer(session, call)
        assert check_reply(hear(channel)[0]) == 1
        channel.release(1)
        answer(session, call)
        round_trip(channel, session, 2)


def test_two_routers(kind: str) -> None:
    with connected(kind) as (listener, first, session_1):
        second = channel_to(kind, listener.address, router="second")
        session_2 = greet(listener)
        hear(second)
        send_call(first, 1)
        send_call(second, 1, rows=2)
        (call_2,) = hear(session_2)
        answer(session_2, call_2)
        assert check_reply(hear(second)[0], rows=2) == 1
        second.close()
        hear_end(session_2)
        session_2.close()
        answer(session_1, hear(session_1)[0])
        assert check_reply(hear(first)[0]) == 1


# ---- ends ---------------------------------------------------------------------------------------


def test_the_host_closes_behind_its_last_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half a second, by default, may be too short for a group on a busy machine.
    monkeypatch.setattr("moesaic.actors.transport.grpc.session.CLOSE_S", 30.0)
    with connected(kind) as (_, channel, session):
        rows = 4 * MIB // ROW_BYTES
        send_call(channel, 1, rows)
        answer(session, hear(session)[0])
        session.close()
        assert check_reply(hear(channel)[0], rows) == 1
        hear_end(channel)
        assert readable(channel), "the end stays readable"
        with pytest.raises(HostLost):
            send_call(channel, 2)
        with pytest.raises(HostLost):
            channel.send(Frame())


def test_the_router_closes(kind: str) -> None:
    with connected(kind) as (_, channel, session):
        channel.close()
        hear_end(session)
        with pytest.raises(HostLost):
            welcome(session)


def test_the_host_is_killed(kind: str) -> None:
    with process("host", kind) as (child, address):
        channel = channel_to(kind, address)
        hear(channel)
        freeze(child.pid)
        send_call(channel, 1)
        child.kill()
        hear_end(channel)
        channel.close()


def test_the_router_is_killed(kind: str) -> None:
    listener = listen(kind)
    with process("router", kind, listener.address) as (child, _):
        session = accept(listener)
        assert hear(session, 2)[1].frame.call.seq == 1
        child.kill()
        hear_end(session)
        session.close()
    # The listener has no part in it.
    channel = channel_to(kind, listener.address)
    session = greet(listener)
    hear(channel)
    round_trip(channel, session, 1)
    for side in (channel, session, listener):
        side.close()


def test_late_answers_belong_to_their_calls(kind: str) -> None:
    """A host freezes; its router gives calls up and goes on; what wakes up late harms nobody."""
    with process("host", kind) as (child, address):
        channel = channel_to(kind, address, slots=3)
        hear(channel)
        freeze(child.pid)
        given_up = [1, 2]
        for seq in given_up:
            send_call(channel, seq)
        assert not readable(channel, 0.05)
        send_call(channel, 3)
        if kind == "shm":
            with pytest.raises(InternalError, match="slots"):
                send_call(channel, 4)
        child.send_signal(signal.SIGCONT)
        replies = hear(channel, 3)
        # Looked at when all have arrived: none was overwritten by another.
        assert [check_reply(reply) for reply in replies] == [1, 2, 3]
        for seq in (1, 2, 3):
            channel.release(seq)
        for seq in range(4, 10):
            send_call(channel, seq)
            assert check_reply(hear(channel)[0]) == seq
            channel.release(seq)
        channel.close()


def test_nothing_is_left(kind: str) -> None:
    def use() -> None:
        with connected(kind) as (_, channel, session):
            round_trip(channel, session, 1, rows=2 * MIB // ROW_BYTES)
            send_call(channel, 2)

    threads, times = threading.active_count(), 10
    use()
    assert settles(lambda: threading.active_count() <= threads)
    before = open_things()

    def leaks() -> bool:
        # gRPC opens a few things now and then that it keeps for the whole process; what a
        # connection leaves behind it leaves each time.
        return any(now - then >= times for now, then in zip(open_things(), before, strict=True))

    for _ in range(times):
        use()
    assert settles(lambda: not leaks()), f"{open_things()}, before {before}"


def test_a_reply_outlives_its_channel(kind: str) -> None:
    """Whoever still holds an answer can read it, whatever was closed meanwhile."""
    with connected(kind) as (_, channel, session):
        send_call(channel, 1)
        (call,) = hear(session)
        answer(session, call)
        (reply,) = hear(channel)
        session.close()
        channel.close()
        assert check_reply(reply) == 1
        assert call.payload is not None
        assert call.payload.sum() > 0


def test_closing_twice(kind: str) -> None:
    with connected(kind) as (listener, channel, session):
        for side in (channel, session, listener):
            side.close()
            side.close()
        with pytest.raises(HostLost):
            channel.receive()
        with pytest.raises(HostLost):
            session.receive()
        assert session.fileno() == channel.fileno() == -1
