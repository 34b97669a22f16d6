"""gRPC between machines: one long-lived stream `Experts.Dispatch` for each router and host.

The owner's thread never calls gRPC. It puts frames into an outbox, from which a thread of gRPC
writes, and takes frames from an inbox, which has a descriptor. A reading thread fills the inbox; it
holds the other side back by not asking gRPC for the next message.

The bytes in flight are bounded, and every wait has an end:

- A router's unanswered calls have at most ``max_inflight_bytes`` together, unless there is only
  one. A further call waits in `send_call` until answers have made room, but no longer than its own
  timeout. Then it is refused as Expired, as its host would refuse it on arrival.
- A host never waits to send. It reads no more from a router while the replies that the router has
  not taken and the calls that the host's loop has not taken exceed ``max_held_bytes`` together.
- Beyond these bounds, a side that has taken nothing for `STALL_S` is lost: HostLost is raised, and
  the connection ends. Within the bounds, the deadlines of calls deal with a frozen side.

With a group (`process_group.py`) the stream carries only frames. gRPC's threads send and receive
the tensors that each frame announces: the writing thread after the frame, the reading thread before
the next frame. So frames keep their order, no other thread waits, and the pair ends with the
stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator

import grpc
import torch
from torch import Tensor

from ....proto.errors import CallError, ClusterError, Expired, HostLost, MoesaicError
from ....proto.expert_pb2 import Call, Frame, Reply
from ....proto.expert_pb2_grpc import add_WeightsServicer_to_server
from ....proto.keys import ClusterSecret, secret_of_process
from ....proto.limits import (
    CHUNK_BYTES,
    HELLO_S,
    MAX_ARRIVING_BYTES,
    MAX_GETS,
    MAX_INFLIGHT_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_PUTS,
    MAX_ROUTERS,
    MAX_SLOT_BYTES,
    MAX_UNANNOUNCED,
)
from ....proto.wire import WIRE_VERSION, CallLayout
from ..base import InboundFrame, Session, call_of, check_slot, check_version
from ..budget import SharedLimit
from ..mailbox import Mailbox
from ..process_group import ROUTER_RANK, Pair
from .border import (
    CHANNEL_OPTIONS,
    CLOSE_S,
    HOST_OPTIONS,
    ThreadPerTask,
    aborting,
    close_channel,
    from_grpc,
)
from .health import HostHealth, add_health
from .inbox import STALL_S, Inbox
from .interceptors import HostAuthInterceptor, check_answer, show_proof
from .outbox import Outbox
from .session import GrpcSession, SessionTerms
from .stalls import StallWatcher
from .weights import BulkStore, Weights, WeightsStore

# The generated stubs would parse whole messages; this code handles them as bytes.
SERVICE, METHOD = "moesaic.v1.Experts", "Dispatch"
# The RPCs that gRPC itself admits. Each kind of RPC has a lower limit of its own, which is refused
# with a reason; the extra 128 are threads for RPCs that are being refused.
MAX_RPCS = MAX_UNANNOUNCED + MAX_ROUTERS + MAX_PUTS + MAX_GETS + 128
_MAX_WAITING_FRAMES = 4096
_CPU = torch.device("cpu")


class GrpcChannel:
    """A router's side of one connection."""

    def __init__(
        self,
        host: str,
        address: str,
        *,
        router: str,
        max_inflight_bytes: int = MAX_INFLIGHT_BYTES,
        slot_bytes: int = MAX_SLOT_BYTES,
        group: str = "",
        device: torch.device = _CPU,
        proof: bytes | None = None,
    ) -> None:
        """Connect without waiting; the host's Welcome arrives as the first frame.

        ``proof`` is what the host asks for (None: the proof for a listener of this process).
        ``group`` is the backend that carries tensors, if any, and ``device`` the device for NCCL.
        If no host listens at ``address``, or the group cannot be made, `receive` raises HostLost.
        Raises HostLost if this side cannot use ``group``.
        """
        try:
            self._pair = Pair(host, group, device) if group else None
        except CallError as error:
            raise HostLost(str(error)) from error
        self._host = host
        self._slot_bytes = slot_bytes
        self._max_inflight_bytes = max_inflight_bytes
        self._answered = threading.Event()
        # seq -> (bytes of the call, bytes of its reply if they are known)
        self._inflight: dict[int, tuple[int, int | None]] = {}
        # Running totals, each written by one thread only. Their difference is in flight.
        self._sent_bytes = self._answered_bytes = 0
        self._scratch = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        moved = threading.Event()
        self._outbox = Outbox(moved)
        self._inbox = Inbox(
            host,
            moved,
            kinds=("welcome", "reply", "refusal", "pong", *(("rendezvous",) if group else ())),
            max_payload_bytes=slot_bytes,
            max_arriving_bytes=MAX_PAYLOAD_BYTES,
            check=self._check,
            accept=self._accept,
        )
        hello = Frame()
        hello.hello.wire_version = WIRE_VERSION
        hello.hello.router = router
        hello.hello.group = group
        if self._pair is not None:
            self._inbox.carry(self._pair)
            self._outbox.carry(self._pair, self._inbox.end)
        self._outbox.send(hello)
        self._grpc = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._proof = proof or secret_of_process().proof("experts", "")
        proven = show_proof(self._grpc, self._proof)
        self._stream = proven.stream_stream(f"/{SERVICE}/{METHOD}")(self._outbox)
        self._reader = threading.Thread(target=self._read, name=f"from-{host}", daemon=True)
        self._reader.start()

    @property
    def host(self) -> str:
        return self._host

    @property
    def slot_bytes(self) -> int:
        return self._slot_bytes

    def fileno(self) -> int:
        return self._inbox.fileno()

    def send_call(self, frame: Frame, layout: CallLayout, write: Callable[[Tensor], None]) -> None:
        self._inbox.check_open()
        kind = "backward" if frame.HasField("backward") else "call"
        call = call_of(frame)
        size = call.payload_bytes
        check_slot(layout, self._slot_bytes)
        if not self._has_room(size) and not self._wait_for_room(call):
            self._refuse(call.seq)
            return
        # The outbox copies small calls, so they can all be written into the same warm buffer.
        if self._pair is not None:
            buffer = self._pair.buffer(size)
        elif size <= CHUNK_BYTES:
            buffer = self._scratch[:size]
        else:
            buffer = torch.empty(size, dtype=torch.uint8)
        write(buffer)
        self._sent_bytes += size
        self._inflight[call.seq] = (size, layout.reply_bytes if kind == "call" else None)
        if self._pair is not None:
            self._outbox.send_beside(frame, buffer)
        else:
            self._outbox.send_tensors(kind, frame, buffer.numpy().data)

    def send(self, frame: Frame) -> None:
        self._inbox.check_open()
        self._outbox.send(frame)

    def receive(self) -> list[InboundFrame]:
        return self._inbox.receive()

    def release(self, seq: int) -> None:
        """Free the room of a call that was not answered; replies have memory of their own."""
        call_bytes, _ = self._inflight.pop(seq, (0, None))
        self._sent_bytes -= call_bytes

    def close(self) -> None:
        self._end(HostLost(f"{self._host}: this side has closed the connection"))
        close_channel(self._grpc, CLOSE_S)
        for thread in (self._reader, self._outbox.thread):
            if thread is not None:
                thread.join(CLOSE_S)
        self._inbox.close()

    def _end(self, error: MoesaicError) -> None:
        self._inbox.end(error)
        self._outbox.finish()
        self._stream.cancel()
        if self._pair is not None:
            self._pair.abort()
        self._answered.set()

    def _has_room(self, size: int) -> bool:
        inflight = self._sent_bytes - self._answered_bytes
        return not inflight or inflight + size <= self._max_inflight_bytes

    def _wait_for_room(self, call: Call) -> bool:
        """Return whether there was room before the call's deadline. Raises HostLost."""
        until = time.monotonic() + call.timeout_us * 1e-6
        while True:
            self._answered.clear()
            self._inbox.check_open()
            if self._has_room(call.payload_bytes):
                return True
            if self._outbox.stalled_s() > STALL_S:
                self._end(HostLost(f"{self._host}: it has read nothing for {STALL_S:g} s"))
                continue
            remaining = until - time.monotonic()
            if remaining <= 0:
                return False
            self._answered.wait(min(remaining, STALL_S / 8))

    def _refuse(self, seq: int) -> None:
        frame = Frame()
        frame.refusal.seq = seq
        frame.refusal.code = Expired.__name__
        frame.refusal.message = (
            f"call {seq}: too many bytes were in flight until its deadline, so it was not sent"
        )
        self._inbox.put(frame)

    # ---- gRPC's threads -------------------------------------------------------------------------

    def _accept(self, kind: str, frame: Frame) -> bool:
        if kind == "rendezvous" and self._pair is not None:
            if self._pair.joined:
                raise CallError("rendezvous: the host sent one although the group exists already")
            self._pair.join(ROUTER_RANK, frame.rendezvous.store_address)
            return False
        if kind == "welcome":
            check_version(frame.welcome.wire_version, self._host)
            if self._pair is not None and not self._pair.joined:
                raise CallError("group: the host sent its Welcome before it had made the group")
        if kind not in ("reply", "refusal"):
            return True
        seq = frame.reply.seq if kind == "reply" else frame.refusal.seq
        call_bytes, reply_bytes = self._inflight.pop(seq, (0, -1))
        if reply_bytes == -1:
            return False  # the call was answered before, or given up
        self._answered_bytes += call_bytes
        if not self._answered.is_set():
            self._answered.set()
        if kind == "reply":
            _check_size(frame.reply, reply_bytes)
        return True

    def _check(self, kind: str, part: Call | Reply) -> None:
        """Check that a reply has the size that its call expects. Raises CallError if not.

        A reply to a call that was given up may have any size up to that of a slot.
        """
        _, wanted = self._inflight.get(part.seq, (0, None))
        _check_size(part, wanted)

    def _read(self) -> None:
        end: MoesaicError = HostLost(f"{self._host}: the host closed the connection")
        try:
            check_answer(self._stream, self._proof)
            # The calls in flight bound the bytes of replies, and only reading replies makes room.
            # So this limit counts frames, not bytes.
            self._inbox.read(self._stream, full=lambda: len(self._inbox) > _MAX_WAITING_FRAMES)
        except grpc.RpcError as error:
            end = from_grpc(error, self._host)
        except HostLost as impostor:
            end = HostLost(f"{self._host}: {impostor}")
        finally:
            self._end(end)


