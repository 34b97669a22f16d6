"""Every kernel against the reference, the reference against transformers, and the bits of `exact`.

Tolerances, largest difference as a part of a call's largest output (at least 1): float32 1e-5,
float16 5e-3, bfloat16 4e-2: kernels cut the rows into other products, and add biases before or
after rounding.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, E = experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels.ffn import (
    KERNELS,
    TILE_ROWS,
    ExpertForm,
    ExpertWeights,
    bad_experts,
    can_pack,
    exact_rows,
    loop_kernel,
    pack,
    reference_kernel,
    unpack,
)
from moesaic.models.trunk.experts_layers import ExpertsLayer, expert_tensors, is_experts_module
from tests.helpers.models.forms import (
    HIDDEN,
    KINDS,
    decorated_classes,
    random_experts,
    transformers_experts,
)
from tests.helpers.models.slots import oracle
from tests.helpers.models.versions import newest_transformers

pytestmark = pytest.mark.numeric

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)
DECORATED = decorated_classes()


def assignments(
    tokens: int, top_k: int, experts: int, *, seed: int = 0, unused: float = 0.2
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(0, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    return ids_TK.masked_fill_(torch.rand(tokens, top_k, generator=generator) < unused, -1)


def inputs(tokens: int, *, hidden: int = HIDDEN, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_for(ids_TK: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(seed))


def garbage(*shape: int) -> Tensor:
    """What a slot of shared memory may hold before its answer."""
    return torch.full(shape, torch.nan)


def packed(form: ExpertForm, experts: dict[int, ExpertWeights]) -> dict[int, ExpertWeights]:
    """As hosts keep them, where the machine can."""
    up = next(iter(experts.values())).up
    if not can_pack(up.device, up.dtype):
        return experts
    return {number: pack(form, expert) for number, expert in experts.items()}


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert float((out - expected).abs().max()) <= TOLERANCE[dtype] * scale


# ---- kernels against the reference --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(KERNELS.keys() - {"reference"}))
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_kernels_compute_what_the_reference_states(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)), label="kind")]
    experts = data.draw(st.sets(st.integers(0, 7), min_size=1), label="experts held")
    tokens, top_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1000))
    unused = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="unused assignments")
    # An expert may be chosen twice by one token: sums do not mind.
    held = torch.tensor(sorted(experts), dtype=torch.int32)
    drawn_TK = assignments(tokens, top_k, len(experts), seed=seed, unused=unused)
    ids_TK = torch.where(drawn_TK >= 0, held[drawn_TK.clamp(min=0)], -1)
    ids_TK = ids_TK.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    all_weights = random_experts(kind, experts, dtype=dtype, seed=seed)
    x_TH = inputs(tokens, dtype=dtype, seed=seed)
    weights_TK = weights_for(ids_TK, seed)
    expected, out = (garbage(tokens, HIDDEN) for _ in range(2))
    reference_kernel(kind.form, all_weights, x_TH, ids_TK, weights_TK, expected)
    if name == "loop" and data.draw(st.booleans(), label="packed"):
        all_weights = packed(kind.form, all_weights)
    KERNELS[name](kind.form, all_weights, x_TH, ids_TK, weights_TK, out)
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_every_layout_computes_what_float64_says(
    layout: str, kind: str, dtype: torch.dtype
) -> None:
    plain = random_experts(KINDS[kind], range(6), dtype=dtype)
    form, held = KINDS[kind].form, plain if layout == "plain" else packed(KINDS[kind].form, plain)
    ids_TK = assignments(23, 3, 6)
    x_TH, weights_TK = inputs(23, dtype=dtype), weights_for(ids_TK)
    expected = oracle(KINDS[kind], plain, x_TH, ids_TK, weights_TK)
    out, rows = garbage(23, HIDDEN), garbage(23, 3, HIDDEN)
    loop_kernel(form, held, x_TH, ids_TK, weights_TK, out)
    exact_rows(form, held, x_TH, ids_TK, weights_TK, rows)
    for found in (out, rows.sum(dim=1)):
        assert_near(found.double(), expected, dtype)


def test_the_reference_skips_unused_choices_and_weighs_the_others() -> None:
    """By hand: expert e doubles its input e times."""
    experts = {e: ExpertWeights(up=torch.eye(4) * 2.0**e, down=torch.eye(4)) for e in range(3)}
    form = ExpertForm(transposed=False, activate=torch.relu)
    ids_TK = torch.tensor([[0, 2], [-1, 1], [-1, -1]])
    weights_TK = torch.tensor([[0.5, 0.25], [9.0, 1.0], [9.0, 9.0]])
    out = garbage(3, 4)
    reference_kernel(form, experts, torch.ones(3, 4), ids_TK, weights_TK, out)
    assert out[:, 0].tolist() == [0.5 * 1 + 0.25 * 4, 2.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(KINDS)), hidden=st.integers(1, 70), intermediate=st.integers(1, 70)
)
def test_packed_experts_come_back_to_the_bit(
    dtype: torch.dtype, kind: str, hidden: int, intermediate: int
) -> None:
    form = KINDS[kind].form
    experts = random_experts(
        KINDS[kind], [0], dtype=dtype, hidden=hidden, intermediate=intermediate
    )
    kept = packed(form, experts)[0]
    assert kept.nbytes == experts[0].nbytes
    again = unpack(form, kept).tensors()
    assert again.keys() == experts[0].tensors().keys()
    for name, tensor in experts[0].tensors().items():
        assert torch.equal(again[name], tensor), name
        assert again[name].is_contiguous()


def test_packing_is_for_cpus_and_the_types_of_the_wire() -> None:
    assert can_pack(torch.device("cpu"), torch.float32) == torch.backends.mkldnn.is_available()
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_that_a_cpu_cannot_compute_in_are_not_packed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for probe in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, probe, lambda: False)
    assert not can_pack(torch.device("cpu"), dtype)


# ---- the reference against transformers ---------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DECORATED))
def test_every_experts_class_of_transformers(name: str) -> None:
    module = transformers_experts(name, DECORATED[name])
    assert is_experts_module(module)
    layer = ExpertsLayer(0, "experts", module, 8, HIDDEN)
    experts = {e: ExpertWeights.of(expert_tensors(layer, e)) for e in range(8)}
    x_TH = inputs(13, dtype=torch.float32)
    ids_TK = torch.stack([torch.randperm(8, generator=_seeded(t))[:3] for t in range(13)])
    weights_TK = weights_for(ids_TK)
    expected = module(x_TH, ids_TK, weights_TK)
    for kernel in KERNELS.values():
        out = garbage(13, HIDDEN)
        kernel(layer.form(), experts, x_TH, ids_TK, weights_TK, out)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    each_TKH = garbage(13, 3, HIDDEN)
    exact_rows(layer.form(), experts, x_TH, ids_TK, weights_TK, each_TKH)
    torch.testing.assert_close(each_TKH.sum(1), expected, atol=1e-5, rtol=1e-5)
    # A module whose outputs hardly differ between experts would prove nothing.
    swapped = garbage(13, HIDDEN)
    reference_kernel(layer.form(), experts, x_TH, 7 - ids_TK, weights_TK, swapped)
    assert float((swapped - expected).abs().max()) > 1e-2


@newest_transformers
def test_the_classes_with_every_trait_are_among_them() -> None:
    assert len(DECORATED) >= 40
    assert {
        *("MixtralExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"),
        *("AriaExperts", "OpenAIPrivacyFilterExperts", "DeepseekV4Experts", "GraniteMoeExperts"),
    } <= DECORATED.keys()


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- exact --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_exact_rows_are_the_weighted_choices(kind: str, dtype: torch.dtype) -> None:
    form = KINDS[kind].form
    experts = random_experts(KINDS[kind], range(5), dtype=dtype)
    ids_TK = assignments(37, 3, 5)
    x_TH, weights_TK = inputs(37, dtype=dtype), weights_for(ids_TK)
    out = garbage(37, 3, HIDDEN)
    exact_rows(form, experts, x_TH, ids_TK, weights_TK, out)
    assert not out[ids_TK < 0].any(), "an unused choice is zero"
    for k in range(3):
        expected = garbage(37, HIDDEN)
        column = slice(k, k + 1)
        reference_kernel(form, experts, x_TH, ids_TK[:, column], weights_TK[:, column], expected)
        assert_near(out[:, k], expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_bits_of_exact_rows_depend_on_their_own_input_alone(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    """Any rows, in any order, among any batch mates, under any other assignments: the same bits."""
    kind = KINDS[data.draw(st.sampled_from(sorted(KINDS)), label="kind")]
    seed = data.draw(st.integers(0, 1000))
    # Wide enough for a library to take another path for another number of rows.
    experts = random_experts(kind, range(3), dtype=dtype, hidden=192, intermediate=160, seed=seed)
    if data.draw(st.booleans(), label="packed"):
        experts = packed(kind.form, experts)
    ids_TK = assignments(50, 2, 3, seed=seed)
    x_TH = inputs(50, hidden=192, dtype=dtype, seed=seed)
    weights_TK = weights_for(ids_TK, seed)

    def compute(rows: Tensor) -> Tensor:
        out = garbage(len(rows), 2, 192)
        exact_rows(kind.form, experts, x_TH[rows], ids_TK[rows], weights_TK[rows], out)
        return out

    whole = compute(torch.arange(50))
    order = torch.tensor(data.draw(st.permutations(range(50)), label="order"))
    some = order[: data.draw(st.integers(1, 50), label="rows")]
    assert torch.equal(compute(some), whole[some])


def test_the_bits_of_ordinary_rows_do_depend_on_the_number_of_rows() -> None:
    """Without this the test above would show nothing."""
    kind = KINDS["gated"]
    experts = random_experts(kind, [0], hidden=192, intermediate=160)
    x_TH = inputs(3 * TILE_ROWS, hidden=192, dtype=torch.float32)

    def compute(rows: int) -> Tensor:
        out = garbage(rows, 192)
        ids_TK = torch.zeros(rows, 1, dtype=torch.int32)
        KERNELS["loop"](kind.form, experts, x_TH[:rows], ids_TK, torch.ones(rows, 1), out)
        return out

    whole = compute(3 * TILE_ROWS)
    assert not all(torch.equal(compute(rows), whole[:rows]) for rows in range(1, 2 * TILE_ROWS))


# ---- experts that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_exactly_the_guilty_experts_are_named(exact: bool, data: st.DataObject) -> None:
    kind = KINDS[data.draw(st.sampled_from(["gated", "gated-bias", "not-gated"]))]
    poisoned = data.draw(st.sets(st.integers(0, 5)), label="poisoned experts")
    broken = data.draw(st.sets(st.integers(0, 8)), label="rows that are not finite already")
    value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    experts = random_experts(kind, range(6))
    for expert in poisoned:
        experts[expert] = replace(
            experts[expert], down=torch.full_like(experts[expert].down, value)
        )
    ids_TK = assignments(9, 2, 6, seed=data.draw(st.integers(0, 1000)))
    x_TH = inputs(9, dtype=torch.float32)
    x_TH[sorted(broken)] = value
    weights_TK = weights_for(ids_TK) + 0.1
    if exact:
        out = garbage(9, 2, HIDDEN)
        exact_rows(kind.form, experts, x_TH, ids_TK, weights_TK, out)
    else:
        out = garbage(9, HIDDEN)
        KERNELS["loop"](kind.form, experts, x_TH, ids_TK, weights_TK, out)
    sound = [row for row in range(9) if row not in broken]
    met = {expert for expert in ids_TK[sound].reshape(-1).tolist() if expert >= 0}
    assert bad_experts(kind.form, experts, x_TH, ids_TK, out) == sorted(poisoned & met)


def test_an_expert_that_overflows_its_dtype_is_guilty() -> None:
    kind = KINDS["not-gated"]
    experts = random_experts(kind, range(2), dtype=torch.float16)
    experts[1] = replace(experts[1], down=experts[1].down * 5e4)
    x_TH, ids_TK = inputs(4, dtype=torch.float16) * 8, torch.tensor([[0, 1]] * 4)
    out = garbage(4, HIDDEN)
    KERNELS["loop"](kind.form, experts, x_TH, ids_TK, torch.ones(4, 2), out)
    assert bad_experts(kind.form, experts, x_TH, ids_TK, out) == [1]


def test_a_sum_that_overflows_where_no_term_does_accuses_nobody() -> None:
    kind = KINDS["gated"]
    experts = random_experts(kind, range(2))
    ids_TK = torch.tensor([[0, 1]] * 4)
    huge = torch.full((4, HIDDEN), 3e38)
    assert bad_experts(kind.form, experts, inputs(4, dtype=torch.float32), ids_TK, huge) == []
