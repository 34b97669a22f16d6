"""A layer call's assignments, sorted by expert and cut into tiles on the device.

Shape suffixes: T = tokens, K = assignments of a token, N = T * K, E = experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import programs as triton_programs
from .slots import LayerSlots, StepFlags

_IDS_OF_A_STEP = 4096  # that `align` reads at once
programs: Any = triton_programs  # a launch takes options that no signature shows


class Tiles:
    """The tiles of a call, each up to ``rows`` rows of one expert.

    With ``direct`` nothing is sorted and every assignment is a tile of its own. With ``has_spans``
    the programs also write where each expert's rows begin, and how many there are.
    """

    def __init__(
        self,
        slots: LayerSlots,
        ids_TK: Tensor,
        flags: StepFlags,
        rows: int,
        *,
        direct: bool = False,
        has_spans: bool = False,
    ) -> None:
        self.ids_TK, self.direct = ids_TK, direct
        assignments, experts = ids_TK.numel(), slots.table_LE.shape[1]
        if direct:
            self.count = assignments
            self.order_N = self.records = self.total = self.spans_E3 = ids_TK
            return
        device = ids_TK.device

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        used = min(experts, assignments)
        # Each expert's last tile may have a single row.
        self.count = used + (assignments - used) // rows
        self.order_N, self.total = empty(assignments), empty(1)
        self.records = empty(self.count, programs.TILE_FIELDS)
        self.spans_E3 = empty(experts, 3) if has_spans else self.records
        programs.align[(experts,)](
            ids_TK,
            slots.table_LE,
            slots.layer,
            self.order_N,
            self.records,
            self.total,
            self.spans_E3,
            flags.missing,
            assignments,
            experts,
            HAS_SPANS=has_spans,
            TILE_FIELDS=programs.TILE_FIELDS,
            BLOCK_E=power_of_2(experts + 1),
            BLOCK_N=min(_IDS_OF_A_STEP, max(32, power_of_2(assignments))),
            BLOCK_M=rows,
            BLOCK_T=64,
            num_warps=4 if assignments <= 1024 else 8,
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(value: int) -> int:
    """Return the smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()
