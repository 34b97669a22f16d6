"""The auxiliary loss of a whole step in parts, however workers and microbatches divide it.

It is E sum_e f_e P_e over all rows (tokens of all layers together), as in Switch Transformer
(arXiv 2101.03961, equations 4 to 6) and transformers' `load_balancing_loss_func`: f_e are the
assignments to expert e for each row, and P_e is the mean of its probability. Only P is
differentiated, so with f of the whole step the loss is a sum over rows.

Shape suffixes: R = rows of a layer, E = experts, K = assignments of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """Where gates have sent rows."""

    rows: float  # of all layers together
    counts_E: Tensor  # float64: assignments to each expert

    @property
    def numbers(self) -> list[float]:
        """All of it in one list, in which workers' numbers can be added up."""
        return [self.rows, *self.counts_E.tolist()]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Routed:
        """Return what a list of `numbers`, or a sum of such lists, stands for."""
        return cls(numbers[0], torch.tensor(numbers[1:], dtype=torch.float64))


def routed(logits_RE: Iterable[Tensor], top_k: int, mask_R: Tensor | None = None) -> Routed:
    """Count where the gates of a forward pass have sent its rows, by each layer's logits.

    ``mask_R`` is 0 for rows that do not count, of each layer alike.
    """
    rows, counts_E = 0.0, None
    for layer_RE in logits_RE:
        ids_RK = layer_RE.detach().topk(top_k, dim=-1).indices
        weights_R = torch.ones(len(ids_RK), dtype=torch.float64, device=ids_RK.device)
        if mask_R is not None:
            weights_R = mask_R.flatten().to(weights_R)
        if counts_E is None:
            counts_E = weights_R.new_zeros(layer_RE.shape[-1])
        counts_E.index_add_(0, ids_RK.flatten(), weights_R.repeat_interleave(top_k))
        rows += float(weights_R.sum())
    assert counts_E is not None, "a model without gates"
    return Routed(rows, counts_E.cpu())


def balance_part(
    logits_RE: Iterable[Tensor], of_step: Routed, mask_R: Tensor | None = None
) -> Tensor:
    """Return a forward pass's part of the loss of a step, in which rows were routed so.

    The parts of all forward passes of the step add up to its loss.
    """
    sums: list[Tensor] = []
    for layer_RE in logits_RE:
        probabilities_RE = layer_RE.softmax(dim=-1)
        wide = torch.promote_types(probabilities_RE.dtype, torch.float32)
        probabilities_RE = probabilities_RE.to(wide)
        if mask_R is not None:
            probabilities_RE = probabilities_RE * mask_R.flatten()[:, None].to(probabilities_RE)
        fractions_E = (of_step.counts_E / of_step.rows).to(probabilities_RE)
        sums.append((probabilities_RE.sum(dim=0) * fractions_E).sum())
    experts = len(of_step.counts_E)
    return torch.stack(sums).sum() * (experts / of_step.rows)
