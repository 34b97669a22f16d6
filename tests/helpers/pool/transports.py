"""All transports behind one face, and hosts and routers in processes that can be killed.

python -m tests.helpers.pool.transports host shm
python -m tests.helpers.pool.transports router grpc ADDRESS
python -m tests.helpers.pool.transports serve FOLDER NAME DEVICE lends kept ADDRESS SECONDS PID
python -m tests.helpers.pool.transports serve FOLDER NAME cpu slots lends
python -m tests.helpers.pool.transports pair PIECES
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import grpc
import torch
from torch import Tensor

from moesaic.actors.transport.base import Channel, InboundFrame, Listener, Session
from moesaic.actors.transport.grpc.interceptors import show_proof
from moesaic.actors.transport.grpc.stream import GrpcChannel, GrpcListener
from moesaic.actors.transport.process_group import HOST_RANK, PIECE_BYTES, Pair
from moesaic.actors.transport.shm import ShmChannel, ShmListener
from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion, first_versions
from moesaic.proto.errors import HostLost, NotHere
from moesaic.proto.expert_pb2 import FLOAT32, Frame
from moesaic.proto.keys import ClusterSecret, Grant, Plane, secret_of_process
from moesaic.proto.wire import WIRE_VERSION, CallLayout

KINDS = ("shm", "grpc", "group")
DEADLINE_S = 20.0
START_S = 60.0  # of a process that imports torch and transformers, where others want the cores
SLOT_BYTES = 40 << 20
HIDDEN = 16
# The processes of one test are one cluster.
_SECRET_VARIABLE = "SECRET_OF_A_TEST"
SECRET = (
    ClusterSecret(bytes.fromhex(os.environ[_SECRET_VARIABLE]))
    if _SECRET_VARIABLE in os.environ
    else secret_of_process()
)


def listen(kind: str) -> Listener:
    if kind == "shm":
        return ShmListener(secret=SECRET)
    groups = ("gloo", "nccl") if kind == "group" else ()
    return GrpcListener(weights=DictStore(), groups=groups, secret=SECRET)


def channel_to(
    kind: str, address: str, *, router: str = "router", slots: int = 4, slot_bytes: int = SLOT_BYTES
) -> Channel:
    if kind == "shm":
        proof = SECRET.proof("shm", "")
        return ShmChannel(
            "host", address, router=router, slots=slots, slot_bytes=slot_bytes, proof=proof
        )
    group = "gloo" if kind == "group" else ""
    proof = SECRET.proof("experts", "")
    return GrpcChannel(
        "host", address, router=router, slot_bytes=slot_bytes, group=group, proof=proof
    )


def member(address: str, plane: Plane = "experts") -> grpc.Channel:
    """A bare channel to a listener of this process, with its proof."""
    return show_proof(grpc.insecure_channel(address), SECRET.proof(plane, ""))


def readable(side: Channel | Session | Listener, timeout_s: float = DEADLINE_S) -> bool:
    poll = select.poll()
    poll.register(side.fileno(), select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def hear(
    side: Channel | Session, count: int = 1, *, timeout_s: float = DEADLINE_S
) -> list[InboundFrame]:
    """Exactly ``count`` frames, in the order in which they arrived."""
    heard: list[InboundFrame] = []
    until = time.monotonic() + timeout_s
    while len(heard) < count:
        assert readable(side, until - time.monotonic()), f"only {len(heard)} of {count} arrived"
        heard += side.receive()
    assert len(heard) == count
    return heard


def hear_end(side: Channel | Session, *, frames: bool = False) -> HostLost:
    """The HostLost that ends ``side``; other ``frames`` may arrive before only if that is said."""
    until = time.monotonic() + DEADLINE_S
    while True:
        assert readable(side, until - time.monotonic()), "the end was not noticed"
        try:
            assert not side.receive() or frames
        except HostLost as lost:
            return lost


def accept(listener: Listener) -> Session:
    """The next router's session, before its Hello."""
    until = time.monotonic() + DEADLINE_S
    while True:
        assert readable(listener, until - time.monotonic()), "nobody connected"
        sessions = listener.accept()
        if sessions:
            (session,) = sessions
            return session


def welcome(session: Session) -> None:
    frame = Frame()
    frame.welcome.wire_version = WIRE_VERSION
    frame.welcome.host = "host"
    frame.welcome.incarnation = 7
    session.send(frame)


