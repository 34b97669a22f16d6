"""The two ends of one side of a stream, between its owner's thread and gRPC's threads.

`Outbox` is the iterator that gRPC's writing thread runs through. `Inbox` puts arriving messages
together in a reading thread, so that the owner wakes once, for whole frames.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...proto.errors import CallError, HostLost, MoesaicError
from ...proto.expert_pb2 import Call, Frame, Reply
from ...proto.limits import CHUNK_BYTES, MAX_PAYLOAD_BYTES
from .base import Inbound
from .grpc_codec import PARTS, decode, encode
from .mailbox import Mailbox

# A side that has taken nothing for so long, beyond the bounds of what may wait for it, is lost.
STALL_S = 2.0
# What a frame counts for beside its tensors, so that a flood of small ones is bounded too.
_FRAME_BYTES = 16 << 10

# What is left of a large frame: its kind, and frame and chunk of each message.
_Turn = tuple[str, deque[tuple[Frame, memoryview]]]


class Outbox:
    """Frames to the other side; the chunks of several large ones take turns.

    Sent by one thread, iterated by one other.
    """

    def __init__(self, moved: threading.Event) -> None:
        """``moved`` is set whenever something has left."""
        self._new: queue.SimpleQueue[bytes | _Turn | None] = queue.SimpleQueue()
        self._turns: deque[bytes | _Turn] = deque()
        self._finishing = False
        self.thread: threading.Thread | None = None  # the one that iterates
        self._moved = moved
        self._moved_at = 0.0
        # Each is written by one thread alone; the difference still waits.
        self._queued_bytes = self._left_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        return self._queued_bytes - self._left_bytes

    def stalled_s(self) -> float:
        """Seconds for which the other side has taken nothing although something waits."""
        return time.monotonic() - self._moved_at if self.unsent_bytes else 0.0

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors."""
        message = frame.SerializeToString()
        self._put(message, len(message))

    def send_tensors(self, kind: str, frame: Frame, payload: memoryview) -> None:
        """Send a call, backward or reply.

        A ``payload`` of more than CHUNK_BYTES must not change any more; others are copied.
        """
        if len(payload) <= CHUNK_BYTES:
            message = encode(kind, frame, payload)
            self._put(message, len(message))
        else:
            self._put((kind, deque(_chunks(kind, frame, payload))), len(payload))

    def finish(self) -> None:
        """The stream ends behind what was sent before. Callable from any thread."""
        self._new.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        turn = self._next_turn()
        if isinstance(turn, bytes):
            message, size = turn, len(turn)
        else:
            kind, chunks = turn
            frame, chunk = chunks.popleft()
            if chunks:
                self._turns.append(turn)
            message, size = encode(kind, frame, chunk), len(chunk)
        self._left_bytes += size
        self._moved_at = time.monotonic()
        if not self._moved.is_set():
            self._moved.set()
        return message

    def _put(self, turn: bytes | _Turn, size: int) -> None:
        if self._queued_bytes == self._left_bytes:
            self._moved_at = time.monotonic()
        self._queued_bytes += size
        self._new.put(turn)

    def _next_turn(self) -> bytes | _Turn:
        turns = self._turns
        while not self._finishing and (not turns or not self._new.empty()):
            if self.thread is None:
                self.thread = threading.current_thread()
            turn = self._new.get()
            if turn is None:
                self._finishing = True
            else:
                turns.append(turn)
        if not turns:
            raise StopIteration
        return turns.popleft()


def _chunks(kind: str, frame: Frame, payload: memoryview) -> Iterator[tuple[Frame, memoryview]]:
    first = PARTS[kind](frame)
    first.more = True
    yield frame, payload[:CHUNK_BYTES]
    for start in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        rest = Frame()
        part = PARTS[kind](rest)
        part.seq = first.seq
        part.more = start + CHUNK_BYTES < len(payload)
        yield rest, payload[start : start + CHUNK_BYTES]


@dataclass(slots=True)
class _Partial:
    """A frame whose tensors are still arriving."""

    kind: str
    frame: Frame
    buffer: np.ndarray
    filled: int = 0
    cancel: Frame | None = None  # heard meanwhile; follows its call


