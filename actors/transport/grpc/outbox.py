"""Frames to the other side of a stream, handed from the owner's thread to gRPC's writing thread."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from ....proto.errors import HostLost, InternalError, MoesaicError
from ....proto.expert_pb2 import Frame
from ....proto.limits import CHUNK_BYTES
from ..process_group import Pair, Written, pieces
from .codec import PARTS, encode

# The rest of a large frame: its kind, and (frame, chunk) of each message that is still to be sent.
_Turn = tuple[str, deque[tuple[Frame, memoryview]]]


class _Beside(NamedTuple):
    """A frame whose tensors a pair carries."""

    message: bytes
    payload: Tensor
    written: Written


class Outbox:
    """The iterator of messages that gRPC's writing thread consumes.

    The chunks of several large frames take turns. One thread sends, one other iterates.
    """

    def __init__(self, moved: threading.Event, at_end: Callable[[], None] = lambda: None) -> None:
        """Set up an empty outbox; ``moved`` is set whenever a message has left.

        The iterating thread calls ``at_end`` before the iteration ends.
        """
        self._at_end = at_end
        self._new: queue.SimpleQueue[bytes | _Turn | _Beside | None] = queue.SimpleQueue()
        self._turns: deque[bytes | _Turn | _Beside] = deque()
        self._pair: Pair | None = None
        self._lost: Callable[[MoesaicError], None] = lambda _: None
        self._beside: _Beside | None = None  # its frame has just left, and its tensors follow
        self._finishing = False
        self.thread: threading.Thread | None = None  # the one that iterates
        self._moved = moved
        self._moved_at = 0.0
        # Running totals, each written by one thread only. Their difference is still unsent.
        self._queued_bytes = self._left_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        return self._queued_bytes - self._left_bytes

    def stalled_s(self) -> float:
        """Return for how long the other side has taken nothing although something waits."""
        return time.monotonic() - self._moved_at if self.unsent_bytes else 0.0

    def send(self, frame: Frame) -> None:
        """Send a frame without tensors."""
        message = frame.SerializeToString()
        self._put(message, len(message))

    def send_tensors(self, kind: str, frame: Frame, payload: memoryview) -> None:
        """Send a call, backward or reply.

        A ``payload`` of more than CHUNK_BYTES must not change afterwards; a smaller one is copied.
        """
        if len(payload) <= CHUNK_BYTES:
            message = encode(kind, frame, payload)
            self._put(message, len(message))
        else:
            self._put((kind, deque(_chunks(kind, frame, payload))), len(payload))

    def carry(self, pair: Pair, lost: Callable[[MoesaicError], None]) -> None:
        """Let ``pair`` carry the tensors from now on; ``lost`` gets the error that ends it."""
        self._pair, self._lost = pair, lost

    def send_beside(self, frame: Frame, payload: Tensor) -> None:
        """Send a call, backward or reply with the pair; ``payload`` must not change afterwards.

        Raises InternalError if the frame announces another size: torch ends the process of a side
        that gets more than it expects.
        """
        kind = frame.WhichOneof("kind") or ""
        if PARTS[kind](frame).payload_bytes != payload.numel():
            raise InternalError(
                f"payload_bytes: {PARTS[kind](frame).payload_bytes} bytes are announced for a "
                f"{kind} that has {payload.numel()}"
            )
        assert self._pair is not None
        beside = _Beside(frame.SerializeToString(), payload, self._pair.written())
        self._put(beside, len(beside.message) + payload.numel())

    def finish(self) -> None:
        """End the stream after what was sent before. Callable from any thread."""
        self._new.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._beside is not None:
            self._ship(self._beside)
            self._beside = None
        turn = self._next_turn()
        if isinstance(turn, bytes):
            message, size = turn, len(turn)
        elif isinstance(turn, _Beside):
            message, size = turn.message, len(turn.message)
            self._beside = turn
        else:
            kind, chunks = turn
            frame, chunk = chunks.popleft()
            if chunks:
                self._turns.append(turn)
            message, size = encode(kind, frame, chunk), len(chunk)
        self._left(size)
        return message

    def _left(self, size: int) -> None:
        self._left_bytes += size
        self._moved_at = time.monotonic()
        if not self._moved.is_set():
            self._moved.set()

    def _ship(self, beside: _Beside) -> None:
        """Send tensors over the pair; gRPC has sent their frame when it asks for the next one."""
        assert self._pair is not None
        try:
            for piece in pieces(beside.payload):
                self._pair.send(piece, beside.written)
                self._left(piece.numel())
        except HostLost as lost:
            self._lost(lost)
            self._at_end()
            raise StopIteration from lost

    def _put(self, turn: bytes | _Turn | _Beside, size: int) -> None:
        if self._queued_bytes == self._left_bytes:
            self._moved_at = time.monotonic()
        self._queued_bytes += size
        self._new.put(turn)

    def _next_turn(self) -> bytes | _Turn | _Beside:
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
            self._at_end()
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
