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


FEW_ROWS = Configuration(16, Blocks(32, 128, 4, 4), Blocks(32, 128, 4, 4))
SOME_ROWS = Configuration(64, Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 3))
MANY_ROWS = Configuration(128, Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 3))
# With `exact` a row's bits must not depend on how many rows there are.
EXACT = FEW_ROWS


def configuration_for(assignments: int, experts: int) -> Configuration:
    """Return the configuration for a call of ``assignments`` over a layer of ``experts``."""
    rows = assignments / experts
    if rows <= 24:
        return FEW_ROWS
    return SOME_ROWS if rows <= 96 else MANY_ROWS
