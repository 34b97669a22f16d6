"""The grouped FFN against float64, in Triton's interpreter on CPUs and compiled on a card.

Tolerances, largest difference as a part of a call's largest output (at least 1): float32 1e-5,
float16 5e-3, bfloat16 4e-2, as for the kernels on CPUs.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.kernels.ffn import ExpertWeights
from moesaic.kernels.grouped.activation import Activation
from moesaic.kernels.grouped.configurations import (
    FEW_ROWS,
    MANY_ROWS,
    MORE_ROWS,
    PLAIN,
    SOME_ROWS,
    Blocks,
    Configuration,
)
from moesaic.kernels.grouped.ffn import exact_rows, grouped_ffn
from moesaic.kernels.grouped.slots import LayerSlots, StepFlags, from_slot, to_slot
from tests.helpers.models.forms import KINDS, random_experts
from tests.helpers.models.slots import LAYER, oracle, slots_of

pytestmark = [
    pytest.mark.timeout(300),
    # The interpreter multiplies whole tiles with NumPy, unused rows included.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 3, 48, 40
PLACES = {0: 3, 2: 0, 5: 5, 7: 1}  # the slots of the experts that are there
SMALL = Configuration(16, Blocks(32, 32, 4, 3), Blocks(16, 32, 4, 3))


def held(kind: str, dtype: torch.dtype, *, seed: int = 0) -> dict[int, ExpertWeights]:
    return random_experts(
        KINDS[kind], PLACES, dtype=dtype, hidden=HIDDEN, intermediate=INTERMEDIATE, seed=seed
    )


def call(
    tokens: int, dtype: torch.dtype, device: str, *, experts: tuple[int, ...] = (0, 2, 5, 7, -1)
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randint(0, len(experts), (tokens, TOP_K), generator=generator)
    ids_TK = torch.tensor(experts, dtype=torch.int32)[drawn]
    x_TH = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    weights_TK = torch.rand(tokens, TOP_K, generator=generator)
    return x_TH.to(device), ids_TK.to(device), weights_TK.to(device)


def run(
    slots: LayerSlots,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    exact: bool = False,
    configuration: Configuration | None = SMALL,
) -> tuple[Tensor, tuple[int, int]]:
    """Return the sums, and the flags (missing, infinite)."""
    flags = StepFlags.on(x_TH.device)
    out_TH = torch.full(x_TH.shape, torch.nan, device=x_TH.device)
    grouped_ffn(
        slots,
        x_TH,
        ids_TK,
        weights_TK,
        out_TH,
        flags,
        exact=exact,
        configuration=None if exact else configuration,
    )
    return out_TH, (int(flags.missing), int(flags.infinite))


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    difference = (out.double().cpu() - expected).abs().max()
    assert float(difference) <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_computes_what_float64_says(kind: str, dtype: torch.dtype, device: str) -> None:
    experts = held(kind, dtype)
    given = call(17, dtype, device)
    slots = slots_of(KINDS[kind], experts, PLACES, table_size=EXPERTS, device=device)
    out, flags = run(slots, *given)
    assert_near(out, oracle(KINDS[kind], experts, *given), dtype)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["gated-bias", "interleaved-clamped", "not-gated", "post-norm"])
def test_a_function_that_no_kernel_knows_is_computed_between_the_products(
    kind: str, device: str
) -> None:
    experts = held(kind, torch.float32)
    given = call(5, torch.float32, device)
    slots = slots_of(
        KINDS[kind], experts, PLACES, table_size=EXPERTS, device=device, recognised=False
    )
    assert_near(run(slots, *given)[0], oracle(KINDS[kind], experts, *given), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 64, pytest.param(1000, marks=pytest.mark.cuda)])
def test_any_number_of_tokens(tokens: int, device: str) -> None:
    if tokens == 1000 and device == "cpu":
        pytest.skip("minutes in the interpreter")
    experts = held("gated", torch.float32)
    given = call(tokens, torch.float32, device)
    slots = slots_of(KINDS["gated"], experts, PLACES, table_size=EXPERTS, device=device)
    out, flags = run(slots, *given)
    if tokens:
        assert_near(out, oracle(KINDS["gated"], experts, *given), torch.float32)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chosen", [(5,), (-1,)], ids=["one expert has all", "no expert has any"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_lopsided_routing(chosen: tuple[int, ...], tokens: int, device: str) -> None:
    experts = held("gated-bias", torch.float32)
    given = call(tokens, torch.float32, device, experts=chosen)
    slots = slots_of(KINDS["gated-bias"], experts, PLACES, table_size=EXPERTS, device=device)
    out, flags = run(slots, *given)
    assert_near(out, oracle(KINDS["gated-bias"], experts, *given), torch.float32)
    assert flags == (0, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_an_expert_without_a_slot_is_left_out_and_reported(tokens: int, device: str) -> None:
    experts = held("gated", torch.float32)
    x_TH, ids_TK, weights_TK = call(tokens, torch.float32, device)
    ids_TK[-1] = torch.tensor([2, 6, 7], device=device)
    slots = slots_of(KINDS["gated"], experts, PLACES, table_size=EXPERTS, device=device)
    out, flags = run(slots, x_TH, ids_TK, weights_TK)
    there_TK = ids_TK.masked_fill(ids_TK == 6, -1)
    assert_near(out, oracle(KINDS["gated"], experts, x_TH, there_TK, weights_TK), torch.float32)
    assert flags == (1, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["gated", "interleaved-clamped", "not-gated"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_sum_that_is_not_finite_is_reported(kind: str, value: float, device: str) -> None:
    """A clamp and a ReLU must not hide it: NaN stays NaN."""
    experts = held(kind, torch.float32)
    x_TH, ids_TK, weights_TK = call(3, torch.float32, device)
    ids_TK[:] = torch.tensor([0, 2, 7], device=device)
    slots = slots_of(KINDS[kind], experts, PLACES, table_size=EXPERTS, device=device)
    assert run(slots, x_TH, ids_TK, weights_TK)[1] == (0, 0)
    part = slots.up_SUH if value != value else slots.down_SHI
    part[PLACES[2]] = value
    assert run(slots, x_TH, ids_TK, weights_TK)[1] == (0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_exact_bits_do_not_depend_on_the_slot(dtype: torch.dtype, device: str) -> None:
    experts = held("gated-bias", dtype)
    given = call(20, dtype, device)
    kind = KINDS["gated-bias"]
    slots = slots_of(kind, experts, PLACES, table_size=EXPERTS, device=device)
    moved = {expert: 6 - slot for expert, slot in PLACES.items()}
    elsewhere = slots_of(kind, experts, moved, table_size=EXPERTS, device=device)
    assert torch.equal(run(slots, *given, exact=True)[0], run(elsewhere, *given, exact=True)[0])


# NumPy's product, which the interpreter uses, depends on a row's place in the tile.
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exact_bits_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    experts = held("gated-bias", dtype)
    x_TH, ids_TK, weights_TK = call(50, dtype, "cuda")
    slots = slots_of(KINDS["gated-bias"], experts, PLACES, table_size=EXPERTS, device="cuda")
    whole, _ = run(slots, x_TH, ids_TK, weights_TK, exact=True)
    for rows in (slice(0, 1), slice(3, 9), slice(12, 50), slice(49, 50)):
        part, _ = run(slots, x_TH[rows], ids_TK[rows], weights_TK[rows], exact=True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize(
    "configuration",
    [
        PLAIN,
        FEW_ROWS,
        SOME_ROWS,
        MORE_ROWS,
        MANY_ROWS,
        Configuration(16, Blocks(64, 32, 4, 3, swapped=True), Blocks(64, 32, 4, 3, swapped=True)),
        Configuration(
            32, Blocks(32, 32, 4, 3, described=True), Blocks(32, 32, 4, 3, described=True)
        ),
    ],
    ids=lambda c: f"{c.rows}-{c.up.columns}-{c.up.described}-{c.up.swapped}",
)
def test_blocks_change_no_result(configuration: Configuration, tokens: int, device: str) -> None:
    if configuration.rows > 16 and device == "cuda":
        dtype = torch.float16  # tiles of float32 of this size do not fit in a multiprocessor
    else:
        dtype = torch.float32 if device == "cpu" else torch.float16
    experts = held("gated-bias", dtype)
    given = call(tokens, dtype, device)
    slots = slots_of(KINDS["gated-bias"], experts, PLACES, table_size=EXPERTS, device=device)
    out, _ = run(slots, *given, configuration=configuration)
    assert_near(out, oracle(KINDS["gated-bias"], experts, *given), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_and_the_table_are_read_from_the_device(device: str) -> None:
    """Two versions of an expert lie in two slots, and a table's entry chooses."""
    old, new = held("gated", torch.float32), held("gated", torch.float32, seed=1)
    given = call(6, torch.float32, device)
    slots = slots_of(KINDS["gated"], old, PLACES, table_size=EXPERTS, device=device)
    later = slots_of(KINDS["gated"], new, PLACES, table_size=EXPERTS, device=device)
    count = slots.up_SUH.shape[0]
    table_LE = slots.table_LE.clone()
    table_LE[LAYER + 1] = torch.where(table_LE[LAYER] < 0, -1, table_LE[LAYER] + count)
    both = replace(
        slots,
        up_SUH=torch.cat([slots.up_SUH, later.up_SUH]),
        down_SHI=torch.cat([slots.down_SHI, later.down_SHI]),
        table_LE=table_LE,
        layer=torch.tensor(LAYER, dtype=torch.int32, device=device),
    )
    for experts in (old, new):
        assert_near(run(both, *given)[0], oracle(KINDS["gated"], experts, *given), torch.float32)
        both.layer.add_(1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["gated-bias", "interleaved-clamped", "post-norm"])
