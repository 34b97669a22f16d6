"""A layer's forward pass that keeps what its backward half needs, for both halves in one process.

Without it the up-projection would be computed a second time, which is two thirds of a forward pass.
Each half goes through the experts one after another, as the `loop` kernels do, and has their bits.
The rows themselves are not kept: the backward half is given them again.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, R = rows of one expert, U =
the up-projection's size (two intermediate sizes if gated, otherwise one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ffn import ExpertForm, ExpertWeights, expert_down, expert_up, sorted_assignments
from .ffn import (
    BackwardForm,
    ExpertGradients,
    PendingGradients,
    expert_backward,
    refuse_packed,
    write_rows,
)


@dataclass(frozen=True, slots=True)
class KeptRows:
    """One expert's rows of a call, in the order of their tokens."""

    assignment_R: Tensor  # indices in T * K
    up_RU: Tensor  # before the activation


class KeptCall:
    """What is kept of a call until its backward half.

    For each assignment this is U numbers in the experts' type, and an index of 8 bytes.
    (transformers' `grouped_mm` keeps as much, and also the rows and what it computes after the
    up-projection.)
    """

    def __init__(self, rows: dict[int, KeptRows]) -> None:
        self._rows: dict[int, KeptRows] | None = rows

    @property
    def nbytes(self) -> int:
        kept = (self._rows or {}).values()
        return sum(t.nbytes for one in kept for t in (one.assignment_R, one.up_RU))

    def take(self) -> dict[int, KeptRows]:
        """Return the rows by expert, and forget them. Raises RuntimeError the second time."""
        if self._rows is None:
            raise RuntimeError("the backward half of this call has been computed already")
        rows, self._rows = self._rows, None
        return rows


@torch.no_grad()
def keeping_forward(
    form: ExpertForm,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TH: Tensor,
) -> KeptCall:
    """Compute what `ffn.loop_kernel` does, of the same tensors, and keep what is needed later.

    Raises ValueError for a packed expert.
    """
    assignments = sorted_assignments(ids_TK, x_TH.device)
    refuse_packed(experts, assignments.experts)
    out_TH.zero_()
    kept: dict[int, KeptRows] = {}
    for number, assignment_R in assignments.pieces():
        token_R = assignment_R // ids_TK.shape[1]
        # What is kept must be ordinary tensors, whichever mode the backward half is in.
        with torch.inference_mode(False), torch.no_grad():
            up_RU = expert_up(form, experts[number], x_TH.index_select(0, token_R))
        y_RH = expert_down(form, experts[number], up_RU).to(out_TH.dtype)
        weights_R = weights_TK.reshape(-1).index_select(0, assignment_R)
        out_TH.index_add_(0, token_R, y_RH.mul_(weights_R.unsqueeze(-1)))
        kept[number] = KeptRows(assignment_R, up_RU)
    return KeptCall(kept)


@torch.no_grad()
def kept_backward(
    form: BackwardForm,
    experts: Mapping[int, ExpertWeights],
    kept: KeptCall,
    x_TH: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
    grad_x: Tensor,
    grad_weights_TK: Tensor,
) -> PendingGradients:
    """Compute what `BackwardKernel` does, with what the forward half has kept, and that only once.

    ``x_TH`` is that of the forward half. The memory that was kept is used for what is returned.
    """
    grad_x.zero_()
    grad_weights_TK.zero_()
    gradients: dict[int, ExpertGradients] = {}
    waiting = kept.take()
    for number in list(waiting):
        rows = waiting.pop(number)
        token_R = rows.assignment_R // weights_TK.shape[1]
        given = (x_TH, token_R), (weights_TK.reshape(-1), rows.assignment_R), (grad_y_TH, token_R)
        with torch.inference_mode(False), torch.no_grad():
            x_RH, weights_R, grad_y_RH = (one.index_select(0, at_R) for one, at_R in given)
            of_weights_R, of_x_RH, gradients[number] = expert_backward(
                form, experts[number], x_RH, rows.up_RU, weights_R, grad_y_RH
            )
        write_rows(grad_x, rows.assignment_R, token_R, of_x_RH)
        grad_weights_TK.view(-1)[rows.assignment_R] = of_weights_R
    return PendingGradients(gradients)
