"""Functions of transformers' experts are recognised by what they compute."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.kernels.grouped.activation import FUNCTIONS, Activation
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
