"""The two ends of one side of a stream, between its owner's thread and gRPC's threads.

`Outbox` is the iterator that gRPC's writing thread runs through. `Inbox` puts arriving messages
together in the thread in which gRPC hears them, so that the owner wakes once, for whole frames.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...proto.errors import CallError, HostLost, MoesaicError
from ...proto.expert_pb2 import Call, Frame, Reply
from ...proto.wire import CHUNK_BYTES, MAX_PAYLOAD_BYTES
from .base import Inbound
from .grpc_codec import NO_PAYLOAD, body, decode, encode, has_payload

T = TypeVar("T")

# What a frame counts for beside its tensors, so that a flood of small ones is bounded too.
_FRAME_BYTES = 512


class Mailbox(Generic[T]):
    """A queue whose descriptor is readable while something is in it, and for ever when it ended.

    Any thread puts, one thread takes. There is no lock on the way, so that the taker, woken up,
    never finds the putter still holding one.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._signalled = self._ended = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fd_lock = threading.Lock()

    def fileno(self) -> int:
        return self._fd

    def put(self, item: T) -> None:
        self._items.append(item)
        self._signal()

    def end(self) -> None:
        self._ended = True
        self._signal()

    def take(self) -> list[T]:
        with contextlib.suppress(BlockingIOError):  # emptied before: nothing was signalled since
            os.eventfd_read(self._fd)
        # In this order: whatever is put after this line signals anew.
        self._signalled = False
        items = [self._items.popleft() for _ in range(len(self._items))]
        if self._ended:
            self._signal()
        return items

    def close(self) -> None:
        with self._fd_lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _signal(self) -> None:
        if not self._signalled:
            self._signalled = True
            # Against `close` alone: afterwards the number may be another file's.
            with self._fd_lock:
                if self._fd >= 0:
                    os.eventfd_write(self._fd, 1)


class Outbox:
    """Frames to the other side; the chunks of several large ones take turns.

    Sent by one thread, iterated by one other.
    """

    def __init__(self, moved: threading.Event) -> None:
        """``moved`` is set whenever something has left."""
        self._new: queue.SimpleQueue[_Turn | None] = queue.SimpleQueue()
        self._turns: deque[_Turn] = deque()
        self._finishing = False
        self._thread: threading.Thread | None = None
        self._moved = moved
        self._moved_at = time.monotonic()
        # Each is written by one thread alone; the difference still waits.
        self._queued_bytes = self._left_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        return self._queued_bytes - self._left_bytes

    def stalled_s(self) -> float:
        """Seconds for which the other side has taken nothing although something waits."""
        return time.monotonic() - self._moved_at if self.unsent_bytes else 0.0

    def send(self, kind: str, frame: Frame, payload: Tensor | None = None) -> None:
        """Send a frame; its tensors must not change until they have left."""
        view = NO_PAYLOAD if payload is None else payload.numpy().data
        parts = deque(_parts(kind, frame, view))
        if not self.unsent_bytes:
            self._moved_at = time.monotonic()
        self._queued_bytes += sum(len(header) + len(chunk) for header, chunk in parts)
        self._new.put((kind, parts))

    def finish(self) -> None:
        """The stream ends behind what was sent before. Callable from any thread."""
        self._new.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread that iterates, once the stream has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self._thread = threading.current_thread()
        if not self._turns and not self._finishing:
            self._start(self._new.get())
        while not self._new.empty():
            self._start(self._new.get_nowait())
        if not self._turns:
            raise StopIteration
        kind, parts = self._turns.popleft()
        header, chunk = parts.popleft()
        if parts:
            self._turns.append((kind, parts))
        self._left_bytes += len(header) + len(chunk)
        self._moved_at = time.monotonic()
        self._moved.set()
        return encode(kind, header, chunk)

    def _start(self, turn: _Turn | None) -> None:
        if turn is None:
            self._finishing = True
        else:
            self._turns.append(turn)


# What is left of a frame: its kind, and header and chunk of each message.
_Turn = tuple[str, deque[tuple[bytes, memoryview]]]


