"""The layout of the tensors of a frame, and its checks against the limits.

Router and host compute the same layout from the same numbers, so no offsets are sent.

Shape suffixes: T = tokens (rows of a call), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash

from .errors import CallError
from .expert_pb2 import BFLOAT16, FLOAT16, FLOAT32, Call, DType
from .limits import MAX_HIDDEN, MAX_PAYLOAD_BYTES, MAX_TOP_K

WIRE_VERSION = 4
ALIGNMENT_BYTES = 64

DTYPE_TO_WIRE: dict[torch.dtype, DType] = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
}
DTYPE_FROM_WIRE: dict[int, torch.dtype] = {wire: dtype for dtype, wire in DTYPE_TO_WIRE.items()}


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
    """Byte offsets of one call's tensors and of its answer."""

    rows: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    exact: bool
    ids_offset: int
    weights_offset: int
    call_bytes: int
    reply_bytes: int

    @classmethod
    def of(cls, rows: int, hidden: int, top_k: int, dtype: torch.dtype, exact: bool) -> CallLayout:
        ids_offset = _aligned(rows * hidden * dtype.itemsize)
        weights_offset = ids_offset + _aligned(rows * top_k * 4)
        return cls(
            rows=rows,
            hidden=hidden,
            top_k=top_k,
            dtype=dtype,
            exact=exact,
            ids_offset=ids_offset,
            weights_offset=weights_offset,
            call_bytes=weights_offset + _aligned(rows * top_k * 4),
            reply_bytes=rows * (top_k if exact else 1) * hidden * 4,
        )

    @classmethod
    def of_call(cls, call: Call) -> CallLayout:
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
        layout = cls.of(call.rows, call.hidden, call.top_k, dtype, call.exact)
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

    def call_tensors(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views (x_TH, ids_TK int32, weights_TK float32) of a uint8 ``buffer``."""
        x_end = self.rows * self.hidden * self.dtype.itemsize
        assignment_bytes = self.rows * self.top_k * 4
        ids = buffer[self.ids_offset : self.ids_offset + assignment_bytes]
        weights = buffer[self.weights_offset : self.weights_offset + assignment_bytes]
        return (
            buffer[:x_end].view(self.dtype).view(self.rows, self.hidden),
            ids.view(torch.int32).view(self.rows, self.top_k),
            weights.view(torch.float32).view(self.rows, self.top_k),
        )

    def reply_tensor(self, buffer: torch.Tensor) -> torch.Tensor:
        """View y_TH (with ``exact`` y_TKH), float32, at the start of a uint8 ``buffer``."""
        y = buffer[: self.reply_bytes].view(torch.float32)
        if self.exact:
            return y.view(self.rows, self.top_k, self.hidden)
        return y.view(self.rows, self.hidden)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a shared-memory slot that holds the call and, after it, its answer."""
        return self.call_bytes + _aligned(self.reply_bytes)
