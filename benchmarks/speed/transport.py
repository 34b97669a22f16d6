"""Round trips of the transports alone, against the least that the same bytes can cost.

    python -m benchmarks.speed.transport [--json PATH] [--only shm|grpc] [--anywhere]

`shm` is held against a memcpy into shared memory and a one-byte doorbell, `grpc` against a bare
bidirectional stream; every host is a process of its own that answers with as many bytes as it got.

Router and hosts have cores of their own, as where both are busy. With `--anywhere` the kernel
places them: it runs the raw pair on one core, where a wake-up costs a tenth, and the pair with more
to do now on one and now on two.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import mmap
import os
import queue
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Comparison, compare, report
from moesaic.actors.transport.base import Channel, Listener, Session
from moesaic.actors.transport.grpc.stream import GrpcChannel, GrpcListener
from moesaic.actors.transport.shm import ShmChannel, ShmListener
from moesaic.proto.errors import HostLost
from moesaic.proto.expert_pb2 import FLOAT32, Frame
from moesaic.proto.keys import ClusterSecret, secret_of_process
from moesaic.proto.wire import WIRE_VERSION, CallLayout

SIZES = {"64 B": 64, "4 KB": 4 << 10, "64 KB": 64 << 10, "512 KB": 512 << 10, "4 MB": 4 << 20}
TARGETS = {"shm": 3.0, "grpc": 1.5}
DEADLINE_S = 30.0
_HIDDEN = 16
# Both sides of a comparison are one cluster.
_SECRET = "SECRET_OF_A_BENCHMARK"
_SLOT_BYTES = 16 << 20
_BARE_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]


@functools.cache
def _layout(size: int) -> CallLayout:
    return CallLayout.of(size // (4 * _HIDDEN), _HIDDEN, 1, torch.float32, False)


# ---- ours ----------------------------------------------------------------------------------------


class OurRouter:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._seq = 0
        self._epoll = select.epoll()
        self._epoll.register(channel.fileno(), select.EPOLLIN)
        self._next()  # Welcome

    def _next(self) -> Frame:
        if not self._epoll.poll(DEADLINE_S):
            raise TimeoutError
        (inbound,) = self._channel.receive() or self._channel.receive()
        return inbound.frame

    def round_trip(self, size: int) -> Callable[[], None]:
        layout = _layout(size)
        source = np.ones(layout.call_bytes, dtype=np.uint8)
        frame = Frame()
        call = frame.call
        call.model, call.dtype, call.timeout_us = "model", FLOAT32, 2_000_000
        call.rows, call.hidden, call.top_k = layout.rows, layout.hidden, layout.top_k
        call.payload_bytes = layout.call_bytes

        def write(buffer: Tensor) -> None:
            buffer.numpy()[: layout.call_bytes] = source

        def round_trip() -> None:
            self._seq += 1
            call.seq = self._seq
            self._channel.send_call(frame, layout, write)
            seq = self._next().reply.seq
            assert seq == self._seq
            self._channel.release(seq)

        return round_trip

    def close(self) -> None:
        self._channel.close()
        self._epoll.close()


def serve_ours(listener: Listener) -> None:
    print(listener.address, flush=True)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    session: Session | None = None
    with contextlib.suppress(HostLost):  # the benchmark is over
        while True:
            for fd, _ in epoll.poll():
                if fd == listener.fileno():
                    (session,) = listener.accept()
                    epoll.register(session.fileno(), select.EPOLLIN)
                elif session is not None:
                    _answer(session)


def _answer(session: Session) -> None:
    for inbound in session.receive():
        frame, payload = inbound.frame, inbound.payload
        answer = Frame()
        if payload is None:
            answer.welcome.wire_version = WIRE_VERSION
            session.send(answer)
            continue
        layout = _layout(frame.call.rows * 4 * _HIDDEN)
        buffer = session.reply_buffer(frame, layout)
        buffer.numpy()[:] = payload.numpy()[: layout.reply_bytes]
        answer.reply.seq = frame.call.seq
        answer.reply.payload_bytes = layout.reply_bytes
        session.send_reply(answer, buffer)


# ---- the least it can cost -----------------------------------------------------------------------


class RawShm:
    """A memcpy into a shared mapping, a byte over a socket, and the same back."""

    def __init__(self, sock: socket.socket, fd: int) -> None:
        self._sock = sock
        self._map = mmap.mmap(fd, 2 * _SLOT_BYTES)

    def round_trip(self, size: int) -> Callable[[], None]:
        layout = _layout(size)
        source = bytes(layout.call_bytes)
        shared = memoryview(self._map)
        self._sock.send(layout.reply_bytes.to_bytes(8, "little"))
        self._sock.recv(1)

        def call() -> None:
            shared[: len(source)] = source
            self._sock.send(b"!")
            self._sock.recv(1)

        return call

    def serve(self) -> None:
        shared = memoryview(self._map)
        size = 0
        while message := self._sock.recv(8):
            if len(message) == 8:
                size = int.from_bytes(message, "little")
            else:
                shared[_SLOT_BYTES : _SLOT_BYTES + size] = shared[:size]
            self._sock.send(b"!")


class BareGrpc:
    """One stream, messages as they are, an iterator over a queue on one side."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=_BARE_OPTIONS)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies = self._channel.stream_stream("/bare/Echo")(iter(self._queue.get, None))

    def round_trip(self, size: int) -> Callable[[], None]:
        layout = _layout(size)
        source = bytes(layout.call_bytes)

        def call() -> None:
            self._queue.put(source)
            next(self._replies)

        return call

    def close(self) -> None:
        self._queue.put(None)
        self._channel.close()


