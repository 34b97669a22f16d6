"""Gradients that are added up in float64, and what happens to them outside."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from moesaic.actors.training.exact_gradients import ExactGradients

GIVEN = torch.randn(6, 50, 40, generator=torch.Generator().manual_seed(0))
FORWARDS, BACKWARDS = range(6), range(5, -1, -1)


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(50, 40, dtype=dtype))


def learn(one: nn.Parameter, order: Sequence[int]) -> Tensor:
    """Add gradients up, one after the other; return `grad`."""
    for at in order:
        (one * GIVEN[at].to(one.dtype)).sum().backward()
    assert one.grad is not None
    return one.grad


def taken(exact: ExactGradients, one: nn.Parameter) -> Tensor:
    assert one.grad is not None
    return exact.take({"p": one.grad})["p"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_exact_and_the_gradient_is_its_rounding(dtype: torch.dtype) -> None:
    one = parameter(dtype)
    exact = ExactGradients({"p": one})
    grad = learn(one, FORWARDS)
    wanted = GIVEN.to(dtype).double().sum(0)
    assert torch.equal(taken(exact, one), wanted)
    assert torch.equal(grad, wanted.to(dtype))


def test_workers_together_have_the_bits_of_one() -> None:
    """In float32 they have not: without this the test would show nothing."""
    sums, plain = [], []
    for parts in ([FORWARDS], [[5, 1], [0, 3], [2, 4]]):
        sum_64, sum_32 = torch.zeros(50, 40, dtype=torch.float64), torch.zeros(50, 40)
        for part in parts:
            one = parameter()
            exact = ExactGradients({"p": one})
            learn(one, part)
            sum_64 += taken(exact, one)
            exact.close()
            one.grad = None
            sum_32 += learn(one, part)
        sums.append(sum_64.float())
        plain.append(sum_32)
    assert torch.equal(*sums)
    assert not torch.equal(*plain)


def test_what_has_changed_a_gradient_counts() -> None:
    one = parameter()
    exact = ExactGradients({"p": one})
    learn(one, FORWARDS).mul_(0.3)
    assert one.grad is not None
    assert torch.equal(taken(exact, one), one.grad.double())
    before = one.grad.double()
    learn(one, [2])
    assert torch.equal(taken(exact, one), before + GIVEN[2].double())
    one.grad = one.grad.clone()
    assert torch.equal(taken(exact, one), one.grad.double())


@pytest.mark.parametrize("is_dropped", [True, False])
def test_dropped_gradients_are_not_in_the_next_sum(is_dropped: bool) -> None:
    one = parameter()
    exact = ExactGradients({"p": one})
    learn(one, FORWARDS)
    one.grad = None
    if not is_dropped:
        exact.clear()
    learn(one, [3, 1])
    assert torch.equal(taken(exact, one), GIVEN[3].double() + GIVEN[1])


def test_after_close_gradients_are_pytorchs_own() -> None:
    one, other = parameter(), parameter()
    exact = ExactGradients({"p": one})
    learn(one, FORWARDS)
    exact.close()
    one.grad = None
    assert torch.equal(learn(one, BACKWARDS), learn(other, BACKWARDS))
    assert not exact._sums
    assert not one._backward_hooks
    assert not one._post_accumulate_grad_hooks


def test_a_sparse_gradient_is_left_to_the_step_which_refuses_it() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    assert isinstance(table.weight, nn.Parameter)
    exact = ExactGradients({"p": table.weight})
    table(torch.tensor([1, 2])).sum().backward()
    assert table.weight.grad is not None and table.weight.grad.is_sparse
    assert not exact._sums
