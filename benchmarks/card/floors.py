"""What the card reaches at most, measured in the same run: reading memory, and multiplying."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .timing import microseconds

_READ_BYTES = 2 << 30


@triton.jit
def _read(in_ptr, out_ptr, steps, BLOCK: tl.constexpr):
    # Every program adds up what it reads, so that no load can be left out.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK * steps + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(steps):
        sums += tl.load(in_ptr + offsets)
        offsets += BLOCK
    tl.store(out_ptr + tl.program_id(0), tl.sum(sums, 0))


@dataclass(frozen=True, slots=True)
class Floors:
    read_tb_s: float  # the better of PyTorch's maximum and a kernel of our own
    copy_tb_s: float  # bytes read and written
    matmul_tflop_s: float  # bfloat16, 8192 x 8192 x 8192, random numbers


def measure() -> Floors:
    read, copy = _memory()
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    matmul = microseconds(lambda: a @ b, rounds=11)
    return Floors(
        read_tb_s=_READ_BYTES / read / 1e6,
        copy_tb_s=2 * _READ_BYTES / copy / 1e6,
        matmul_tflop_s=2 * 8192**3 / matmul / 1e6,
    )


def _memory() -> tuple[float, float]:
    """Return how long it takes to read, and to copy, `_READ_BYTES`."""
    big = torch.randn(_READ_BYTES // 4, device="cuda")
    block, steps = 4096, 16
    programs = big.numel() // (block * steps)
    sums = torch.empty(programs, device="cuda")

    def read(warps: int) -> object:
        launch: Any = _read[(programs,)]
        return launch(big, sums, steps, BLOCK=block, num_warps=warps)

    reads = [microseconds(lambda: big.view(torch.int32).amax())]
    reads += [microseconds(partial(read, warps)) for warps in (4, 8)]
    other = torch.empty_like(big)
    return min(reads), microseconds(lambda: other.copy_(big))