def test_exact_rows_are_the_terms_of_the_sum(kind: str, device: str) -> None:
    experts = held(kind, torch.float32)
    x_TH, ids_TK, weights_TK = call(9, torch.float32, device)
    ids_TK[4, 1] = 6  # it has no slot
    slots = slots_of(KINDS[kind], experts, PLACES, table_size=EXPERTS, device=device)
    out_TH, _ = run(slots, x_TH, ids_TK, weights_TK, exact=True)
    flags = StepFlags.on(x_TH.device)
    rows_TKH = torch.full((*ids_TK.shape, HIDDEN), torch.nan, device=device)
    exact_rows(slots, x_TH, ids_TK, weights_TK, rows_TKH, flags)
    sum_TH = torch.zeros_like(out_TH)
    for k in range(TOP_K):
        sum_TH += rows_TKH[:, k]
    assert torch.equal(sum_TH, out_TH)
    assert flags.both.tolist() == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_gives_its_experts_tensors_back_to_the_bit(kind: str) -> None:
    wanted = held(kind, torch.float32)[2].tensors()
    activation = Activation.of(KINDS[kind].activate, gated=KINDS[kind].gated)
    transposed = KINDS[kind].transposed
    slot = to_slot(activation, wanted, transposed=transposed)
    again = from_slot(activation, slot, transposed=transposed)
    assert again.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(again[name], tensor)
        assert again[name].is_contiguous()


