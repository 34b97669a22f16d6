"""Every backward kernel against autograd through a whole layer in float64.

Tolerances, largest difference as a part of the largest gradient of a tensor: float64 1e-12, float32
1e-5, float16 5e-3, bfloat16 4e-2.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.backward.accumulators import GradientAccumulators
from moesaic.kernels.backward.ffn import BACKWARD_KERNELS, BackwardForm, BackwardKernel
from moesaic.kernels.ffn import (
    SHARED_NAMES,
    ExpertForm,
    ExpertWeights,
    can_pack,
    pack,
    reference_kernel,
    unpack,
)
from moesaic.models.trunk.experts_layers import ExpertsLayer, expert_tensors, shared_parameters
from tests.helpers.models.forms import (
    HIDDEN,
    KINDS,
    decorated_classes,
    random_experts,
    transformers_experts,
)
from tests.helpers.models.gradients import (
    SHARED,
    Gradients,
    assert_gradients_near,
    autograd_oracle,
    away_from_limits,
    run_backward,
)

pytestmark = pytest.mark.numeric

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 4e-2,
}
EXPERTS = 5
DECORATED = decorated_classes()
Call = tuple[Tensor, Tensor, Tensor, Tensor]


def call(
    tokens: int,
    *,
    top_k: int = 3,
    experts: int = EXPERTS,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    unused: float = 0.2,
) -> Call:
    """x, ids, weights and the gradient of the sums; a token may choose an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x_TH, grad_y_TH = (torch.randn(tokens, hidden, generator=generator) for _ in range(2))
    ids_TK = torch.randint(0, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    ids_TK.masked_fill_(torch.rand(tokens, top_k, generator=generator) < unused, -1)
    weights_TK = torch.rand(tokens, top_k, generator=generator)
    return x_TH.to(dtype), ids_TK, weights_TK.to(wide), grad_y_TH.to(wide)


@pytest.fixture(params=sorted(BACKWARD_KERNELS))
def kernel(request: pytest.FixtureRequest) -> BackwardKernel:
    return BACKWARD_KERNELS[request.param]


def unknown(form: BackwardForm) -> BackwardForm:
    """The same, but for what is known of its activation."""
    return replace(form, activation=None)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_form_has_the_gradients_of_autograd(
    kernel: BackwardKernel, kind: str, dtype: torch.dtype
) -> None:
    experts = random_experts(KINDS[kind], range(EXPERTS), dtype=dtype)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(40, dtype=dtype)
    ids_TK = away_from_limits(KINDS[kind], experts, x_TH, ids_TK)
    given = x_TH, ids_TK, weights_TK, grad_y_TH
    expected = autograd_oracle(KINDS[kind], experts, *given)
    assert len(expected.experts.keys() - {SHARED}) == EXPERTS
    found = run_backward(kernel, KINDS[kind].backward_form, experts, *given)
    assert_gradients_near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_loop_computes_what_the_reference_states(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)), label="kind")]
    hidden, intermediate = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 1000))
    held = data.draw(st.integers(1, 8), label="experts")
    experts = random_experts(
        kind, range(held), dtype=dtype, hidden=hidden, intermediate=intermediate, seed=seed
    )
    given = call(
        data.draw(st.integers(0, 40), label="tokens"),
        top_k=data.draw(st.integers(1, 4)),
        experts=held,
        hidden=hidden,
        dtype=dtype,
        seed=seed,
        unused=data.draw(st.sampled_from([0.0, 0.3, 1.0])),
    )
    recognised = data.draw(st.booleans(), label="recognised")
    expected = run_backward(BACKWARD_KERNELS["reference"], kind.backward_form, experts, *given)
    form = kind.backward_form if recognised else unknown(kind.backward_form)
    found = run_backward(BACKWARD_KERNELS["loop"], form, experts, *given)
    # With few columns a norm's gradient cancels out.
    assert_gradients_near(found, expected, TOLERANCE[dtype], least=1.0)


@pytest.mark.parametrize("kind", ["gated-bias", "interleaved-clamped", "not-gated", "post-norm"])
def test_a_function_that_is_not_known_gets_its_derivative_by_autograd(kind: str) -> None:
    experts = random_experts(KINDS[kind], range(EXPERTS), dtype=torch.float64)
    given = call(11)
    expected = autograd_oracle(KINDS[kind], experts, *given)
    form = unknown(KINDS[kind].backward_form)
    found = run_backward(BACKWARD_KERNELS["loop"], form, experts, *given)
    assert_gradients_near(found, expected, 1e-12)


