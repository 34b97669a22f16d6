"""The grouped backward pass against autograd in float64, in Triton's interpreter and on a card.

Tolerances, largest difference as a part of the largest gradient of a tensor: float32 1e-5, float16
5e-3, bfloat16 4e-2, as for the kernels on CPUs.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.grouped.activation import FUNCTIONS, Activation
from moesaic.kernels.grouped.backward import SlotGradients, grouped_backward
from moesaic.kernels.grouped.configurations import (
    BACKWARD_16_BITS,
    BACKWARD_32_BITS,
    BackwardConfiguration,
    Blocks,
)
from moesaic.kernels.grouped.slots import LayerSlots, StepFlags, from_slot
from tests.helpers.models.forms import KINDS, Kind, random_experts
from tests.helpers.models.gradients import (
    Gradients,
    assert_gradients_near,
    autograd_oracle,
    away_from_limits,
)
from tests.helpers.models.slots import slots_of

pytestmark = [
    pytest.mark.timeout(300),
    # The interpreter multiplies whole tiles with NumPy, unused rows included.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 3, 48, 40
PLACES = {0: 3, 2: 0, 5: 5, 7: 1}  # the slots of the experts that are there
SMALL = BackwardConfiguration(
    16, Blocks(32, 32, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 16, 4, 2), weight_rows=64
)
Call = tuple[Tensor, Tensor, Tensor, Tensor]


def held(
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    *,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> dict[int, ExpertWeights]:
    return random_experts(kind, PLACES, dtype=dtype, hidden=hidden, intermediate=intermediate)


def call(
    tokens: int,
    dtype: torch.dtype = torch.float32,
    *,
    experts: tuple[int, ...] = (0, 2, 5, 7, -1),
    hidden: int = HIDDEN,
    seed: int = 0,
) -> Call:
    """x, ids, weights and the gradient of the sums, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, len(experts), (tokens, TOP_K), generator=generator)
    ids_TK = torch.tensor(experts, dtype=torch.int32)[drawn]
    x_TH, grad_y_TH = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))
    return x_TH.to(dtype), ids_TK, torch.rand(tokens, TOP_K, generator=generator), grad_y_TH


def run(
    kind: Kind,
    slots: LayerSlots,
    given: Call,
    *,
    each: bool = False,
    exact: bool = False,
    configuration: BackwardConfiguration | None = SMALL,
    sums: SlotGradients | None = None,
) -> tuple[Gradients, tuple[int, int]]:
    """Both phases, and the flags (missing, infinite)."""
    device = slots.up_SUH.device
    x_TH, ids_TK, weights_TK, grad_y_TH = (one.to(device) for one in given)
    flags = StepFlags.on(device)
    shape = (*ids_TK.shape, x_TH.shape[1]) if each else x_TH.shape
    grad_x = torch.full(shape, torch.nan, device=device)
    grad_weights_TK = torch.full(ids_TK.shape, torch.nan, device=device)
    pending = grouped_backward(
        slots,
        x_TH,
        ids_TK,
        weights_TK,
        grad_y_TH,
        grad_x,
        grad_weights_TK,
        flags,
        configuration=configuration,
    )
    sums = sums or SlotGradients.zeros(slots, exact=exact)
    pending.accumulate(sums)
    used = set(ids_TK.flatten().tolist()) & PLACES.keys()
    experts = {
        e: tensors for e, tensors in in_models_layout(kind, slots, sums).items() if e in used
    }
    return Gradients(grad_x, grad_weights_TK, experts), (int(flags.missing), int(flags.infinite))


def in_models_layout(
    kind: Kind, slots: LayerSlots, sums: SlotGradients
) -> dict[int, dict[str, Tensor]]:
    """The sums of each expert that is there; those of all other slots are zero still."""
    others = sorted(set(range(slots.up_SUH.shape[0])) - set(PLACES.values()))
    assert not any(bool(one[others].any()) for one in sums.sums.values())
    return {
        expert: from_slot(slots.form.activation, sums.at(slot), transposed=kind.transposed)
        for expert, slot in PLACES.items()
    }


