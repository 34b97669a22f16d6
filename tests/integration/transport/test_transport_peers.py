"""Peers that do not keep to the wire: only their own connection ends, and with a reason."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import socket
from collections.abc import Iterator

import grpc
import pytest
import torch

from moesaic.actors.transport import process_group
from moesaic.actors.transport.base import Listener
from moesaic.actors.transport.grpc import stream as grpc_stream
from moesaic.actors.transport.grpc.border import from_grpc
from moesaic.actors.transport.grpc.stream import METHOD, SERVICE
from moesaic.proto.errors import CallError, ClusterError, Expired, MoesaicError
from moesaic.proto.expert_pb2 import Frame
from moesaic.proto.limits import CHUNK_BYTES, MAX_PAYLOAD_BYTES
from moesaic.proto.wire import WIRE_VERSION
from tests.helpers.pool.transports import (
    DEADLINE_S,
    KINDS,
    SECRET,
    accept,
    channel_to,
    greet,
    hear,
    hear_end,
    listen,
    member,
    open_things,
    round_trip,
    send_call,
    settles,
)

SLOT = 4096


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    """However many peers misbehave, they cost no descriptor and no thread."""
    with survivor("grpc"), survivor("shm"), survivor("group"):
        pass  # gRPC and gloo open what they keep for the whole process
    before = open_things()
    yield
    assert settles(lambda: all(a <= b for a, b in zip(open_things(), before, strict=True)))


@contextlib.contextmanager
def survivor(kind: str) -> Iterator[Listener]:
    """A listener that must serve a good router before and after."""
    listener = listen(kind)
    good = channel_to(kind, listener.address, slot_bytes=SLOT)
    session = greet(listener)
    hear(good)
    yield listener
    round_trip(good, session, 1)
    late = channel_to(kind, listener.address, slot_bytes=SLOT)
    late_session = greet(listener)
    hear(late)
    round_trip(late, late_session, 1)
    for side in (good, session, late, late_session, listener):
        side.close()


def hello(
    *,
    version: int = WIRE_VERSION,
    slots: int = 2,
    slot_bytes: int = SLOT,
    group: str = "",
    handle: bytes = b"",
) -> bytes:
    frame = Frame()
    frame.hello.group = group
    if handle:
        memory = frame.hello.device_memory
        memory.device, memory.handle, memory.counter_handle = "no such GPU", handle, b"name"
    frame.hello.wire_version, frame.hello.router = version, "bad"
    frame.hello.slots, frame.hello.slot_bytes = slots, slot_bytes
    frame.hello.proof = SECRET.proof("shm", "")
    return frame.SerializeToString()


def call(seq: int, **fields: int | bytes | bool) -> bytes:
    frame = Frame()
    frame.call.seq = seq
    for name, value in fields.items():
        setattr(frame.call, name, value)
    return frame.SerializeToString()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 4, 1 << 40])
def test_hosts_that_answer_in_another_size(kind: str, size: int) -> None:
    listener = listen(kind)
    channel = channel_to(kind, listener.address, slot_bytes=SLOT)
    session = greet(listener)
    hear(channel)
    send_call(channel, 1)
    hear(session)
    frame = Frame()
    frame.reply.seq, frame.reply.payload_bytes = 1, size
    if kind == "group":
        # Torch is not told of it: nothing has been sent, and nothing is waited for.
        session.send(frame)
    else:
        session.send_reply(frame, torch.zeros(min(size, 4), dtype=torch.uint8))
    assert "1" in str(hear_end(channel))
    for side in (channel, session, listener):
        side.close()


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_of_another_version(kind: str) -> None:
    listener = listen(kind)
    channel = channel_to(kind, listener.address, slot_bytes=SLOT)
    session = accept(listener)
    hear(session)
    frame = Frame()
    frame.welcome.wire_version = WIRE_VERSION + 1
    session.send(frame)
    assert "wire_version" in str(hear_end(channel))
    for side in (channel, session, listener):
        side.close()


# ---- shared memory ------------------------------------------------------------------------------


def memfd(size: int = 2 * SLOT, seals: int = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) -> int:
    fd = os.memfd_create("bad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def pipe_end() -> int:
    end, other = os.pipe()
    os.close(other)
    return end


def read_only() -> int:
    fd = memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


SHM_GREETINGS = {
    "garbage": (b"\xff\xfe garbage", None),
    "empty frame": (b"\x12\x00", memfd),
    "a call first": (call(1), memfd),
    "no descriptor": (hello(), None),
    "a pipe": (hello(), pipe_end),
    "not sealed": (hello(), lambda: memfd(seals=0)),
    "may grow only": (hello(), lambda: memfd(seals=fcntl.F_SEAL_GROW)),
    "sealed against writing": (
        hello(),
        lambda: memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE),
    ),
    "read-only": (hello(), read_only),
    "smaller than announced": (hello(), lambda: memfd(SLOT)),
    "larger than announced": (hello(), lambda: memfd(3 * SLOT)),
    "no slots": (hello(slots=0), lambda: memfd(SLOT)),
    "too many slots": (hello(slots=1 << 31), memfd),
    "slots that are not aligned": (hello(slot_bytes=100), lambda: memfd(200)),
    "another version": (hello(version=WIRE_VERSION + 1), memfd),
    "device memory that is no handle": (hello(handle=b"short"), None),
    "device memory of another GPU": (hello(handle=b"h" * 64), None),
    "too long": (b"\0" * (1 << 16), memfd),
}


@contextlib.contextmanager
def raw_socket(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.connect("\0" + address)
        yield sock


@pytest.mark.parametrize("greeting", SHM_GREETINGS)
def test_shm_greetings(greeting: str) -> None:
    data, make_fd = SHM_GREETINGS[greeting]
    with survivor("shm") as listener, raw_socket(listener.address) as sock:
        fds = [make_fd()] if make_fd else []
        socket.send_fds(sock, [data], fds)
        session = accept(listener)
        hear_end(session)
        session.close()
        assert sock.recv(1) == b"", "the router hears the end"
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff garbage",
        b"\0" * (1 << 16),
        call(2, slot=2),
        call(2, slot=1 << 31),
        call(2, slot=1, payload_bytes=SLOT + 1),
    ],
    ids=["garbage", "too long", "slot", "far slot", "payload_bytes"],
)
def test_shm_frames(bad: bytes) -> None:
    with survivor("shm") as listener, raw_socket(listener.address) as sock:
        fd = memfd()
        socket.send_fds(sock, [hello()], [fd])
        os.close(fd)
        session = accept(listener)
        assert hear(session)[0].frame.HasField("hello")
        sock.send(call(1, payload_bytes=64))
        sock.send(bad)
        sock.send(call(3, payload_bytes=64))
        # What came before is heard, what came behind is not.
        assert hear(session)[0].frame.call.seq == 1
        hear_end(session)
        session.close()


# ---- gRPC ---------------------------------------------------------------------------------------


class RawStream:
    """A router that sends whatever bytes it likes."""

    def __init__(self, address: str, method: str = METHOD) -> None:
        self._channel = member(address)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stream = self._channel.stream_stream(f"/{SERVICE}/{method}")(
            iter(self._queue.get, None), timeout=DEADLINE_S
        )

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._queue.put(message)

    def error(self) -> MoesaicError:
        """How the stream ends."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self._stream)
        return from_grpc(caught.value, "host")

    def close(self) -> None:
        self._queue.put(None)
        self._channel.close()


