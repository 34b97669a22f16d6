"""The layout of the tensors of a frame, and its checks against the limits.

Router and host compute the same layout from the same numbers, so no offsets are sent.

Shape suffixes: T = tokens (rows of a call), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import xxhash

from .errors import CallError
from .expert_pb2 import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Call, DType
from .limits import MAX_HIDDEN, MAX_PAYLOAD_BYTES, MAX_TOP_K

WIRE_VERSION = 8
ALIGNMENT_BYTES = 64

DTYPE_TO_WIRE: dict[torch.dtype, DType] = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}
DTYPE_FROM_WIRE: dict[int, torch.dtype] = {wire: dtype for dtype, wire in DTYPE_TO_WIRE.items()}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums, weights and gradients for experts of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checksum(seq: int, payload: torch.Tensor) -> int:
    """Return the checksum of a frame's tensors (uint8), seeded with the call's number.

    The seed makes the bytes of another call fail. Tensors that stay in device memory have none,
    because it would cost more than their transport.
    """
    if payload.device.type != "cpu":
        return 0
    return xxhash.xxh3_64_intdigest(payload.numpy().data, seq)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class CallLayout:
    """Byte offsets of the tensors of one call, and of its backward half, and of the answer."""

    rows: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    exact: bool
    backward: bool
    ids_offset: int
    weights_offset: int
    grad_offset: int  # in the call: of grad_y
    call_bytes: int
    sum_bytes: int  # in the answer: of y, or of grad_x
    reply_bytes: int

    @classmethod
    def of(
        cls,
        rows: int,
        hidden: int,
        top_k: int,
        dtype: torch.dtype,
        exact: bool,
        *,
        backward: bool = False,
    ) -> CallLayout:
        item = wide(dtype).itemsize
        ids_offset = _aligned(rows * hidden * dtype.itemsize)
        weights_offset = ids_offset + _aligned(rows * top_k * 4)
        grad_offset = weights_offset + _aligned(rows * top_k * item)
        sum_bytes = rows * (top_k if exact else 1) * hidden * item
        return cls(
            rows=rows,
            hidden=hidden,
            top_k=top_k,
            dtype=dtype,
            exact=exact,
            backward=backward,
            ids_offset=ids_offset,
            weights_offset=weights_offset,
            grad_offset=grad_offset,
            call_bytes=grad_offset + (_aligned(rows * hidden * item) if backward else 0),
            sum_bytes=sum_bytes,
            reply_bytes=_aligned(sum_bytes) + rows * top_k * item if backward else sum_bytes,
        )

    @classmethod
    def of_call(cls, call: Call, *, backward: bool = False) -> CallLayout:
        """Return the layout that ``call`` announces.

        Raises CallError when a number is out of bounds or the sizes do not agree.
        """
        dtype = DTYPE_FROM_WIRE.get(call.dtype)
        if dtype is None:
            known = ", ".join(DType.Name(d) for d in DTYPE_FROM_WIRE)
            raise CallError(f"dtype: {call.dtype} is not one of {known}")
        for name, value, largest in (
            ("rows", call.rows, MAX_PAYLOAD_BYTES),
            ("hidden", call.hidden, MAX_HIDDEN),
            ("top_k", call.top_k, MAX_TOP_K),
        ):
            if not 1 <= value <= largest:
                raise CallError(f"{name}: {value} is not between 1 and {largest}")
        sizes = call.rows, call.hidden, call.top_k
        layout = cls.of(*sizes, dtype, call.exact, backward=backward)
        if max(layout.call_bytes, layout.reply_bytes) > MAX_PAYLOAD_BYTES:
            raise CallError(
                f"rows: {call.rows} x {call.hidden} needs more than {MAX_PAYLOAD_BYTES} bytes; "
                "send fewer rows in one call"
            )
        if call.payload_bytes != layout.call_bytes:
            raise CallError(
                f"payload_bytes: {call.payload_bytes}, but {call.rows} rows x {call.hidden} "
                f"({dtype}) with top_k {call.top_k} take {layout.call_bytes}"
            )
        return layout

    @property
    def wide(self) -> torch.dtype:
        return wide(self.dtype)

    def call_tensors(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views (x_TH, ids_TK int32, weights_TK wide) of a uint8 ``buffer``."""
        x_end = self.rows * self.hidden * self.dtype.itemsize
        assignments = self.rows, self.top_k
        return (
            buffer[:x_end].view(self.dtype).view(self.rows, self.hidden),
            _section(buffer, self.ids_offset, torch.int32, assignments),
            _section(buffer, self.weights_offset, self.wide, assignments),
        )

    def grad_tensor(self, buffer: torch.Tensor) -> torch.Tensor:
        """View grad_y_TH, wide, of the backward half in a uint8 ``buffer``."""
        return _section(buffer, self.grad_offset, self.wide, (self.rows, self.hidden))

    def reply_tensor(self, buffer: torch.Tensor) -> torch.Tensor:
        """View y_TH or grad_x_TH (with ``exact`` a row for each assignment), wide, of a reply."""
        shape = (self.rows, self.hidden)
        if self.exact:
            shape = (self.rows, self.top_k, self.hidden)
        return _section(buffer, 0, self.wide, shape)

    def grad_weights_tensor(self, buffer: torch.Tensor) -> torch.Tensor:
        """View grad_weights_TK, wide, of the reply to a backward half."""
        start = _aligned(self.sum_bytes)
        return _section(buffer, start, self.wide, (self.rows, self.top_k))

    @property
    def slot_bytes(self) -> int:
        """Bytes of a shared-memory slot that holds the call and, after it, its answer."""
        return self.call_bytes + _aligned(self.reply_bytes)


def _section(
    buffer: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    return buffer[start : start + size].view(dtype).view(shape)