def laid(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    device: str,
    *,
    recognised: bool = True,
) -> LayerSlots:
    return slots_of(kind, experts, PLACES, table_size=EXPERTS, device=device, recognised=recognised)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_every_form_has_the_gradients_of_autograd(
    name: str, dtype: torch.dtype, device: str
) -> None:
    kind = KINDS[name]
    experts = held(kind, dtype)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(25, dtype)
    given = x_TH, away_from_limits(kind, experts, x_TH, ids_TK), weights_TK, grad_y_TH
    found, flags = run(kind, laid(kind, experts, device), given)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), TOLERANCE[dtype])
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("function", sorted(FUNCTIONS))
def test_every_function_has_its_derivative(function: str, gated: bool, device: str) -> None:
    alpha = 1.702 if function == "silu" and gated else 1.0
    kind = Kind(activate=Activation(function, gated=gated, alpha=alpha), gated=gated)
    experts, given = held(kind), call(9)
    slots = laid(kind, experts, device)
    assert slots.form.activation is not None
    found, _ = run(kind, slots, given)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gated-bias", "interleaved-clamped", "not-gated", "post-norm"])
def test_a_function_that_no_kernel_knows_gets_its_derivative_by_autograd(
    name: str, device: str
) -> None:
    kind = KINDS[name]
    experts, given = held(kind), call(7)
    found, flags = run(kind, laid(kind, experts, device, recognised=False), given)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-5)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("tokens", "each"), [(0, False), (0, True), (1, False), (3, True), (40, False)]
)
def test_any_number_of_tokens(tokens: int, each: bool, device: str) -> None:
    kind = KINDS["gated-bias"]
    experts, given = held(kind), call(tokens)
    found, flags = run(kind, laid(kind, experts, device), given, each=each)
    if each:
        assert not found.x[given[1] < 0].any(), "an unused assignment is zero"
        found = replace(found, x=found.x.sum(dim=1))
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-5)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chosen", [(5,), (-1,)], ids=["one expert has all", "no expert has any"])
@pytest.mark.parametrize("name", ["gated-bias", "post-norm"])
def test_lopsided_routing(name: str, chosen: tuple[int, ...], device: str) -> None:
    """An expert may even be chosen several times by one token."""
    kind = KINDS[name]
    experts, given = held(kind), call(12, experts=chosen)
    found, flags = run(kind, laid(kind, experts, device), given)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-5)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "each"), [("gated-bias", False), ("post-norm", True)])
def test_an_expert_without_a_slot_is_left_out_and_reported(
    name: str, each: bool, device: str
) -> None:
    kind = KINDS[name]
    experts = held(kind)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(9)
    ids_TK[-1] = torch.tensor([2, 6, 7])
    found, flags = run(
        kind, laid(kind, experts, device), (x_TH, ids_TK, weights_TK, grad_y_TH), each=each
    )
    found = replace(found, x=found.x.sum(dim=1)) if each else found
    there_TK = ids_TK.masked_fill(ids_TK == 6, -1)
    expected = autograd_oracle(kind, experts, x_TH, there_TK, weights_TK, grad_y_TH)
    assert_gradients_near(found, expected, 1e-5)
    assert flags == (1, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "each"), [("gated", True), ("interleaved-clamped", False)])