def _check_size(reply: Call | Reply, wanted: int | None) -> None:
    if wanted not in (None, reply.payload_bytes):
        raise CallError(
            f"payload_bytes: the reply to call {reply.seq} has {reply.payload_bytes} bytes, but "
            f"{wanted} were expected"
        )


class GrpcListener:
    """A host's gRPC server: streams of routers and, if the host has a store, weights."""

    def __init__(
        self,
        bind: str = "127.0.0.1:0",
        *,
        weights: WeightsStore | None = None,
        bulk: BulkStore | None = None,
        health: HostHealth | None = None,
        max_held_bytes: int = 256 << 20,
        device: torch.device = _CPU,
        groups: Collection[str] = (),
        fits: Callable[[Call], None] = lambda _: None,
        secret: ClusterSecret | None = None,
        target: str = "",
    ) -> None:
        """Listen on ``bind`` (ip:port; port 0: any free one).

        ``weights`` are experts that hosts load, and ``bulk`` a training run's tensors; ``health``
        answers health checks.
        ``device`` is the device for NCCL, and ``groups`` are the backends that routers may ask for.
        ``fits`` raises CallError for a call that fits no model; it is asked before memory is
        allocated for a call in chunks or in a group. Only members of the cluster that has
        ``secret`` (None: that of this process) can connect, with a proof for ``target``
        (`keys.target`). Raises ClusterError if this process cannot listen on ``bind``.
        """
        self._sessions: Mailbox[Session] = Mailbox()
        self._threads = ThreadPerTask("grpc")
        self._stalls = StallWatcher()
        self._unannounced = SharedLimit(MAX_UNANNOUNCED, "connections without a Hello")
        self._routers = SharedLimit(MAX_ROUTERS, "routers")
        dispatch = grpc.stream_stream_rpc_method_handler(self._dispatch)
        self._server = grpc.server(
            self._threads,  # pyright: ignore[reportArgumentType]  # gRPC submits, and no more
            handlers=[grpc.method_handlers_generic_handler(SERVICE, {METHOD: dispatch})],
            interceptors=[HostAuthInterceptor(secret or secret_of_process(), target)],
            options=HOST_OPTIONS,
            maximum_concurrent_rpcs=MAX_RPCS,
        )
        if weights is not None or bulk is not None:
            self._weights = Weights(weights, bulk, self._stalls)
            add_WeightsServicer_to_server(self._weights, self._server)
        if health is not None:
            add_health(health, self._server)
        try:
            port = self._server.add_insecure_port(bind)
        except RuntimeError as error:
            self._sessions.close()
            raise ClusterError(f"bind: cannot listen on {bind}: {error}") from error
        ip = bind.rpartition(":")[0]
        self._address = f"{ip}:{port}"
        self._terms = SessionTerms(
            bind=ip.strip("[]"),
            device=device,
            groups=frozenset(groups),
            max_held_bytes=max_held_bytes,
            arriving=SharedLimit(MAX_ARRIVING_BYTES, "bytes of calls that arrive"),
            fits=fits,
        )
        self._server.start()

    @property
    def address(self) -> str:
        return self._address

    def fileno(self) -> int:
        return self._sessions.fileno()

    def accept(self) -> list[Session]:
        return self._sessions.take()

    def close(self) -> None:
        """End all connections; the caller still has to close sessions that it accepted."""
        self._server.stop(CLOSE_S).wait(2 * CLOSE_S)
        self._stalls.close()
        self._threads.join(CLOSE_S)
        for session in self._sessions.take():
            session.close()
        self._sessions.close()

    def _dispatch(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        with aborting(context), self._unannounced.holding():
            session = GrpcSession(context, self._terms, lambda: self._admit(session, context))
            replies = session.serve(messages, self._threads)
            session.wait_for_hello(HELLO_S)
        self._sessions.put(session)
        return replies

    def _admit(self, session: GrpcSession, context: grpc.ServicerContext) -> None:
        """Give a router that sent its Hello a place until its stream is over. Raises Busy."""
        place = self._routers.share()
        place.take(1)
        self._stalls.watch(session)

        def leave() -> None:
            self._stalls.forget(session)
            place.close()

        if not context.add_callback(leave):
            leave()