@pytest.mark.parametrize("kind", ["gated", "transposed-bias", "post-norm"])
def test_the_forward_pass_has_these_derivatives(kernel: BackwardKernel, kind: str) -> None:
    """Finite differences of the forward kernel, which know nothing of autograd."""
    form = KINDS[kind].backward_form
    held = random_experts(KINDS[kind], range(2), dtype=torch.float64, hidden=4, intermediate=3)
    names = [(e, n) for e in held for n in held[e].tensors() if n not in SHARED_NAMES]
    names += [(SHARED, n) for n in held[0].shared()]
    x_TH, ids_TK, weights_TK, _ = call(3, top_k=2, experts=2, hidden=4)

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_TH: Tensor, weights_TK: Tensor, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(x_TH, weights_TK, *tensors)
            out_TH = torch.empty_like(x_TH)
            reference_kernel(form.forward, experts(tensors), x_TH, ids_TK, weights_TK, out_TH)
            return out_TH

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            x_TH, weights_TK, *tensors = ctx.saved_tensors
            grad_x, grad_weights = torch.empty_like(x_TH), torch.empty_like(weights_TK)
            pending = kernel(
                form, experts(tensors), x_TH, ids_TK, weights_TK, grads[0], grad_x, grad_weights
            )
            accumulators = GradientAccumulators()
            pending.accumulate(accumulators, shared=SHARED)
            taken = {e: accumulators.take(e) for e in dict(names)}
            return grad_x, grad_weights, *(taken[e][n] for e, n in names)

    def experts(tensors: Any) -> dict[int, ExpertWeights]:
        by_name = dict(zip(names, tensors, strict=True))
        return {
            e: ExpertWeights.of(
                {n: by_name[SHARED if n in SHARED_NAMES else e, n] for n in held[e].tensors()}
            )
            for e in held
        }

    given = [x_TH, weights_TK, *(held[max(e, 0)].tensors()[n] for e, n in names)]
    assert set(ids_TK.flatten().tolist()) == {-1, 0, 1}
    assert torch.autograd.gradcheck(Layer.apply, [one.requires_grad_() for one in given])


@pytest.mark.parametrize("name", sorted(DECORATED))
def test_every_experts_class_of_transformers(kernel: BackwardKernel, name: str) -> None:
    module = transformers_experts(name, DECORATED[name]).requires_grad_()
    layer = ExpertsLayer(0, "experts", module, 8, HIDDEN)
    own = dict(module.named_parameters())
    names = {layer.pool_name(name): name for name in own}
    shared = {layer.pool_name(name) for name, _ in shared_parameters(layer)}
    x_TH, _, weights_TK, grad_y_TH = call(13, dtype=torch.float32)
    drawn = torch.Generator().manual_seed(0)
    ids_TK = torch.stack([torch.randperm(8, generator=drawn)[:3] for _ in range(13)])
    inputs = [x_TH.requires_grad_(), weights_TK.requires_grad_(), *(own[n] for n in names.values())]
    x, weights, *rest = torch.autograd.grad(module(x_TH, ids_TK, weights_TK), inputs, grad_y_TH)
    by_name = dict(zip(names, rest, strict=True))
    of_experts = {e: {n: g[e] for n, g in by_name.items() if n not in shared} for e in range(8)}
    if shared:
        of_experts[SHARED] = {n: by_name[n] for n in shared}
    expected = Gradients(x, weights, of_experts)
    experts = {e: ExpertWeights.of(expert_tensors(layer, e)) for e in range(8)}
    form = BackwardForm.of(layer.form(), gated=bool(module.has_gate))
    found = run_backward(
        kernel, form, experts, x_TH.detach(), ids_TK, weights_TK.detach(), grad_y_TH
    )
    assert_gradients_near(found, expected, 1e-5)