def test_slots_that_are_not_contiguous_are_refused() -> None:
    slots = slots_of(KINDS["gated"], held("gated", torch.float32), PLACES, table_size=EXPERTS)
    with pytest.raises(ValueError, match="up_SUH: every slot must be contiguous"):
        replace(slots, up_SUH=slots.up_SUH.transpose(1, 2))
    with pytest.raises(ValueError, match="table_LE must be contiguous and int32"):
        replace(slots, table_LE=slots.table_LE.long())


# ---- on a card ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_captured_graph_stays_right_when_experts_move(tokens: int) -> None:
    dtype = torch.bfloat16
    experts = held("gated", dtype)
    x_TH, ids_TK, weights_TK = call(tokens, dtype, "cuda")
    slots = slots_of(KINDS["gated"], experts, PLACES, table_size=EXPERTS, device="cuda")
    flags, out_TH = StepFlags.on(x_TH.device), torch.empty_like(x_TH)
    grouped_ffn(slots, x_TH, ids_TK, weights_TK, out_TH, flags, configuration=SMALL)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped_ffn(slots, x_TH, ids_TK, weights_TK, out_TH, flags, configuration=SMALL)
    free = max(PLACES.values()) + 1
    for seed in range(4):
        fresh = call(tokens, dtype, "cuda")
        x_TH.copy_(torch.randn_like(x_TH))
        ids_TK.copy_(fresh[1].roll(seed, 0))
        moved = [0, 2, 5, 7][seed]
        taken = int(slots.table_LE[LAYER, moved])
        for part in (slots.up_SUH, slots.down_SHI):
            part[free] = part[taken]
            part[taken] = torch.nan
        slots.table_LE[LAYER, moved] = free
        free = taken
        graph.replay()
        expected = oracle(KINDS["gated"], experts, x_TH, ids_TK, weights_TK)
        assert_near(out_TH, expected, dtype)
    assert (int(flags.missing), int(flags.infinite)) == (0, 0)


@pytest.mark.cuda
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str, exact: bool) -> None:
    experts = held(kind, torch.bfloat16)
    slots = slots_of(KINDS[kind], experts, PLACES, table_size=EXPERTS, device="cuda")
    flags = StepFlags.on(torch.device("cuda"))
    for tokens in (1, 17):
        given = call(tokens, torch.bfloat16, "cuda")
        out_TH = torch.empty_like(given[0])
        grouped_ffn(slots, *given, out_TH, flags, exact=exact)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            grouped_ffn(slots, *given, out_TH, flags, exact=exact)
        finally:
            torch.cuda.set_sync_debug_mode("default")