def _parts(kind: str, frame: Frame, payload: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    if len(payload) <= CHUNK_BYTES:
        yield frame.SerializeToString(), payload
        return
    body(frame, kind).more = True
    yield frame.SerializeToString(), payload[:CHUNK_BYTES]
    rest = Frame()
    part = body(rest, kind)
    part.seq = body(frame, kind).seq
    for start in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        part.more = start + CHUNK_BYTES < len(payload)
        yield rest.SerializeToString(), payload[start : start + CHUNK_BYTES]


@dataclass(slots=True)
class _Partial:
    """A frame whose tensors are arriving."""

    kind: str
    frame: Frame
    buffer: Tensor
    view: memoryview
    filled: int = 0
    cancel: Frame | None = None  # heard meanwhile; follows its call


class Inbox:
    """Frames from the other side: gRPC's thread calls `hear`, the owner's `receive`."""

    def __init__(
        self,
        peer: str,
        moved: threading.Event,
        *,
        kinds: Container[str],
        max_payload_bytes: int,
        accept: Callable[[str, Frame], bool],
    ) -> None:
        """``moved`` is set whenever the owner has taken something.

        ``kinds`` are those that the other side may send. ``accept`` sees each whole frame first: it
        may decline it, or raise CallError to end the stream.
        """
        self.peer = peer
        self.error: MoesaicError | None = None
        self._moved = moved
        self._kinds = kinds
        self._max_payload_bytes = max_payload_bytes
        self._accept = accept
        self._mail: Mailbox[Inbound] = Mailbox()
        self._partial: dict[int, _Partial] = {}
        self._partial_bytes = 0
        # Each is written by one thread alone; the difference waits for the owner.
        self._heard_bytes = self._taken_bytes = 0

    def fileno(self) -> int:
        return self._mail.fileno()

    @property
    def waiting_bytes(self) -> int:
        return self._heard_bytes - self._taken_bytes

    def hear(self, message: bytes) -> bool:
        """Take a message in. Never raises, and returns True: gRPC takes None for a failure."""
        if self.error is None:
            try:
                for inbound in self._assemble(*decode(message)):
                    self._heard_bytes += _cost(inbound)
                    self._mail.put(inbound)
            except CallError as error:
                self.end(CallError(f"{self.peer}: {error}"))
        return True

    def pump(self, messages: Iterator[object], full: Callable[[], bool]) -> None:
        """Ask for one message after another until the stream ends, but for none while ``full``."""
        for _ in messages:
            while full() and self.error is None:
                self._moved.clear()
                if full():
                    self._moved.wait(1.0)
            if self.error is not None:
                return

    def put(self, inbound: Inbound) -> None:
        """Deliver a frame that was made on this side."""
        self._heard_bytes += _cost(inbound)
        self._mail.put(inbound)

    def end(self, error: MoesaicError) -> None:
        """Nothing follows what was heard so far; the first reason counts. From any thread."""
        if self.error is None:
            self.error = error
        self._mail.end()
        self._moved.set()

    def receive(self) -> list[Inbound]:
        """What was heard since the last time. Raises HostLost behind the end."""
        ended = self.error is not None  # looked at first: what was heard before is taken below
        inbounds = self._mail.take()
        if inbounds:
            self._taken_bytes += sum(map(_cost, inbounds))
            self._moved.set()
        elif ended:
            self.check_open()
        return inbounds

    def check_open(self) -> None:
        """Raises HostLost when the stream has ended."""
        if self.error is not None:
            raise HostLost(str(self.error)) from self.error

    def close(self) -> None:
        self.end(HostLost(f"{self.peer}: closed on this side"))
        self._mail.close()

    def _assemble(self, kind: str, frame: Frame, payload: memoryview) -> Iterator[Inbound]:
        if kind not in self._kinds:
            raise CallError(f"a frame of kind {kind!r} from this side of a stream")
        if not has_payload(kind):
            late = self._partial.get(frame.cancel.seq) if kind == "cancel" else None
            if late is not None:
                late.cancel = frame
            elif self._accept(kind, frame):
                yield Inbound(frame)
            return
        part = body(frame, kind)
        partial = self._partial.get(part.seq) or self._begin(kind, frame, part)
        self._fill(partial, part, payload)
        if part.more:
            self._partial[part.seq] = partial
            return
        self._partial.pop(part.seq, None)
        self._partial_bytes -= len(partial.view)
        body(partial.frame, kind).more = False
        if self._accept(kind, partial.frame):
            yield Inbound(partial.frame, partial.buffer)
            if partial.cancel is not None:
                yield Inbound(partial.cancel)

    def _begin(self, kind: str, frame: Frame, part: Call | Reply) -> _Partial:
        size = part.payload_bytes
        if size > self._max_payload_bytes or self._partial_bytes + size > MAX_PAYLOAD_BYTES:
            raise CallError(
                f"payload_bytes: {size} beside {self._partial_bytes} that are arriving; one may "
                f"have {self._max_payload_bytes}, all {MAX_PAYLOAD_BYTES}"
            )
        self._partial_bytes += size
        # Aligned, as a view of the message would not be.
        buffer = torch.empty(size, dtype=torch.uint8)
        return _Partial(kind, frame, buffer, buffer.numpy().data)

    def _fill(self, partial: _Partial, part: Call | Reply, payload: memoryview) -> None:
        end, size = partial.filled + len(payload), len(partial.view)
        if partial.filled and part.payload_bytes:
            raise CallError(f"seq: {part.seq} begins anew before its end")
        if end > size or (end < size) != part.more or (part.more and not payload):
            raise CallError(
                f"payload_bytes: {size} announced for {partial.kind} {part.seq}, {end} arrived and "
                f"{'more' if part.more else 'no more'} to come"
            )
        partial.view[partial.filled : end] = payload
        partial.filled = end


def _cost(inbound: Inbound) -> int:
    # Replies are bounded by the calls in flight, and hearing them is what makes room.
    if inbound.payload is None or inbound.frame.HasField("reply"):
        return _FRAME_BYTES
    return _FRAME_BYTES + inbound.payload.numel()