def greet(listener: Listener) -> Session:
    session = accept(listener)
    assert hear(session)[0].frame.WhichOneof("kind") == "hello"
    welcome(session)
    return session


@contextlib.contextmanager
def connected(
    kind: str, *, slot_bytes: int = SLOT_BYTES
) -> Iterator[tuple[Listener, Channel, Session]]:
    with contextlib.ExitStack() as stack:
        listener = listen(kind)
        stack.callback(listener.close)
        channel = channel_to(kind, listener.address, slot_bytes=slot_bytes)
        stack.callback(channel.close)
        session = greet(listener)
        stack.callback(session.close)
        assert hear(channel)[0].frame.WhichOneof("kind") == "welcome"
        yield listener, channel, session


# ---- calls whose answer shows which call it belongs to ------------------------------------------


def layout_of(rows: int) -> CallLayout:
    return CallLayout.of(rows, HIDDEN, 2, torch.float32, False)


def send_call(channel: Channel, seq: int, rows: int = 1, *, timeout_s: float = 10.0) -> None:
    """A call whose tokens are all ``seq``."""
    layout = layout_of(rows)
    frame = Frame()
    call = frame.call
    call.seq, call.model, call.dtype = seq, "model", FLOAT32
    call.version = 1
    call.rows, call.hidden, call.top_k = rows, HIDDEN, 2
    call.payload_bytes, call.timeout_us = layout.call_bytes, int(timeout_s * 1e6)

    def write(buffer: Tensor) -> None:
        x_TH, ids_TK, weights_TK = layout.call_tensors(buffer)
        x_TH.fill_(seq)
        ids_TK.fill_(3)
        weights_TK.fill_(0.5)

    channel.send_call(frame, layout, write)


def answer(session: Session, inbound: InboundFrame) -> None:
    """The answer is the call's tokens, doubled."""
    call = inbound.frame.call
    layout = CallLayout.of_call(call)
    assert inbound.payload is not None
    x_TH, ids_TK, weights_TK = layout.call_tensors(inbound.payload)
    assert bool((ids_TK == 3).all())
    assert bool((weights_TK == 0.5).all())
    buffer = session.reply_buffer(inbound.frame, layout)
    torch.mul(x_TH, 2, out=layout.reply_tensor(buffer))
    frame = Frame()
    frame.reply.seq = call.seq
    frame.reply.payload_bytes = layout.reply_bytes
    session.send_reply(frame, buffer)


def check_reply(inbound: InboundFrame, rows: int = 1) -> int:
    """The seq of a reply that holds the answer to its own call."""
    reply = inbound.frame.reply
    assert inbound.payload is not None
    y_TH = layout_of(rows).reply_tensor(inbound.payload)
    assert bool((y_TH == 2 * reply.seq).all()), f"reply {reply.seq} holds {y_TH.unique()}"
    return reply.seq


def round_trip(channel: Channel, session: Session, seq: int, rows: int = 1) -> None:
    send_call(channel, seq, rows)
    answer(session, hear(session)[0])
    assert check_reply(hear(channel)[0], rows) == seq
    channel.release(seq)


# ---- what is left behind ------------------------------------------------------------------------


def open_things() -> tuple[int, int]:
    """(descriptors, threads) of this process."""
    gc.collect()  # gRPC's objects hang in the tracebacks of its errors, and hold its descriptors
    return len(list(Path("/proc/self/fd").iterdir())), len(threading.enumerate())


def settles(holds: Callable[[], bool]) -> bool:
    """Whether ``holds`` becomes true in time: gRPC's own threads end a little after their call."""
    until = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not holds():
        if time.monotonic() > until:
            return False
        pause.wait(0.01)
    return True


class DictStore:
    """A host's weights in memory, for one model named `model`."""

    def __init__(self) -> None:
        self.held: dict[ExpertVersion, dict[str, Tensor]] = {}
        self.on_get: Callable[[], object] = lambda: None
        self.most = 256 << 20

    def most_bytes(self, key: ExpertKey) -> int:
        return self.most

    def check_grant(self, given: ExpertVersion, grant: Grant | None) -> None:
        if given.key.model != "model":
            raise NotHere(f"model {given.key.model!r} is unknown to this host")

    def get(self, wanted: ExpertVersion) -> Mapping[str, Tensor]:
        self.on_get()
        if wanted not in self.held:
            raise NotHere(f"{wanted} is not on this host")
        return self.held[wanted]

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        self.held[given] = dict(tensors)


