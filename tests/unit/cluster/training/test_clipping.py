"""The norm over all tensors of a step, and the factor that clips it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.training.clipping import clip_coefficient
from moesaic.proto.errors import BadInput


def test_four_experts_of_norms_2_4_6_8() -> None:
    squares = {expert: {"up": norm**2} for expert, norm in enumerate((2.0, 4.0, 6.0, 8.0))}
    found = clip_coefficient(squares, 1.0)
    assert found.norm == pytest.approx(10.954451, abs=5e-7)
    assert found.coefficient == pytest.approx(1 / 10.954451, rel=1e-6)
    assert clip_coefficient(squares, None) == (found.norm, 1.0, ())
    assert clip_coefficient(squares, 11.0).coefficient == 1.0
    assert clip_coefficient({}, 1.0) == (0.0, 1.0, ())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    scale=st.floats(1e-8, 1e4),
    max_norm=st.floats(1e-3, 1e3),
    order=st.permutations(range(6)),
)
def test_it_is_the_factor_of_clip_grad_norm(
    scale: float, max_norm: float, order: list[int]
) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    gradients = [gradient * scale for gradient in gradients]
    parameters = [torch.zeros(5, 4, dtype=torch.float64) for _ in range(6)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    squares = {
        at: {
            "up": gradients[at][:3].square().sum().item(),
            "down": gradients[at][3:].square().sum().item(),
        }
        for at in order
    }
    found = clip_coefficient(squares, max_norm)
    assert found.norm == pytest.approx(norm.item(), rel=1e-12)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * found.coefficient, rtol=1e-6, atol=0)
    assert found == clip_coefficient(dict(sorted(squares.items())), max_norm)  # to the bit


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite_are_named(value: float) -> None:
    found = clip_coefficient(
        {"a": {"up": 1.0, "down": value}, "b": {"up": 2.0}, "c": {"up": value}}, 1.0
    )
    assert not math.isfinite(found.norm)
    assert math.isnan(found.coefficient)
    assert found.not_finite == (("a", "down"), ("c", "up"))


def test_a_sum_that_overflows_is_not_finite() -> None:
    found = clip_coefficient({"a": {"up": 1e308}, "b": {"up": 1e308}}, 1.0)
    assert (found.norm, found.not_finite) == (math.inf, ())
    assert math.isnan(found.coefficient)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_clips_nothing_or_everything_is_refused(max_norm: float) -> None:
    with pytest.raises(BadInput, match=f"max_norm {max_norm} must be finite and positive"):
        clip_coefficient({}, max_norm)
