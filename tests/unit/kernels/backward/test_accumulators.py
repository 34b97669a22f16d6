"""Sums of gradients: their types, their memory, what is not finite, and the order of additions."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.kernels.backward.accumulators import GradientAccumulators, sum_of_squares


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_sums_are_made_where_something_is_added_and_are_wide(
    dtype: torch.dtype, wide: torch.dtype, exact: bool
) -> None:
    accumulators = GradientAccumulators(exact=exact)
    assert accumulators.nbytes == 0
    left_RM, right_RN = torch.ones(2, 3, dtype=dtype), torch.full((2, 4), 0.5, dtype=dtype)
    accumulators.add_product("e", "up", left_RM, right_RN)
    accumulators.add("e", "up", torch.ones(3, 4, dtype=dtype))
    accumulators.add_rows("e", "up_bias", right_RN)
    assert accumulators.nbytes == (12 + 4) * (8 if exact else wide.itemsize)
    assert "e" in accumulators
    assert "f" not in accumulators
    taken = accumulators.take("e")
    kept = torch.float64 if exact else wide
    assert {name: one.dtype for name, one in taken.items()} == {"up": kept, "up_bias": kept}
    assert taken["up"].tolist() == [[2.0] * 4] * 3
    assert taken["up_bias"].tolist() == [1.0] * 4
    assert (len(accumulators), accumulators.nbytes) == (0, 0)
    with pytest.raises(KeyError):
        accumulators.take("e")


def test_after_clear_sums_begin_at_zero() -> None:
    accumulators = GradientAccumulators()
    for _ in range(2):
        accumulators.add(1, "down", torch.ones(2, 2))
        assert accumulators.squared_norms() == {1: {"down": pytest.approx(4.0, rel=1e-15)}}
        accumulators.clear()
        assert list(accumulators) == []


def test_a_product_of_half_precision_is_added_without_rounding_to_it() -> None:
    accumulators = GradientAccumulators()
    ones_R1 = torch.ones(1001, 1, dtype=torch.bfloat16)
    accumulators.add_product("e", "up", ones_R1, ones_R1)
    accumulators.add_rows("e", "up_bias", ones_R1)
    taken = accumulators.take("e")
    assert (float(taken["up"]), float(taken["up_bias"])) == (1001.0, 1001.0)  # bfloat16 has 1000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(order=st.permutations(range(12)), seed=st.integers(0, 100))
def test_the_order_does_not_show_in_exact_sums(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(12, 40, 30, generator=generator)
    straight, other = GradientAccumulators(exact=True), GradientAccumulators(exact=True)
    for at in range(12):
        straight.add("e", "up", gradients[at])
        other.add("e", "up", gradients[order[at]])
    assert torch.equal(straight.take("e")["up"], other.take("e")["up"])


def test_the_order_does_show_in_others() -> None:
    """Without this the test above would show nothing."""
    gradients = torch.randn(12, 40, 30, generator=torch.Generator().manual_seed(0))
    straight, other = GradientAccumulators(), GradientAccumulators()
    for at in range(12):
        straight.add("e", "up", gradients[at])
        other.add("e", "up", gradients[11 - at])
    assert not torch.equal(straight.take("e")["up"], other.take("e")["up"])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_experts_whose_gradients_are_not_finite_are_named(value: float, exact: bool) -> None:
    accumulators = GradientAccumulators(exact=exact)
    for expert in range(4):
        accumulators.add(expert, "up", torch.ones(3, 2))
        accumulators.add(expert, "up_bias", torch.ones(3))
    assert accumulators.not_finite() == []
    accumulators.add(1, "up_bias", torch.tensor([0.0, value, 0.0]))
    accumulators.add(3, "up", torch.full((3, 2), value))
    assert accumulators.not_finite() == [1, 3]


def test_large_gradients_are_finite_if_only_their_sum_is_not() -> None:
    accumulators = GradientAccumulators()
    accumulators.add("e", "up", torch.full((3, 3), 3e38))
    assert accumulators.not_finite() == []


def test_an_exact_sum_that_overflows_when_it_is_rounded_is_not_finite() -> None:
    accumulators = GradientAccumulators(exact=True)
    for _ in range(2):
        accumulators.add("e", "up", torch.full((1, 1), 3e38))
    assert accumulators.not_finite() == ["e"]


def test_squared_norms_are_added_up_in_float64() -> None:
    """Four tensors of norms 2, 4, 6, 8: together sqrt(120)."""
    accumulators = GradientAccumulators()
    for expert, norm in enumerate((2.0, 4.0, 6.0, 8.0)):
        drawn = torch.randn(700, 3000, generator=torch.Generator().manual_seed(expert))
        accumulators.add(expert, "up", (drawn.double() / drawn.double().norm() * norm).float())
    squares = [norms["up"] for norms in accumulators.squared_norms().values()]
    assert math.sqrt(math.fsum(squares)) == pytest.approx(10.954451150103322, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (512,), (700, 300)])
def test_squares_are_not_lost_if_they_do_not_fit_float32(
    shape: tuple[int, ...], scale: float
) -> None:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    expected = drawn.double().square().sum().item()
    assert sum_of_squares(drawn) == pytest.approx(expected, rel=1e-6)
    outlier = torch.cat([drawn.flatten(), torch.tensor([1e30])])
    assert sum_of_squares(outlier) == pytest.approx(expected + 1e60, rel=1e-6)


def test_a_gradient_of_another_shape_is_an_error() -> None:
    accumulators = GradientAccumulators()
    accumulators.add("e", "up", torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"up of expert e: .*\(1, 2\).*\(3, 2\)"):
        accumulators.add("e", "up", torch.ones(1, 2))


def test_sums_that_were_made_in_inference_mode_are_added_to_anywhere() -> None:
    accumulators = GradientAccumulators()
    with torch.inference_mode():
        accumulators.add("e", "up", torch.ones(2, 2))
        accumulators.add_product("e", "down", torch.ones(1, 2), torch.ones(1, 2))

    def add() -> None:
        accumulators.add("e", "up", torch.ones(2, 2))
        accumulators.add_product("e", "down", torch.ones(1, 2), torch.ones(1, 2))

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    taken = accumulators.take("e")
    assert all(one.tolist() == [[2.0, 2.0]] * 2 for one in taken.values())
    assert not any(one.is_inference() for one in taken.values())
