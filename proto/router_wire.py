"""The layout of the tensors in a router service's call, without torch, for both sides.

Shape suffixes: T = tokens (rows of a call), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .errors import CallError, Corrupted
from .expert_pb2 import BFLOAT16, FLOAT16, FLOAT32, DType
from .limits import CHUNK_BYTES, MAX_HIDDEN, MAX_PAYLOAD_BYTES, MAX_TOP_K
from .router_pb2 import ComputeHead

ITEM_BYTES: dict[int, int] = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}
_ASSIGNMENT_BYTES = 4  # int32 and float32


@dataclass(frozen=True, slots=True)
class RouterLayout:
    """Byte offsets of ids_TK, weights_TK and x_TH in a call, and the size of its answer y_TH."""

    rows: int
    hidden: int
    top_k: int
    item_bytes: int

    @classmethod
    def of(cls, head: ComputeHead) -> RouterLayout:
        """Compute the layout of a call. Raises CallError when a number is out of bounds."""
        if head.dtype not in ITEM_BYTES:
            known = ", ".join(DType.Name(dtype) for dtype in DType.values() if dtype in ITEM_BYTES)
            raise CallError(f"dtype: {head.dtype} is not one of {known}")
        for name, value, largest in (
            ("rows", head.rows, MAX_PAYLOAD_BYTES),
            ("hidden", head.hidden, MAX_HIDDEN),
            ("top_k", head.top_k, MAX_TOP_K),
        ):
            if not 1 <= value <= largest:
                raise CallError(f"{name}: {value} is not between 1 and {largest}")
        return cls(head.rows, head.hidden, head.top_k, ITEM_BYTES[head.dtype])

    @property
    def weights_offset(self) -> int:
        return self.rows * self.top_k * _ASSIGNMENT_BYTES

    @property
    def x_offset(self) -> int:
        return 2 * self.weights_offset

    @property
    def call_bytes(self) -> int:
        return self.x_offset + self.reply_bytes

    @property
    def reply_bytes(self) -> int:
        return self.rows * self.hidden * self.item_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a call."""
        return self.call_bytes // self.rows


def chunks(data: memoryview) -> Iterator[bytes]:
    """Split ``data`` (bytes) into the parts that are sent, at least one."""
    for start in range(0, max(1, len(data)), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


def join_chunks(parts: Iterable[bytes], size: int, crc32: int) -> bytearray:
    """Join the parts.

    Raises CallError when they are not ``size`` bytes, and Corrupted when their checksum differs.
    """
    whole = bytearray(size)
    end, seen = 0, 0
    for part in parts:
        if end + len(part) > size:
            size_so_far = end + len(part)
            raise CallError(f"data: {size} bytes were announced, but {size_so_far} have arrived")
        whole[end : end + len(part)] = part
        end += len(part)
        seen = zlib.crc32(part, seen)
    if end < size:
        raise CallError(f"data: {size} bytes were announced, but only {end} have arrived")
    if seen != crc32:
        raise Corrupted(
            f"crc32: the tensors have {seen:#010x}, but {crc32:#010x} was announced; send the call "
            "again"
        )
    return whole
