"""Frames from the other side of a stream, handed from a reading thread to the owner's thread.

The reading thread assembles frames from messages, so that the owner wakes up only for whole frames.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ....proto.errors import Busy, CallError, HostLost, MoesaicError
from ....proto.expert_pb2 import Call, Frame, Reply
from ..base import InboundFrame
from ..budget import Share
from ..mailbox import Mailbox
from ..process_group import Pair
from .codec import PARTS, decode

# A side is lost if it has taken nothing for this long while more waits for it than may wait.
STALL_S = 2.0
# What a frame counts for in addition to its tensors, so that a flood of small ones is bounded too.
_FRAME_BYTES = 16 << 10


@dataclass(slots=True)
class _Partial:
    """A frame whose tensors are still arriving."""

    kind: str
    frame: Frame
    size: int
    buffer: np.ndarray | None  # None: the frame is refused, and its bytes are discarded
    refused: MoesaicError | None
    filled: int = 0
    cancel: Frame | None = None  # arrived meanwhile; delivered after its call


class Inbox:
    """Frames from the other side: a reading thread runs `read`, the owner calls `receive`."""

    def __init__(
        self,
        peer: str,
        moved: threading.Event,
        *,
        kinds: Container[str],
        max_payload_bytes: int,
        max_arriving_bytes: int,
        check: Callable[[str, Call | Reply], None],
        accept: Callable[[str, Frame], bool],
        arriving: Share | None = None,
    ) -> None:
        """Set up an empty inbox; ``moved`` is set whenever the owner has taken something.

        ``kinds`` are the frames that the other side may send. ``check`` sees the head of a frame
        with tensors before memory is allocated for them, and raises CallError if their size is
        wrong. A frame in chunks is then delivered as refused; with a pair, whose other side sends
        on, the stream ends. ``accept`` sees each whole frame first: it may decline the frame by
        returning False, or end the stream by raising an error.

        Frames that are arriving in chunks may have ``max_arriving_bytes`` together. Until the owner
        takes them they also hold room in ``arriving``; without room they are refused as Busy.
        """
        self.peer = peer
        self.error: MoesaicError | None = None
        self._moved = moved
        self._kinds = kinds
        self._max_payload_bytes = max_payload_bytes
        self._max_arriving_bytes = max_arriving_bytes
        self._check = check
        self._accept = accept
        self._arriving = arriving
        # When the last chunk of a frame arrived; None: no frame is arriving in chunks.
        self.moved_at: float | None = None
        self._mail: Mailbox[_Heard] = Mailbox()
        self._partial: dict[int, _Partial] = {}
        self._pair: Pair | None = None
        # Running totals, each written by one thread only. Their difference is what waits for the
        # owner.
        self._heard_bytes = self._taken_bytes = 0
        # The same for the bytes that hold room in the budget.
        self._lent_bytes = self._returned_bytes = 0

    def fileno(self) -> int:
        return self._mail.fileno()

    def __len__(self) -> int:
        return len(self._mail)

    @property
    def waiting_bytes(self) -> int:
        """The bytes of whole frames that the owner has not taken yet."""
        return self._heard_bytes - self._taken_bytes

    # ---- the owner's thread ---------------------------------------------------------------------

    def receive(self) -> list[InboundFrame]:
        """Return the frames since the last call. Raises HostLost after the last frame."""
        # Read this first: frames from before the end are then certain to be taken below.
        ended = self.error is not None
        heard = self._mail.take()
        if heard:
            last = heard[-1]
            self._taken_bytes = last.heard_bytes
            if last.lent_bytes != self._returned_bytes:
                self._return(last.lent_bytes)
            if not self._moved.is_set():
                self._moved.set()
        elif ended:
            self.check_open()
        return [InboundFrame(one.frame, _tensor(one.payload), one.refused) for one in heard]

    def check_open(self) -> None:
        """Check that the stream is open. Raises HostLost if it has ended."""
        if self.error is not None:
            raise HostLost(str(self.error)) from self.error

    def put(self, frame: Frame) -> None:
        """Deliver a frame that was made on this side."""
        self._mail.put(_Heard(frame, None, None, self._heard_bytes, self._lent_bytes))

    def end(self, error: MoesaicError) -> None:
        """End the inbox after what has arrived; the first reason counts. From any thread."""
        if self.error is None:
            self.error = error
        self._mail.end()
        self._moved.set()

    def close(self) -> None:
        self._mail.close()
        if self._arriving is not None:
            self._arriving.close()

    def _return(self, lent_bytes: int) -> None:
        if self._arriving is not None:
            self._arriving.give_back(lent_bytes - self._returned_bytes)
        self._returned_bytes = lent_bytes

    def carry(self, pair: Pair) -> None:
        """Let ``pair`` carry the tensors from now on; the reading thread waits for them."""
        self._pair = pair

    # ---- the reading thread ---------------------------------------------------------------------

    def read(self, messages: Iterator[bytes], full: Callable[[], bool]) -> None:
        """Take in one message after another, but ask for none while ``full``.

        Return at the end of the stream, or at a malformed message, which ends it.
        """
        for message in messages:
            try:
                self._hear(message)
            except HostLost as lost:
                self.end(lost)
            except MoesaicError as error:
                self.end(type(error)(f"{self.peer}: {error}"))
            while full() and self.error is None:
                self._moved.clear()
                if full():
                    self._moved.wait(STALL_S / 8)
            if self.error is not None:
                return

    def _hear(self, message: bytes) -> None:
        kind, frame, payload = decode(message)
        if kind not in self._kinds:
            raise CallError(f"this side does not accept frames of kind {kind!r}")
        part_of = PARTS.get(kind)
        if part_of is None:
            late = self._partial.get(frame.cancel.seq) if kind == "cancel" else None
            if late is not None:
                late.cancel = frame
            else:
                self._deliver(kind, frame, None)
            return
        part = part_of(frame)
        if self._pair is not None:
            self._deliver(kind, frame, self._fetch(self._pair, kind, part, payload))
        elif part.more or part.seq in self._partial:
            self._hear_chunk(kind, frame, part, payload)
        elif len(payload) != part.payload_bytes:
            raise CallError(
                f"payload_bytes: {part.payload_bytes} bytes were announced for {kind} {part.seq}, "
                f"but {len(payload)} have arrived"
            )
        else:
            self._deliver(kind, frame, bytearray(payload))

    def _fetch(
        self, pair: Pair, kind: str, part: Call | Reply, payload: bytes | memoryview
    ) -> Tensor:
        if len(payload) or part.more or part.payload_bytes > self._max_payload_bytes:
            raise CallError(
                f"payload_bytes: {part.payload_bytes} bytes were announced for {kind} {part.seq}; "
                f"at most {self._max_payload_bytes} are allowed, and only over the group"
            )
        self._check(kind, part)
        return pair.receive(part.payload_bytes)

    def _hear_chunk(
        self, kind: str, frame: Frame, part: Call | Reply, payload: bytes | memoryview
    ) -> None:
        partial = self._partial.get(part.seq)
        if partial is None:
            partial = self._begin(kind, frame, part)
        elif part.payload_bytes or kind != partial.kind:
            raise CallError(f"seq: {kind} {part.seq} begins again before its last chunk arrived")
        size, end = partial.size, partial.filled + len(payload)
        if end > size or (end < size) != part.more or not payload:
            raise CallError(
                f"payload_bytes: {size} bytes were announced for {kind} {part.seq}, but {end} have "
                f"arrived and {'more are' if part.more else 'no more are'} to follow"
            )
        if partial.buffer is not None:
            partial.buffer.data[partial.filled : end] = payload
        partial.filled = end
        self.moved_at = time.monotonic()
        if not part.more:
            del self._partial[part.seq]
            if not self._partial:
                self.moved_at = None
            PARTS[kind](partial.frame).more = False
            if partial.buffer is not None:
                self._lent_bytes += size
            self._deliver(kind, partial.frame, partial.buffer, partial.refused)
            if partial.cancel is not None:
                self._deliver("cancel", partial.cancel, None)

    def _begin(self, kind: str, frame: Frame, part: Call | Reply) -> _Partial:
        size = part.payload_bytes
        partial_bytes = sum(partial.size for partial in self._partial.values())
        if size > self._max_payload_bytes or partial_bytes + size > self._max_arriving_bytes:
            raise CallError(
                f"payload_bytes: {size} bytes were announced while {partial_bytes} are arriving; "
                f"one {kind} may have {self._max_payload_bytes}, and all together may have "
                f"{self._max_arriving_bytes}"
            )
        buffer, refused = None, None
        try:
            self._check(kind, part)
            if self._arriving is not None:
                self._arriving.take(size)
            buffer = np.empty(size, dtype=np.uint8)
        except (CallError, Busy) as error:
            refused = error
        partial = self._partial[part.seq] = _Partial(kind, frame, size, buffer, refused)
        return partial

    def _deliver(
        self,
        kind: str,
        frame: Frame,
        payload: _Payload | None,
        refused: MoesaicError | None = None,
    ) -> None:
        if self._accept(kind, frame):
            self._heard_bytes += _FRAME_BYTES + (0 if payload is None else len(payload))
            self._mail.put(_Heard(frame, payload, refused, self._heard_bytes, self._lent_bytes))


# The owner turns payloads into tensors, not the reading thread: torch's code is in the owner's
# caches anyway.
_Payload = bytearray | np.ndarray | Tensor


class _Heard(NamedTuple):
    """A frame, and the totals of heard and lent bytes up to and including it."""

    frame: Frame
    payload: _Payload | None
    refused: MoesaicError | None
    heard_bytes: int
    lent_bytes: int


def _tensor(payload: _Payload | None) -> Tensor | None:
    if payload is None or isinstance(payload, Tensor):
        return payload
    if not len(payload):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(payload, dtype=torch.uint8)