GRPC_STREAMS = {
    "garbage": ([b"\xff\xfe garbage"], "not a frame"),
    "nothing": ([hello(), b""], "kind"),
    "no Hello": ([call(1)], "before the Hello"),
    "two Hellos": ([hello(), hello()], "after the Hello"),
    "another version": ([hello(version=WIRE_VERSION + 1)], "wire_version"),
    "a group that the spec does not ask for": ([hello(group="gloo")], "spec allows none"),
    "a group of no backend": ([hello(group="mpi")], "asks for the backend 'mpi'"),
    "a group without CUDA": ([hello(group="nccl")], "nccl"),
    "a host's frame": ([hello(), b"\x12\x00"], "welcome"),
    "fewer bytes": ([hello(), call(1, payload_bytes=9, payload=b"12345678")], "payload_bytes"),
    "more bytes": ([hello(), call(1, payload_bytes=7, payload=b"12345678")], "payload_bytes"),
    "a chunk without head": ([hello(), call(1, payload=b"1234")], "payload_bytes"),
    "a last chunk too many": (
        [hello(), call(1, payload_bytes=4, payload=b"1234"), call(1, payload=b"1234")],
        "payload_bytes",
    ),
    "ends early": (
        [hello(), call(1, payload_bytes=12, payload=b"1234", more=True), call(1, payload=b"1234")],
        "payload_bytes",
    ),
    "grows beyond": (
        [hello(), call(1, payload_bytes=6, payload=b"1234", more=True), call(1, payload=b"1234")],
        "payload_bytes",
    ),
    "an empty chunk": ([hello(), call(1, payload_bytes=8, more=True)], "payload_bytes"),
    "begins again": (
        [hello(), *[call(1, payload_bytes=8, payload=b"1234", more=True)] * 2],
        "begins again",
    ),
    "more than a call may have": (
        [hello(), call(1, payload_bytes=MAX_PAYLOAD_BYTES + 1, payload=b"1", more=True)],
        "payload_bytes",
    ),
    "more than all may have": (
        [
            hello(),
            *[
                call(seq, payload_bytes=MAX_PAYLOAD_BYTES // 2 + 1, payload=b"1", more=True)
                for seq in (1, 2)
            ],
        ],
        "payload_bytes",
    ),
}


# Of these the host's loop hears nothing at all.
NO_HELLO = {
    "garbage",
    "no Hello",
    "another version",
    "a group that the spec does not ask for",
    "a group of no backend",
}


@pytest.mark.parametrize("case", GRPC_STREAMS)
def test_grpc_streams(case: str) -> None:
    messages, reason = GRPC_STREAMS[case]
    with survivor("group" if case == "a group without CUDA" else "grpc") as listener:
        raw = RawStream(listener.address)
        raw.send(*messages)
        if case not in NO_HELLO:
            session = accept(listener)
            lost = hear_end(session, frames=True)
            assert reason in str(lost)
            session.close()
        error = raw.error()
        assert isinstance(error, CallError)
        assert reason in str(error)
        assert not listener.accept()
        raw.close()


def test_group_that_nobody_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "MEET_TIMEOUT_S", 0.3)
    with survivor("group") as listener:
        raw = RawStream(listener.address)
        raw.send(hello(group="gloo"))
        session = accept(listener)
        assert "gloo: " in str(hear_end(session))
        session.close()
        raw.close()


def test_grpc_message_beyond_the_limit() -> None:
    with survivor("grpc") as listener:
        raw = RawStream(listener.address)
        raw.send(hello(), call(1, payload_bytes=2 * CHUNK_BYTES, payload=b"1" * 2 * CHUNK_BYTES))
        session = accept(listener)
        hear_end(session, frames=True)
        assert isinstance(raw.error(), MoesaicError)
        session.close()
        raw.close()


def test_grpc_method_that_does_not_exist() -> None:
    with survivor("grpc") as listener:
        raw = RawStream(listener.address, "Dispose")
        assert isinstance(raw.error(), ClusterError)
        raw.close()


def test_grpc_router_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_stream, "HELLO_S", 0.3)
    with survivor("grpc") as listener:
        raw = RawStream(listener.address)
        error = raw.error()
        assert isinstance(error, Expired)
        assert "hello: the router sent none within 0.3 s" in str(error)
        assert not listener.accept()
        raw.close()


def test_not_even_http() -> None:
    with survivor("grpc") as listener:
        ip, _, port = listener.address.rpartition(":")
        with socket.create_connection((ip, int(port)), DEADLINE_S) as sock:
            sock.sendall(b"\0" * 1000)
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1000):
                    pass