def test_a_gradient_that_is_not_finite_is_reported(name: str, each: bool, device: str) -> None:
    """A clamp must not hide it: NaN stays NaN."""
    kind = KINDS[name]
    x_TH, ids_TK, weights_TK, grad_y_TH = call(3)
    ids_TK[:] = torch.tensor([0, 2, 7])
    slots = laid(kind, held(kind), device)
    slots.up_SUH[PLACES[2]] = torch.nan
    _, flags = run(kind, slots, (x_TH, ids_TK, weights_TK, grad_y_TH), each=each)
    assert flags == (0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exact", [False, True])
def test_two_calls_add_up_and_each_is_added_once(exact: bool, device: str) -> None:
    kind = KINDS["gated-bias"]
    experts = held(kind)
    slots = laid(kind, experts, device)
    sums = SlotGradients.zeros(slots, exact=exact)
    assert {one.dtype for one in sums.sums.values()} == {torch.float64 if exact else torch.float32}
    expected = {}
    for seed in range(2):
        given = call(12, seed=seed)
        run(kind, slots, given, sums=sums)
        for e, tensors in autograd_oracle(kind, experts, *given).experts.items():
            own = expected.setdefault(e, {})
            expected[e] = {n: own.get(n, 0.0) + t for n, t in tensors.items()}
    for e, tensors in in_models_layout(kind, slots, sums).items():
        for name, tensor in tensors.items():
            difference = (tensor.double().cpu() - expected[e][name]).abs().max()
            assert float(difference) <= 1e-5 * float(expected[e][name].abs().max())


def test_gradients_are_added_once() -> None:
    kind = KINDS["gated"]
    slots = laid(kind, held(kind), "cpu")
    x_TH, ids_TK, weights_TK, grad_y_TH = call(2)
    outputs = torch.empty(2, HIDDEN), torch.empty(2, TOP_K)
    flags, sums = StepFlags.on(torch.device("cpu")), SlotGradients.zeros(slots)
    pending = grouped_backward(slots, x_TH, ids_TK, weights_TK, grad_y_TH, *outputs, flags)
    pending.accumulate(sums)
    with pytest.raises(RuntimeError, match="have been added already"):
        pending.accumulate(sums)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gated-bias", "post-norm"])
def test_it_works_in_inference_mode(name: str, device: str) -> None:
    kind = KINDS[name]
    experts, given = held(kind), call(6)
    expected = autograd_oracle(kind, experts, *given)
    for recognised in (True, False):
        with torch.inference_mode():
            mine = given[0].clone(), given[1].clone(), given[2].clone(), given[3].clone()
            slots = laid(kind, experts, device, recognised=recognised)
            found, _ = run(kind, slots, mine)
        assert_gradients_near(found, expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "configuration",
    [
        BACKWARD_32_BITS,
        BACKWARD_16_BITS,
        BackwardConfiguration(
            32, Blocks(16, 16, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), weight_rows=32
        ),
    ],
    ids=lambda c: f"{c.rows}-{c.weight_rows}",
)
def test_blocks_change_no_result(configuration: BackwardConfiguration, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    kind = KINDS["gated-bias"]
    experts, given = held(kind, dtype), call(40, dtype)
    found, _ = run(kind, laid(kind, experts, device), given, configuration=configuration)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    name=st.sampled_from(sorted(KINDS)),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 70),
    tokens=st.integers(1, 20),
)
def test_any_size(name: str, hidden: int, intermediate: int, tokens: int, device: str) -> None:
    kind = KINDS[name]
    experts = held(kind, hidden=hidden, intermediate=intermediate)
    drawn = call(tokens, hidden=hidden)
    found, _ = run(kind, laid(kind, experts, device), drawn)
    # With few columns a norm's gradient cancels out.
    assert_gradients_near(found, autograd_oracle(kind, experts, *drawn), 1e-5, least=1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_do_not_depend_on_the_slots(device: str) -> None:
    kind = KINDS["gated-bias"]
    experts, given = held(kind), call(20)
    moved = {expert: 6 - slot for expert, slot in PLACES.items()}
    elsewhere = slots_of(kind, experts, moved, table_size=EXPERTS, device=device)
    found, _ = run(kind, laid(kind, experts, device), given)
    x_TH, ids_TK, weights_TK, grad_y_TH = (one.to(device) for one in given)
    grad_x, grad_weights_TK = torch.empty_like(x_TH), torch.empty_like(weights_TK)
    sums = SlotGradients.zeros(elsewhere)
    grouped_backward(
        elsewhere,
        x_TH,
        ids_TK,
        weights_TK,
        grad_y_TH,
        grad_x,
        grad_weights_TK,
        StepFlags.on(x_TH.device),
        configuration=SMALL,
    ).accumulate(sums)
    assert torch.equal(grad_x, found.x)
    assert torch.equal(grad_weights_TK, found.weights_TK)
    for expert, tensors in found.experts.items():
        for name, tensor in tensors.items():
            assert torch.equal(sums.at(moved[expert])[name], tensor)


def test_float64_is_refused() -> None:
    kind = KINDS["gated"]
    slots = laid(kind, held(kind, torch.float64), "cpu")
    x_TH, ids_TK, weights_TK, grad_y_TH = call(2, torch.float64)
    flags, outputs = StepFlags.on(x_TH.device), (torch.empty(2, HIDDEN), torch.empty(2, TOP_K))
    with pytest.raises(ValueError, match="no products in float64"):
        grouped_backward(slots, x_TH, ids_TK, weights_TK, grad_y_TH, *outputs, flags)


# ---- on a card ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("name", KINDS)
def test_nothing_waits_for_the_device(name: str) -> None:
    kind = KINDS[name]
    slots = laid(kind, held(kind, torch.bfloat16), "cuda")
    flags, sums = StepFlags.on(torch.device("cuda")), SlotGradients.zeros(slots)
    x_TH, ids_TK, weights_TK, grad_y_TH = (one.cuda() for one in call(17, torch.bfloat16))
    grad_x, grad_weights_TK = torch.empty_like(grad_y_TH), torch.empty_like(weights_TK)
    for mode in ("default", "error"):  # the first run compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            grouped_backward(
                slots, x_TH, ids_TK, weights_TK, grad_y_TH, grad_x, grad_weights_TK, flags
            ).accumulate(sums)
        finally:
            torch.cuda.set_sync_debug_mode("default")