# ---- processes ----------------------------------------------------------------------------------


@contextlib.contextmanager
def process(
    *arguments: str, module: str = "tests.helpers.pool.transports"
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """One of a module's commands, with the first line that it prints; reaped at the end."""
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, _SECRET_VARIABLE: SECRET.reveal().hex()},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        ready = select.select([child.stdout], [], [], START_S)[0]
        assert ready, "the process did not start"
        yield child, child.stdout.readline().strip()
    finally:
        child.send_signal(signal.SIGCONT)
        child.kill()
        child.wait(DEADLINE_S)
        child.stdin.close()
        child.stdout.close()


def run_host(kind: str) -> None:
    """Answers calls until it is killed."""
    listener = listen(kind)
    print(listener.address, flush=True)
    sessions: dict[int, Session] = {}
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                for session in listener.accept():
                    sessions[session.fileno()] = session
                    poll.register(session.fileno(), select.POLLIN)
                continue
            try:
                for inbound in sessions[fd].receive():
                    if inbound.frame.HasField("hello"):
                        welcome(sessions[fd])
                    elif inbound.frame.HasField("call"):
                        answer(sessions[fd], inbound)
            except HostLost:
                poll.unregister(fd)
                sessions.pop(fd).close()


def run_router(kind: str, address: str) -> None:
    """Connects, sends one call, and waits to be killed."""
    channel = channel_to(kind, address)
    send_call(channel, 1)
    print("ready", flush=True)
    sys.stdin.read()


def run_serve(
    folder: str,
    name: str,
    device: str,
    *,
    lends: bool = False,
    slots: bool = False,
    kept: Sequence[str] = (),
) -> None:
    """An expert host that holds the whole model in ``folder``; prints where it is as JSON.

    With ``slots`` the CPU's memory plays a device's. With a memory keeper it prints then how many
    experts it has from its predecessor.
    """
    from moesaic.models.trunk.lean_imports import import_models

    import_models()  # as the processes of hosts do
    from moesaic.actors.host.host import ExpertHost
    from moesaic.actors.host.memory.kept_memory import KeptMemory
    from moesaic.cluster.placement import ModelRef, ModelShape, every_expert
    from moesaic.models.trunk.config import read_config
    from moesaic.models.trunk.experts_layers import experts_layers
    from moesaic.models.trunk.trunk import meta_model

    if slots:
        from moesaic.actors.host import host as host_file
        from tests.helpers.pool.serving import store_in_slots

        host_file.ExpertStore = store_in_slots  # pyright: ignore[reportAttributeAccessIssue]
    layers = experts_layers(meta_model(read_config(Path(folder))))
    shape = ModelShape(model="m", experts={la.layer: la.num_experts for la in layers})
    # Routers of the tests reach it over all transports.
    transport = "device" if device.startswith("cuda") else "group"
    host = ExpertHost(
        name,
        node="here",
        device=device,
        threads=1,
        transport=transport,
        secret=SECRET,
        lends=lends,
        kept=KeptMemory(kept[0], name, keep_s=float(kept[1]), parent_pid=int(kept[2]))
        if kept
        else None,
    )
    ref = ModelRef(name="m", dtype="float32", path=folder)
    host.load([(ref, shape)], first_versions(every_expert([shape])))
    print(json.dumps(asdict(host.entry())), flush=True)
    if kept:
        print(host.report().adopted, flush=True)
    sys.stdin.read()
    host.close()


def run_pair(count: int) -> None:
    """The host's side of a pair, which takes only so many pieces."""
    pair = Pair("router", "gloo", torch.device("cpu"))
    address = pair.open("127.0.0.1")
    print(address, flush=True)
    pair.join(HOST_RANK, address)
    for _ in range(count):
        pair.receive(PIECE_BYTES)
    sys.stdin.read()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["host", kind]:
            run_host(kind)
        case ["router", kind, address]:
            run_router(kind, address)
        case ["serve", folder, name, device, *options]:
            kept = options[options.index("kept") + 1 :] if "kept" in options else ()
            flags = {flag: flag in options for flag in ("lends", "slots")}
            run_serve(folder, name, device, kept=kept, **flags)
        case ["pair", count]:
            run_pair(int(count))
