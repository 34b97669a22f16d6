"""A host's side of a gRPC stream; `stream.py` describes how streams behave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import grpc
import torch
from torch import Tensor

from ....proto.errors import CallError, Expired, HostLost, MoesaicError
from ....proto.expert_pb2 import Call, Frame, Reply
from ....proto.limits import MAX_INFLIGHT_BYTES, MAX_SLOT_BYTES
from ....proto.wire import CallLayout
from ..base import InboundFrame, check_slot, check_version
from ..budget import SharedLimit
from ..process_group import HOST_RANK, Pair
from . import stalls
from .border import CLOSE_S, ThreadPerTask, from_grpc, to_grpc
from .inbox import STALL_S, Inbox
from .outbox import Outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerms:
    """What a host grants each of its routers."""

    bind: str  # IP at which a group of the two sides meets
    device: torch.device  # the device for NCCL
    groups: Collection[str]  # backends of groups that the cluster's spec allows
    max_held_bytes: int
    arriving: SharedLimit  # bytes of calls in chunks, of all routers
    fits: Callable[[Call], None]  # raises CallError for a call that fits no model of this host


class GrpcSession:
    """A host's side of one connection, which is one RPC."""

    def __init__(
        self, context: grpc.ServicerContext, terms: SessionTerms, admit: Callable[[], None]
    ) -> None:
        """Take over an RPC; ``admit`` is called when the router's Hello arrives.

        It raises Busy if there are too many routers. Nothing is opened for the router before.
        """
        self.router = ""
        self._context = context
        self._terms = terms
        self._admit = admit
        self._pair: Pair | None = None
        self._broken_off: HostLost | None = None  # why this side has cancelled the stream
        self._closing = False  # True: this side closes, and `close` ends the pair
        self._greeted = threading.Event()  # set by the Hello, or by an earlier end
        self._over = threading.Event()
        moved = threading.Event()
        self._outbox = Outbox(moved, self._say_why)
        self._inbox = Inbox(
            context.peer(),
            moved,
            kinds=("hello", "call", "backward", "cancel", "ping"),
            max_payload_bytes=MAX_SLOT_BYTES,
            max_arriving_bytes=MAX_INFLIGHT_BYTES,
            check=self._check,
            accept=self._accept,
            arriving=terms.arriving.share(),
        )

    @property
    def slot_bytes(self) -> int:
        return MAX_SLOT_BYTES

    def fileno(self) -> int:
        return self._inbox.fileno()

    def receive(self) -> list[InboundFrame]:
        return self._inbox.receive()

    def reply_buffer(self, frame: Frame, layout: CallLayout) -> Tensor:
        if self._pair is not None:
            return self._pair.buffer(layout.reply_bytes)
        return torch.empty(layout.reply_bytes, dtype=torch.uint8)

    def send_reply(self, frame: Frame, buffer: Tensor) -> None:
        self._inbox.check_open()
        payload = buffer[: frame.reply.payload_bytes]
        if self._pair is not None:
            self._outbox.send_beside(frame, payload)
        else:
            self._outbox.send_tensors("reply", frame, payload.numpy().data)

    def send(self, frame: Frame) -> None:
        self._inbox.check_open()
        self._outbox.send(frame)

    def close(self) -> None:
        """Close the session after what was sent has left, at most `CLOSE_S` later.

        If the router has left already, do not wait. The listener owns the threads.
        """
        gone = self._inbox.error is not None
        self._closing = not gone
        self._inbox.end(HostLost(f"{self.router}: this side has closed the connection"))
        self._outbox.finish()
        if not gone and not self._over.wait(CLOSE_S):
            self._context.cancel()
        elif not gone and self._pair is not None:
            self._pair.linger(CLOSE_S)
        self._abort_pair()
        self._inbox.close()

    # ---- gRPC's threads -------------------------------------------------------------------------

    def serve(self, messages: Iterator[bytes], threads: ThreadPerTask) -> Iterator[bytes]:
        """Begin to read; return the messages for gRPC's thread of this RPC to write."""
        if not self._context.add_callback(self._over.set):
            self._over.set()
        threads.submit(self._read, messages)
        return self._outbox

    def wait_for_hello(self, timeout_s: float) -> None:
        """Wait for the Hello. Raises Expired if it is late, or the error that ended the stream."""
        if not self._greeted.wait(timeout_s):
            late = Expired(f"hello: the router sent none within {timeout_s:g} s of connecting")
            self._inbox.end(late)
        if not self.router:
            self._inbox.close()
            assert self._inbox.error is not None
            raise self._inbox.error

    def end_if_late(self, now: float) -> bool:
        """End the connection if a call has begun to arrive and then stalled; see `StallWatcher`.

        This frees the call's bytes. Callable from any thread.
        """
        moved_at = self._inbox.moved_at
        if moved_at is None or now - moved_at <= stalls.STILL_S:
            return False
        late = f"{self.router}: no byte of a call has arrived for {stalls.STILL_S:g} s"
        self._break_off(HostLost(late))
        return True

    def _accept(self, kind: str, frame: Frame) -> bool:
        if (kind == "hello") == bool(self.router):
            raise CallError(
                f"a frame of kind {kind!r} arrived {'after' if self.router else 'before'} the Hello"
            )
        if kind == "hello":
            check_version(frame.hello.wire_version, frame.hello.router)
            if not frame.hello.router:
                raise CallError("router: the Hello lacks the router's name")
            group = frame.hello.group
            if group and group not in self._terms.groups:
                allowed = " and ".join(sorted(self._terms.groups)) or "none"
                raise CallError(
                    f"group: {frame.hello.router} asks for the backend {group!r}, but "
                    f"network.transport of the cluster's spec allows {allowed}"
                )
            self._admit()
            self.router = self._inbox.peer = frame.hello.router
            self._greeted.set()
            if group:
                self._meet(group)
        return True

    def _check(self, kind: str, part: Call | Reply) -> None:
        """Check a call's sizes, which follow from its head, against the slot and the model."""
        if not isinstance(part, Call) or kind != "call":
            return  # a backward frame: the host's loop refuses it once it is complete
        layout = CallLayout.of_call(part)
        check_slot(layout, self.slot_bytes)
        self._terms.fits(part)

    def _meet(self, backend: str) -> None:
        """Make a group with the router, before the Hello is delivered and the Welcome is sent."""
        self._pair = Pair(self.router, backend, self._terms.device)
        self._inbox.carry(self._pair)
        self._outbox.carry(self._pair, self._inbox.end)
        frame = Frame()
        frame.rendezvous.store_address = self._pair.open(self._terms.bind)
        # Sending from this thread is safe: the owner sends nothing before it has the Hello.
        self._outbox.send(frame)
        self._pair.join(HOST_RANK, frame.rendezvous.store_address)

    def _abort_pair(self) -> None:
        if self._pair is not None:
            self._pair.abort()

    def _full(self) -> bool:
        """Return whether to stop reading; end the session if the router also takes nothing."""
        if self._inbox.waiting_bytes + self._outbox.unsent_bytes <= self._terms.max_held_bytes:
            return False
        if self._outbox.stalled_s() > STALL_S:
            self._break_off(HostLost(f"{self.router}: it has read nothing for {STALL_S:g} s"))
        return True

    def _break_off(self, why: HostLost) -> None:
        """End the stream with an error."""
        # The host closes the session as soon as the inbox has ended. If the stream were not
        # cancelled by then, it would end as one that is over.
        self._broken_off = why
        self._context.cancel()
        self._inbox.end(why)

    def _read(self, messages: Iterator[bytes]) -> None:
        end: MoesaicError = HostLost(f"{self._inbox.peer}: the router closed the connection")
        try:
            self._inbox.read(messages, full=self._full)
        except grpc.RpcError as error:
            end = from_grpc(error, self._inbox.peer)
        finally:
            self._inbox.end(self._broken_off or end)
            self._greeted.set()
            if not self._closing:
                self._abort_pair()
            self._outbox.finish()

    def _say_why(self) -> None:
        """Set the status of the ending stream to the router's mistake, if there was one."""
        error = self._inbox.error
        if error is not None and not isinstance(error, HostLost):
            code, details = to_grpc(error)
            self._context.set_code(code)
            self._context.set_details(details)
