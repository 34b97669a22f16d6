"""Functions of transformers' experts are recognised by what they compute."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.kernels.grouped.activation import FUNCTIONS, Activation, value_and_gradient
from moesaic.models.trunk.experts_layers import ExpertsLayer
from tests.helpers.models.forms import HIDDEN, KINDS, decorated_classes, transformers_experts
from tests.helpers.models.versions import newest_transformers

# What a kernel cannot be told: Inkling2 divides by norms of gate and value.
UNKNOWN = {"Inkling2Experts"}


@newest_transformers
def test_all_functions_of_transformers_are_known_but_for_those_named() -> None:
    unknown = set()
    for name, module in decorated_classes().items():
        experts = transformers_experts(name, module)
        form = ExpertsLayer(0, name, experts, 8, HIDDEN).form()
        if Activation.of(form.activate, gated=bool(experts.has_gate)) is None:
            unknown.add(name)
    assert unknown == UNKNOWN


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("limit", "offset"), [(math.inf, 0.0), (7.0, 1.0), (0.75, 0.0)])
def test_a_gate_is_read_from_single_values(
    name: str, interleaved: bool, limit: float, offset: float
) -> None:
    alphas = (1.0, 1.702) if name == "silu" else (1.0,)
    for alpha in alphas:
        wanted = Activation(name, True, interleaved, alpha, limit, offset)
        assert Activation.of(wanted, gated=True) == wanted


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_function_without_a_gate_is_recognised(name: str) -> None:
    assert Activation.of(FUNCTIONS[name], gated=False) == Activation(name, gated=False)


def test_gpt_oss_is_read_with_its_numbers() -> None:
    found = Activation.of(KINDS["interleaved-clamped"].activate, gated=True)
    assert found == Activation("silu", True, True, 1.702, 1.0, 1.0)


def test_what_no_kernel_computes_is_not_guessed() -> None:
    def softcapped(up_R: torch.Tensor) -> torch.Tensor:
        gate, value = up_R.chunk(2, dim=-1)
        return torch.tanh(gate) * torch.tanh(value)

    assert Activation.of(softcapped, gated=True) is None
    assert Activation.of(torch.sin, gated=False) is None


# ---- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("gated", ["gates first", "interleaved", "no gate"])
@pytest.mark.parametrize(("limit", "offset"), [(math.inf, 0.0), (1.0, 1.0)])
def test_a_derivative_is_that_of_autograd(
    name: str, gated: str, limit: float, offset: float
) -> None:
    one = Activation(
        name,
        gated != "no gate",
        gated == "interleaved",
        1.702 if name == "silu" else 1.0,
        limit,
        offset,
    )
    generator = torch.Generator().manual_seed(0)
    up_R = (2 * torch.randn(50, 24, generator=generator)).double().requires_grad_()
    with torch.no_grad():
        up_R[0, :4] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # at the limits
    expected_RI = one(up_R)
    grad_RI = torch.randn(expected_RI.shape, generator=generator).double()
    (expected_R,) = torch.autograd.grad(expected_RI, up_R, grad_RI)
    found_RI, found_R = one.backward(up_R.detach(), grad_RI)
    torch.testing.assert_close(found_RI, expected_RI.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found_R, expected_R, rtol=1e-13, atol=1e-13)
    again_R = up_R.detach().clone()
    again_RI, over_R = one.backward(again_R, grad_RI, overwrite=True)
    assert over_R.data_ptr() == again_R.data_ptr()
    assert torch.equal(over_R, found_R)
    assert torch.equal(again_RI, found_RI)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_a_limit_does_not_hide_nan(name: str) -> None:
    one = Activation(name, limit=1.0)
    nan_R = torch.full((1, 4), torch.nan)
    activated_RI, grad_R = one.backward(nan_R, torch.ones(1, 2))
    assert activated_RI.isnan().all()
    assert grad_R.isnan().all()


def test_autograd_works_in_inference_mode() -> None:
    with torch.inference_mode():
        value, gradient = value_and_gradient(torch.square, torch.tensor([3.0]), torch.tensor([2.0]))
    assert (value.tolist(), gradient.tolist()) == ([9.0], [12.0])
    assert not value.is_inference()
    assert not gradient.is_inference()