class Inbox:
    """Frames from the other side: a reading thread runs `read`, the owner calls `receive`."""

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
        self._mail: Mailbox[_Heard] = Mailbox()
        self._partial: dict[int, _Partial] = {}
        self._partial_bytes = 0
        # Each is written by one thread alone; the difference waits for the owner.
        self._heard_bytes = self._taken_bytes = 0

    def fileno(self) -> int:
        return self._mail.fileno()

    def __len__(self) -> int:
        return len(self._mail)

    @property
    def waiting_bytes(self) -> int:
        """Of whole frames that the owner has not taken."""
        return self._heard_bytes - self._taken_bytes

    # ---- the owner's thread ---------------------------------------------------------------------

    def receive(self) -> list[Inbound]:
        """What was heard since the last time. Raises HostLost behind the end."""
        ended = self.error is not None  # looked at first: what was heard before is taken below
        heard = self._mail.take()
        if heard:
            self._taken_bytes = heard[-1][2]
            if not self._moved.is_set():
                self._moved.set()
        elif ended:
            self.check_open()
        return [Inbound(frame, _tensor(payload)) for frame, payload, _ in heard]

    def check_open(self) -> None:
        """Raises HostLost when the stream has ended."""
        if self.error is not None:
            raise HostLost(str(self.error)) from self.error

    def put(self, frame: Frame) -> None:
        """Deliver a frame that was made on this side."""
        self._mail.put((frame, None, self._heard_bytes))

    def end(self, error: MoesaicError) -> None:
        """Nothing follows what was heard so far; the first reason counts. From any thread."""
        if self.error is None:
            self.error = error
        self._mail.end()
        self._moved.set()

    def close(self) -> None:
        self._mail.close()

    # ---- the reading thread ---------------------------------------------------------------------

    def read(self, messages: Iterator[bytes], full: Callable[[], bool]) -> None:
        """Take in one message after another, but ask for none while ``full``.

        Returns at the end of the stream, or at a malformed message, which ends it.
        """
        for message in messages:
            try:
                self._hear(message)
            except CallError as error:
                self.end(CallError(f"{self.peer}: {error}"))
            while full() and self.error is None:
                self._moved.clear()
                if full():
                    self._moved.wait(STALL_S / 8)
            if self.error is not None:
                return

    def _hear(self, message: bytes) -> None:
        kind, frame, payload = decode(message)
        if kind not in self._kinds:
            raise CallError(f"a frame of kind {kind!r}, which this side does not take")
        part_of = PARTS.get(kind)
        if part_of is None:
            late = self._partial.get(frame.cancel.seq) if kind == "cancel" else None
            if late is not None:
                late.cancel = frame
            else:
                self._deliver(kind, frame, None)
            return
        part = part_of(frame)
        if part.more or part.seq in self._partial:
            self._hear_chunk(kind, frame, part, payload)
        elif len(payload) != part.payload_bytes:
            raise CallError(
                f"payload_bytes: {part.payload_bytes} announced for {kind} {part.seq}, "
                f"{len(payload)} arrived"
            )
        else:
            self._deliver(kind, frame, bytearray(payload))

    def _hear_chunk(
        self, kind: str, frame: Frame, part: Call | Reply, payload: bytes | memoryview
    ) -> None:
        partial = self._partial.get(part.seq)
        if partial is None:
            partial = self._begin(kind, frame, part)
        elif part.payload_bytes or kind != partial.kind:
            raise CallError(f"seq: {part.seq} begins anew before its end")
        size, end = partial.buffer.size, partial.filled + len(payload)
        if end > size or (end < size) != part.more or not payload:
            raise CallError(
                f"payload_bytes: {size} announced for {kind} {part.seq}, {end} arrived and "
                f"{'more' if part.more else 'no more'} to come"
            )
        partial.buffer.data[partial.filled : end] = payload
        partial.filled = end
        if not part.more:
            del self._partial[part.seq]
            self._partial_bytes -= size
            PARTS[kind](partial.frame).more = False
            self._deliver(kind, partial.frame, partial.buffer)
            if partial.cancel is not None:
                self._deliver("cancel", partial.cancel, None)

    def _begin(self, kind: str, frame: Frame, part: Call | Reply) -> _Partial:
        size = part.payload_bytes
        if size > self._max_payload_bytes or self._partial_bytes + size > MAX_PAYLOAD_BYTES:
            raise CallError(
                f"payload_bytes: {size} beside {self._partial_bytes} that are arriving; one may "
                f"have {self._max_payload_bytes}, all {MAX_PAYLOAD_BYTES}"
            )
        self._partial_bytes += size
        partial = self._partial[part.seq] = _Partial(kind, frame, np.empty(size, dtype=np.uint8))
        return partial

    def _deliver(self, kind: str, frame: Frame, payload: bytearray | np.ndarray | None) -> None:
        if self._accept(kind, frame):
            self._heard_bytes += _FRAME_BYTES + (0 if payload is None else len(payload))
            self._mail.put((frame, payload, self._heard_bytes))


# Frame, payload, and all that was heard until then. The owner makes tensors of payloads: torch's
# code is warm in its thread and cold in the reading one.
_Heard = tuple[Frame, bytearray | np.ndarray | None, int]


def _tensor(payload: bytearray | np.ndarray | None) -> Tensor | None:
    if payload is None:
        return None
    if not len(payload):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(payload, dtype=torch.uint8)
