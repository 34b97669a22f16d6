"""A host's side of a gRPC stream; `grpc_stream.py` says how streams behave."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import torch
from torch import Tensor

from ...proto.errors import CallError, HostLost, MoesaicError
from ...proto.expert_pb2 import Frame
from ...proto.limits import MAX_PAYLOAD_BYTES
from ...proto.wire import CallLayout
from .base import Inbound, check_version
from .grpc_border import CLOSE_S, Threads, from_grpc, to_grpc
from .grpc_inbox import STALL_S, Inbox
from .grpc_outbox import Outbox
from .pair import HOST_RANK, Pair


class GrpcSession:
    """A host's side of one connection, which is one RPC."""

    def __init__(
        self,
        context: grpc.ServicerContext,
        max_held_bytes: int,
        *,
        bind: str,
        device: torch.device,
    ) -> None:
        """``bind`` is where a group of the two sides would meet, ``device`` what NCCL would use."""
        self.router = ""
        self._context = context
        self._bind = bind
        self._device = device
        self._pair: Pair | None = None
        self._max_held_bytes = max_held_bytes
        self._over = threading.Event()
        moved = threading.Event()
        self._outbox = Outbox(moved)
        self._inbox = Inbox(
            context.peer(),
            moved,
            kinds=("hello", "call", "backward", "cancel", "ping"),
            max_payload_bytes=MAX_PAYLOAD_BYTES,
            accept=self._accept,
        )

    @property
    def slot_bytes(self) -> int:
        return 2 * MAX_PAYLOAD_BYTES

    def fileno(self) -> int:
        return self._inbox.fileno()

    def receive(self) -> list[Inbound]:
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
        """Waits for what was sent to go out, but no longer than `CLOSE_S`, and not if the router is
        gone. The listener owns the threads."""
        gone = self._inbox.error is not None
        self._inbox.end(HostLost(f"{self.router}: closed on this side"))
        self._outbox.finish()
        if not gone and not self._over.wait(CLOSE_S):
            self._context.cancel()
        self._abort_pair()
        self._inbox.close()

    # ---- gRPC's threads -------------------------------------------------------------------------

    def serve(self, messages: Iterator[bytes], threads: Threads) -> Iterator[bytes]:
        """Begin to read; what is returned is written by the thread that gRPC gave this RPC."""
        if not self._context.add_callback(self._over.set):
            self._over.set()
        threads.submit(self._read, messages)
        return self._outbox

    def _accept(self, kind: str, frame: Frame) -> bool:
        if (kind == "hello") == bool(self.router):
            raise CallError(
                f"a frame of kind {kind!r} {'after' if self.router else 'before'} Hello"
            )
        if kind == "hello":
            check_version(frame.hello.wire_version, frame.hello.router)
            if not frame.hello.router:
                raise CallError("router: a Hello without the router's name")
            self.router = self._inbox.peer = frame.hello.router
            if frame.hello.group:
                self._meet(frame.hello.group)
        return True

    def _meet(self, backend: str) -> None:
        """Make a group with the router; the Hello is heard behind it, and the Welcome sent."""
        self._pair = Pair(self.router, backend, self._device)
        self._inbox.carry(self._pair)
        self._outbox.carry(self._pair, self._inbox.end)
        frame = Frame()
        frame.rendezvous.store_address = self._pair.open(self._bind)
        # The owner sends nothing before it has heard the Hello.
        self._outbox.send(frame)
        self._pair.join(HOST_RANK, frame.rendezvous.store_address)

    def _abort_pair(self) -> None:
        if self._pair is not None:
            self._pair.abort()

    def _full(self) -> bool:
        """Whether to ask the router for no more; one that takes nothing either is given up."""
        if self._inbox.waiting_bytes + self._outbox.unsent_bytes <= self._max_held_bytes:
            return False
        if self._outbox.stalled_s() > STALL_S:
            self._inbox.end(HostLost(f"{self.router}: has taken nothing for {STALL_S:g} s"))
            self._context.cancel()
        return True

    def _read(self, messages: Iterator[bytes]) -> None:
        end: MoesaicError = HostLost(f"{self._inbox.peer}: the router closed the connection")
        try:
            self._inbox.read(messages, full=self._full)
        except grpc.RpcError as error:
            end = from_grpc(error, self._inbox.peer)
        finally:
            self._inbox.end(end)
            self._abort_pair()
            if isinstance(self._inbox.error, CallError):
                code, details = to_grpc(self._inbox.error)
                self._context.set_code(code)
                self._context.set_details(details)
            self._outbox.finish()
