"""Block sizes of the grouped FFN's programs, by how many rows an expert is likely to have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one product: columns, inner dimension, warps of a program, stages of its loop."""

    columns: int
    inner: int
    warps: int
    stages: int
    described: bool = False  # loaded by the copy engine of Hopper and later, with descriptors
    swapped: bool = False  # the matrix on the left of the product


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a call is cut: rows of a tile, and the blocks of both products."""

    rows: int
    up: Blocks
    down: Blocks


@dataclass(frozen=True, slots=True)
class BackwardConfiguration:
    """How a backward call is cut: rows of a tile, and the blocks of its three kinds of products."""

    rows: int
    hidden: Blocks
    x: Blocks
    weights: Blocks
    weight_rows: int  # of a block of a matrix


# Found by `benchmarks.gpu` on an H200 with Qwen3-30B-A3B's layer, 2026-11-28. With few rows the
# memory is the limit, and many blocks are alike within 2 %.
_FEW = Blocks(columns=64, inner=128, warps=4, stages=3, described=True, swapped=True)
FEW_ROWS = Configuration(16, _FEW, _FEW)
_SOME = Blocks(columns=64, inner=64, warps=4, stages=3, described=True, swapped=True)
SOME_ROWS = Configuration(32, _SOME, _SOME)
MORE_ROWS = Configuration(
    64,
    Blocks(columns=64, inner=64, warps=4, stages=3, described=True),
    Blocks(columns=128, inner=64, warps=4, stages=4, described=True),
)
MANY_ROWS = Configuration(
    128,
    Blocks(columns=128, inner=64, warps=8, stages=4, described=True),
    Blocks(columns=256, inner=64, warps=8, stages=4, described=True),
)
# For 32-bit numbers, rows that the copy engine cannot address, and devices older than Hopper.
PLAIN = Configuration(16, Blocks(32, 32, 4, 3), Blocks(32, 32, 4, 3))


def configuration_for(
    assignments: int, experts: int, *, described: bool, exact: bool = False
) -> Configuration:
    """Return the configuration for a call of ``assignments`` over a layer of ``experts``.

    ``described`` says that the copy engine can load the matrices. With ``exact`` a row's bits must
    not depend on how many rows there are, so it is one configuration for all.
    """
    if not described:
        return PLAIN
    rows = assignments / experts
    if exact or rows <= 8:
        return FEW_ROWS
    if rows <= 32:
        return SOME_ROWS
    return MORE_ROWS if rows <= 128 else MANY_ROWS


# Not measured yet.
BACKWARD_16_BITS = BackwardConfiguration(
    64,
    hidden=Blocks(columns=64, inner=32, warps=4, stages=3),
    x=Blocks(columns=128, inner=32, warps=4, stages=3),
    weights=Blocks(columns=128, inner=32, warps=8, stages=3),
    weight_rows=128,
)
BACKWARD_32_BITS = BackwardConfiguration(
    16,
    hidden=Blocks(32, 32, 4, 2),
    x=Blocks(32, 32, 4, 2),
    weights=Blocks(32, 16, 4, 2),
    weight_rows=32,
)


def backward_configuration_for(bytes_of_a_number: int) -> BackwardConfiguration:
    """Return the configuration for experts of a type: one for all calls, so that bits stay."""
    return BACKWARD_16_BITS if bytes_of_a_number == 2 else BACKWARD_32_BITS
