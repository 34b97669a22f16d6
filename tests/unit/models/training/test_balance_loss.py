"""The auxiliary loss of a step is that of transformers, however the step is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moesaic.models.training.balance_loss import Routed, balance_part, routed

LAYERS, EXPERTS, TOP_K = 3, 5, 2
ROWS = 4, 9, 1, 6  # of the microbatches


def logits(seed: int) -> list[list[Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(rows, EXPERTS, generator=chance, dtype=torch.float64).requires_grad_()
            for _ in range(LAYERS)
        ]
        for rows in ROWS
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_the_parts_of_a_step_add_up_to_its_loss_and_its_gradients(masked: bool) -> None:
    parts, whole = logits(1), logits(1)
    masks = [(torch.arange(rows) % 3 != 0).long() if masked else None for rows in ROWS]
    counted = [routed(part, TOP_K, mask).numbers for part, mask in zip(parts, masks, strict=True)]
    of_step = Routed.of([sum(column) for column in zip(*counted, strict=True)])
    total = torch.zeros((), dtype=torch.float64)
    for part, mask in zip(parts, masks, strict=True):
        one = balance_part(part, of_step, mask)
        one.backward()
        total += one.detach()
    together: Any = tuple(torch.cat([part[layer] for part in whole]) for layer in range(LAYERS))
    mask = torch.cat([one for one in masks if one is not None]) if masked else None
    expected = load_balancing_loss_func(together, EXPERTS, TOP_K, mask)
    assert isinstance(expected, Tensor)
    expected.backward()
    # transformers adds up in float32.
    assert abs(total.item() - expected.item()) < 1e-6
    for ours, theirs in zip(parts, whole, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert (one.grad - other.grad).abs().max() < 1e-7


def test_even_gates_have_a_loss_of_k() -> None:
    eye = torch.eye(EXPERTS, dtype=torch.float64)
    even = [torch.cat([eye, eye.roll(1, 1) + eye]).repeat(2, 1)[EXPERTS : 2 * EXPERTS]]
    found = routed(even, TOP_K)
    assert found.counts_E.tolist() == [TOP_K] * EXPERTS
    assert abs(balance_part(even, found).item() - TOP_K) < 1e-12