def test_by_hand(kernel: BackwardKernel) -> None:
    """Expert e computes (e + 1) * relu(x), with one number for each."""
    experts = {e: ExpertWeights(torch.tensor([[1.0]]), torch.tensor([[e + 1.0]])) for e in range(3)}
    form = BackwardForm.of(ExpertForm(False, torch.relu), gated=False)
    x_TH, grad_y_TH = torch.tensor([[2.0], [-3.0]]), torch.tensor([[10.0], [100.0]])
    ids_TK = torch.tensor([[0, 2], [-1, 2]])
    weights_TK = torch.tensor([[0.5, 0.25], [9.0, 1.0]])
    grad_x, grad_weights_TK = torch.full((2, 1), torch.nan), torch.full((2, 2), torch.nan)
    accumulators = GradientAccumulators()
    kernel(form, experts, x_TH, ids_TK, weights_TK, grad_y_TH, grad_x, grad_weights_TK).accumulate(
        accumulators
    )
    assert grad_x.tolist() == [[10.0 * (0.5 * 1 + 0.25 * 3)], [0.0]]
    assert grad_weights_TK.tolist() == [[10.0 * 1 * 2, 10.0 * 3 * 2], [0.0, 0.0]]
    assert list(accumulators) == [0, 2]
    taken = accumulators.take(2)
    assert taken["up"].tolist() == [[10.0 * 0.25 * 3 * 2]]
    assert taken["down"].tolist() == [[10.0 * 0.25 * 2]]


# ---- which rows and experts ---------------------------------------------------------------------


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_without_any_assignment_everything_is_zero(
    kernel: BackwardKernel, tokens: int, each: bool
) -> None:
    experts = random_experts(KINDS["gated-bias"], range(EXPERTS), dtype=torch.float64)
    given = call(tokens, unused=1.0)
    found = run_backward(kernel, KINDS["gated-bias"].backward_form, experts, *given, each=each)
    assert not found.x.any()
    assert not found.weights_TK.any()
    assert found.experts == {}


def test_one_expert_may_have_all_tokens(kernel: BackwardKernel) -> None:
    kind = KINDS["gated-bias"]
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float64)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(12, top_k=2)
    ids_TK[:] = torch.tensor([3, -1])
    given = x_TH, ids_TK, weights_TK, grad_y_TH
    found = run_backward(kernel, kind.backward_form, experts, *given)
    assert found.experts.keys() == {3}
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-12)


def test_a_token_may_choose_an_expert_twice(kernel: BackwardKernel) -> None:
    kind = KINDS["gated-bias"]
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float64)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(6)
    ids_TK[:] = torch.tensor([2, 0, 2])
    given = x_TH, ids_TK, weights_TK, grad_y_TH
    found = run_backward(kernel, kind.backward_form, experts, *given)
    assert_gradients_near(found, autograd_oracle(kind, experts, *given), 1e-12)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_row_for_each_assignment_adds_up_to_the_sum(kernel: BackwardKernel, kind: str) -> None:
    experts = random_experts(KINDS[kind], range(EXPERTS), dtype=torch.float64)
    given = call(10)
    summed = run_backward(kernel, KINDS[kind].backward_form, experts, *given)
    each = run_backward(kernel, KINDS[kind].backward_form, experts, *given, each=True)
    assert not each.x[given[1] < 0].any(), "an unused assignment is zero"
    assert_gradients_near(replace(each, x=each.x.sum(dim=1)), summed, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_experts_bits_depend_on_its_own_rows_alone(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    """Another split of the experts over calls, with `exact`: every gradient has the same bits."""
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)), label="kind")]
    form = kind.backward_form
    # Sizes at which a vectorised loop leaves elements over.
    experts = random_experts(kind, range(EXPERTS), dtype=dtype, hidden=50, intermediate=37)
    x_TH, ids_TK, weights_TK, grad_y_TH = call(30, hidden=50, dtype=dtype, seed=3)

    def compute(ids_TK: Tensor) -> Gradients:
        given = x_TH, ids_TK, weights_TK, grad_y_TH
        return run_backward(BACKWARD_KERNELS["loop"], form, experts, *given, each=True, exact=True)

    whole = compute(ids_TK)
    mine = data.draw(st.sets(st.integers(0, EXPERTS - 1), min_size=1), label="experts of the call")
    wanted_TK = torch.isin(ids_TK, torch.tensor(sorted(mine), dtype=torch.int32))
    part = compute(ids_TK.masked_fill(~wanted_TK, -1))
    assert torch.equal(part.x[wanted_TK], whole.x[wanted_TK])
    assert torch.equal(part.weights_TK[wanted_TK], whole.weights_TK[wanted_TK])
    for expert in part.experts.keys() - {SHARED}:  # that is a sum over experts
        for name, tensor in part.experts[expert].items():
            assert torch.equal(tensor, whole.experts[expert][name]), name


# ---- what a host does with it -------------------------------------------------------------------


