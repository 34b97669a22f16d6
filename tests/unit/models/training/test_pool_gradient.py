"""What a gradient that is on the hosts does, and that all else is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.models.training.pool_gradient import PoolGradient, Recorded
from moesaic.proto.errors import BadInput

UNTYPED: Any = torch  # some functions have no types


def with_norm(norm: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Return a stand-in whose gradient has this norm."""
    parameter = nn.Parameter(torch.zeros(1, 1, 1, dtype=dtype))
    PoolGradient.of(parameter, Recorded("experts.down_proj", None, lambda: norm**2))
    return parameter


def recorded(parameter: nn.Parameter) -> Recorded:
    assert isinstance(parameter.grad, PoolGradient)
    return parameter.grad.recorded


def plain(*values: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


@pytest.mark.parametrize("foreach", [None, True, False])
def test_norms_of_four_experts_make_the_norm_that_clips_all(foreach: bool | None) -> None:
    parameters = [with_norm(2.0), plain(4.0), with_norm(6.0), plain(0.0, 8.0)]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=foreach)
    assert norm.item() == pytest.approx(10.954451, abs=1e-6)
    assert type(norm) is Tensor and norm.dtype == torch.float32
    factor = 1 / (norm.item() + 1e-6)
    assert recorded(parameters[0]).factor == recorded(parameters[2]).factor
    assert recorded(parameters[0]).factor == pytest.approx(factor, rel=1e-7)
    assert parameters[3].grad is not None
    assert parameters[3].grad.tolist() == pytest.approx([0.0, 8 * factor], rel=1e-7)
    again = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    assert again.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_other_norms_are_refused(foreach: bool | None, norm_type: float) -> None:
    with pytest.raises(BadInput, match=r"experts.down_proj: norm_type is .*, and only 2 is known"):
        torch.nn.utils.clip_grad_norm_(
            [plain(1.0), with_norm(1.0)], 1.0, norm_type, foreach=foreach
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite(value: float) -> None:
    parameters = [plain(1.0), with_norm(value)]
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    assert recorded(parameters[1]).factor == 1.0
    assert not torch.nn.utils.clip_grad_norm_(parameters, 1.0).isfinite()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_norms_are_wide(dtype: torch.dtype, wide: torch.dtype) -> None:
    parameter = with_norm(100_000.0, dtype)
    assert parameter.grad is not None and parameter.grad.dtype == dtype
    for found in (parameter.grad.norm(), torch.nn.utils.clip_grad_norm_([parameter], 1.0)):
        assert found.dtype == wide and found.item() == 100_000.0


def test_the_norm_is_asked_for_when_it_is_needed() -> None:
    asked = []
    parameter = nn.Parameter(torch.zeros(1))
    PoolGradient.of(parameter, Recorded("p", None, lambda: asked.append(1) or 4.0))
    assert parameter.grad is not None
    parameter.grad.mul_(3.0)
    assert "p" in repr(parameter.grad)
    assert not asked
    assert parameter.grad.norm().item() == 6.0
    assert asked


MULTIPLY: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda g: g.mul_(0.25),
    "mul_ by a tensor": lambda g: g.mul_(torch.tensor(0.25)),
    "div_": lambda g: g.div_(4),
    "div_ by a tensor": lambda g: g.div_(torch.tensor(4.0)),
    "of data": lambda g: g.data.mul_(0.25),
    "of a detached one": lambda g: g.detach().div_(4.0),
    "foreach": lambda g: UNTYPED._foreach_mul_([g, torch.ones(2)], 0.25),
    "foreach by a tensor": lambda g: UNTYPED._foreach_mul_([g, torch.ones(2)], torch.tensor(0.25)),
    "foreach div": lambda g: UNTYPED._foreach_div_([torch.ones(2), g], 4.0),
}


@pytest.mark.parametrize("how", MULTIPLY)
def test_multiplications_are_recorded(how: str) -> None:
    parameter = with_norm(2.0)
    for _ in range(2):
        MULTIPLY[how](parameter.grad)
    assert recorded(parameter).factor == 1 / 16
    assert recorded(parameter).norm == 2 / 16


def test_a_product_is_another_gradient() -> None:
    parameter = with_norm(2.0)
    first = parameter.grad
    assert isinstance(first, PoolGradient)
    for made in (first * 0.5, 0.5 * first, first * torch.tensor(0.5), first / 2):
        assert isinstance(made, PoolGradient)
        assert made.recorded.factor == 0.5 and first.recorded.factor == 1.0
        parameter.grad = made
        assert recorded(parameter).norm == 1.0


@pytest.mark.parametrize(("norm", "found"), [(8.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)])
def test_a_scaler_takes_its_scale_back(norm: float, found: float) -> None:
    parameters = [with_norm(norm), plain(8.0)]
    optimizer = torch.optim.SGD(parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert recorded(parameters[0]).factor == 0.25
    assert parameters[1].grad is not None and parameters[1].grad.item() == 2.0
    (seen,) = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    assert seen.item() == found


REFUSED: dict[str, Callable[[Any], Any]] = {
    "aten.add": lambda g: g + 1,
    "aten.sum": lambda g: g.sum(),
    "aten.clone": lambda g: g.clone(),
    "aten.zero_": lambda g: g.zero_(),
    "aten.isfinite|aten.eq|aten.abs": lambda g: torch.isfinite(g),
    "aten.clamp_": lambda g: g.clamp_(-1, 1),
    "aten.copy_|aten._to_copy": lambda g: torch.ones(1, 1, 1).copy_(g),
    "aten._local_scalar_dense": lambda g: g.item(),
    "aten.mul_.*one number": lambda g: g.mul_(torch.ones(3)),
    "aten.mul.*one number": lambda g: g * g,
    "aten.mul_.*it is no factor": lambda g: torch.ones(1, 1, 1).mul_(g),
    "aten.div.*it cannot divide": lambda g: torch.ones(1, 1, 1) / g,
    "aten.add.out": lambda g: torch.add(torch.ones(1, 1, 1), 1.0, out=g),
    "aten._foreach_mul_.*one number": lambda g: UNTYPED._foreach_mul_([torch.ones(2)], g),
    "aten._foreach_add_|aten.add_": lambda g: UNTYPED._foreach_add_([torch.ones(1), g], 1.0),
    "over all dimensions": lambda g: g.norm(dim=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_everything_else_is_refused_and_says_what_to_do(message: str) -> None:
    parameter = with_norm(2.0)
    with pytest.raises(BadInput, match=f"{message}") as caught:
        REFUSED[message](parameter.grad)
    assert "of experts.down_proj" in str(caught.value)
    assert "PoolOptimizer" in str(caught.value)
    assert recorded(parameter).factor == 1.0


@pytest.mark.parametrize("foreach", [True, False])
def test_another_optimizer_is_refused(foreach: bool) -> None:
    parameters = [plain(1.0), with_norm(1.0)]
    with pytest.raises(BadInput, match=r"on the gradient of experts.down_proj"):
        torch.optim.AdamW(parameters, foreach=foreach).step()
    with pytest.raises(BadInput, match=r"on the gradient of experts.down_proj"):
        torch.nn.utils.clip_grad_value_(parameters, 1.0)
    with pytest.raises(BadInput, match=r"aten.zero_|aten._foreach_zero_"):
        torch.optim.SGD(parameters, foreach=foreach).zero_grad(set_to_none=False)
    with pytest.raises(BadInput, match=r"on the gradient of experts.down_proj"):
        copy.deepcopy(parameters[1].grad)