def serve_bare_grpc() -> None:
    handler = grpc.stream_stream_rpc_method_handler(_echo)
    server = grpc.server(
        ThreadPoolExecutor(2),
        handlers=[grpc.method_handlers_generic_handler("bare", {"Echo": handler})],
        options=_BARE_OPTIONS,
    )
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(None)


def _echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


# ---- processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def child(kind: str, *fds: int, anywhere: bool) -> Iterator[str]:
    """A host in a process of its own; gives the line that it prints."""
    command = [sys.executable, "-m", "benchmarks.speed.transport", "--serve", kind, *map(str, fds)]
    command += ["--anywhere"] * anywhere
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        env=os.environ | {_SECRET: secret_of_process().reveal().hex()},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        try:
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _half_of_the_cores(which: int) -> set[int]:
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[which::2]) or set(cores)


def _parents_secret() -> ClusterSecret:
    return ClusterSecret(bytes.fromhex(os.environ[_SECRET]))


def serve(kind: str, fds: list[int], *, anywhere: bool) -> None:
    torch.set_num_threads(1)
    if not anywhere:
        os.sched_setaffinity(0, _half_of_the_cores(1))
    match kind:
        case "shm":
            serve_ours(ShmListener(secret=_parents_secret()))
        case "grpc":
            serve_ours(GrpcListener(secret=_parents_secret()))
        case "raw shm":
            print("ready", flush=True)
            RawShm(socket.socket(fileno=fds[0]), fds[1]).serve()
        case "bare grpc":
            serve_bare_grpc()


def run(only: str | None = None, *, anywhere: bool = False) -> list[Comparison]:
    torch.set_num_threads(1)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create("raw")
    os.ftruncate(memory, 2 * _SLOT_BYTES)
    with contextlib.ExitStack() as stack:
        stack.callback(mine.close)
        stack.callback(os.close, memory)
        shm_address = stack.enter_context(child("shm", anywhere=anywhere))
        grpc_address = stack.enter_context(child("grpc", anywhere=anywhere))
        bare_address = stack.enter_context(child("bare grpc", anywhere=anywhere))
        stack.enter_context(child("raw shm", theirs.fileno(), memory, anywhere=anywhere))
        theirs.close()
        if not anywhere:
            os.sched_setaffinity(0, _half_of_the_cores(0))
        shm = OurRouter(
            ShmChannel("host", shm_address, router="r", slots=4, slot_bytes=_SLOT_BYTES)
        )
        stack.callback(shm.close)
        over_grpc = OurRouter(GrpcChannel("host", grpc_address, router="r"))
        stack.callback(over_grpc.close)
        bare = BareGrpc(bare_address)
        stack.callback(bare.close)
        raw = RawShm(mine, memory)
        stack.callback(mine.shutdown, socket.SHUT_RDWR)
        pairs = {"shm": (shm, "raw shm", raw), "grpc": (over_grpc, "bare grpc", bare)}
        return [
            compare(
                f"{name}, {label}",
                {name: ours.round_trip(size), base: least.round_trip(size)},
                ours=name,
                base=base,
                target=TARGETS[name],
                calls=200 if size < 1 << 20 else 20,
            )
            for name, (ours, base, least) in pairs.items()
            if only in (None, name)
            for label, size in SIZES.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--anywhere", action="store_true", help="let the kernel choose the cores")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        kind, *fds = arguments.serve
        serve(kind, [int(fd) for fd in fds], anywhere=arguments.anywhere)
        return
    results = run(arguments.only, anywhere=arguments.anywhere)
    report("Transport round trips", results, arguments.json)


if __name__ == "__main__":
    main()