def test_two_calls_add_up(kernel: BackwardKernel) -> None:
    kind = KINDS["gated-bias"]
    form = kind.backward_form
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float64)
    accumulators = GradientAccumulators()
    alone: list[dict[int, dict[str, Tensor]]] = []
    for seed in range(2):
        given = call(8, seed=seed, top_k=1)
        alone.append(run_backward(kernel, form, experts, *given).experts)
        grad_x, grad_weights_TK = torch.empty_like(given[0]), torch.empty_like(given[2])
        pending = kernel(form, experts, *given, grad_x, grad_weights_TK)
        pending.accumulate(accumulators, key_of=lambda expert: ("layer", expert))
    assert alone[0].keys() != alone[1].keys(), "an expert that is in one of them alone"
    assert set(accumulators) == {("layer", expert) for expert in alone[0].keys() | alone[1].keys()}
    for expert in alone[0].keys() | alone[1].keys():
        for name, tensor in accumulators.take(("layer", expert)).items():
            expected = sum(each[expert][name] for each in alone if expert in each)
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("recognised", [True, False])
@pytest.mark.parametrize("kind", ["gated-bias", "post-norm"])
def test_the_weights_follow_in_another_thread(
    kernel: BackwardKernel, kind: str, recognised: bool
) -> None:
    """As in a host: the call in inference mode, in memory that is then written to again."""
    form = KINDS[kind].backward_form if recognised else unknown(KINDS[kind].backward_form)
    held = random_experts(KINDS[kind], range(EXPERTS), dtype=torch.float64)
    given = call(14)
    expected = autograd_oracle(KINDS[kind], held, *given)
    accumulators = GradientAccumulators()

    def add() -> None:
        pending.accumulate(accumulators, shared=SHARED)

    with torch.inference_mode():
        # Everything that the kernel is given was made in inference mode, too.
        experts = {
            e: ExpertWeights.of({n: t.clone() for n, t in held[e].tensors().items()}) for e in held
        }
        mine = given[0].clone(), given[1].clone(), given[2].clone(), given[3].clone()
        grad_x, grad_weights_TK = torch.empty_like(given[0]), torch.empty_like(given[2])
        pending = kernel(form, experts, *mine, grad_x, grad_weights_TK)
        assert pending.nbytes > 0
        for one in mine:
            one.zero_()
        thread = threading.Thread(target=add)
        thread.start()
        thread.join()
        # And a second call in this thread, to the same sums.
        again = kernel(form, experts, *given, grad_x.clone(), grad_weights_TK.clone())
        again.accumulate(accumulators, shared=SHARED)
    assert pending.nbytes == 0
    taken = {e: {n: t / 2 for n, t in accumulators.take(e).items()} for e in expected.experts}
    assert_gradients_near(Gradients(grad_x, grad_weights_TK, taken), expected, 1e-12)


def test_the_memory_that_is_kept_is_what_is_stated() -> None:
    kind = KINDS["gated"]
    experts = random_experts(kind, range(2), dtype=torch.bfloat16, hidden=8, intermediate=5)
    given = call(10, top_k=2, experts=2, hidden=8, dtype=torch.bfloat16, unused=0.0)
    form = kind.backward_form
    pending = BACKWARD_KERNELS["loop"](
        form, experts, *given, torch.empty(10, 8), torch.empty(10, 2)
    )
    assert pending.nbytes == 20 * (2 * 8 + 10 + 5) * 2


def test_gradients_are_added_once(kernel: BackwardKernel) -> None:
    kind, given = KINDS["gated"], call(4)
    experts = random_experts(kind, range(EXPERTS), dtype=torch.float64)
    form = kind.backward_form
    pending = kernel(form, experts, *given, torch.empty_like(given[0]), torch.empty_like(given[2]))
    accumulators = GradientAccumulators()
    pending.accumulate(accumulators)
    with pytest.raises(RuntimeError, match="have been added already"):
        pending.accumulate(accumulators)


def test_packed_experts_are_refused(kernel: BackwardKernel) -> None:
    kind = KINDS["gated"]
    experts = random_experts(kind, range(EXPERTS))
    if not can_pack(torch.device("cpu"), torch.float32):
        pytest.skip("this machine packs nothing")
    given = call(4, dtype=torch.float32, unused=0.0)
    form = kind.backward_form
    outputs = torch.zeros(4, HIDDEN), torch.zeros(4, 3)
    used = int(given[1].min())
    experts[used] = pack(kind.form, experts[used])
    with pytest.raises(ValueError, match=f"expert {used}: its matrices are packed"):
        kernel(form, experts, *given, *outputs)
    assert not any(one.any() for one in outputs)
    experts[used] = unpack(kind.form, experts[used])
    kernel(form, experts, *given, *outputs)
