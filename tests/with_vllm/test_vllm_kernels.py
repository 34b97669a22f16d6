"""vLLM's fused kernel for experts on CPUs, against the reference.

Shape suffixes: T = tokens, K = choices of a token, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moesaic.actors.router.lent_part import LayerReach
from moesaic.kernels import fused
from moesaic.kernels.ffn import (
    TILE_ROWS,
    ExpertForm,
    ExpertWeights,
    exact_rows,
    loop_kernel,
    pack,
    reference_kernel,
    unpack,
)
from moesaic.kernels.slabs.borrowed import borrow
from moesaic.kernels.slabs.layer_arithmetic import CpuLayer
from moesaic.kernels.slabs.layout import COPIES, SlabLayout
from moesaic.kernels.slabs.side_by_side import bank_of_slabs
from moesaic.kernels.slabs.slab import Slab, layer_layout

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

TILES = torch.cpu._is_amx_tile_supported()
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not TILES, reason="no tiles")),
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of a call's largest output
HIDDEN, INTERMEDIATE, EXPERTS = 96, 128, 5  # whole pages
Activation = Callable[[Tensor], Tensor]


def gated(function: Activation) -> Activation:
    def activate(up: Tensor) -> Tensor:
        gate, value = up.chunk(2, dim=-1)
        return function(gate) * value

    return activate


def interleaved(up: Tensor) -> Tensor:
    return functional.silu(up[..., ::2]) * up[..., 1::2]


def clamped(up: Tensor) -> Tensor:
    gate, value = up.chunk(2, dim=-1)
    return functional.silu(gate.clamp(max=7.0)) * value.clamp(-7.0, 7.0)


ACTIVATIONS: dict[str, Activation] = {
    "silu": gated(functional.silu),
    "gelu": gated(functional.gelu),
    "gelu_tanh": gated(lambda gate: functional.gelu(gate, approximate="tanh")),
}


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def experts(
    dtype: torch.dtype, *, transposed: bool = False, intermediate: int = INTERMEDIATE
) -> dict[int, ExpertWeights]:
    def matrix(seed: int, rows: int, columns: int) -> Tensor:
        plain = random(rows, columns, seed=seed, dtype=dtype, scale=0.1)
        return plain.t().contiguous() if transposed else plain

    return {
        e: ExpertWeights(
            up=matrix(2 * e, 2 * intermediate, HIDDEN), down=matrix(2 * e + 1, HIDDEN, intermediate)
        )
        for e in range(EXPERTS)
    }


def call(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.randint(-1, EXPERTS, (tokens, 3), generator=generator, dtype=torch.int32)
    weights_TK = torch.rand(tokens, 3, generator=generator)
    return random(tokens, HIDDEN, seed=99, dtype=dtype), ids_TK, weights_TK


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= limit


def test_the_library_is_found_and_takes_what_it_is_given() -> None:
    assert fused.instructions(torch.float32) == "vec"
    assert fused.instructions(torch.bfloat16) == ("amx" if TILES else None)
    assert fused.instructions(torch.float16) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
def test_the_sum_of_experts(name: str, tokens: int, transposed: bool, dtype: torch.dtype) -> None:
    form = ExpertForm(transposed=transposed, activate=ACTIVATIONS[name])
    plain = experts(dtype, transposed=transposed)
    packed = {e: pack(form, expert) for e, expert in plain.items()}
    assert {expert.fused for expert in packed.values()} == {name}
    given = call(tokens, dtype)
    expected, found = torch.empty(tokens, HIDDEN), torch.full((tokens, HIDDEN), torch.nan)
    reference_kernel(form, plain, *given, expected)
    loop_kernel(form, packed, *given, found)
    assert_near(found, expected, dtype)


@contextmanager
def in_slabs(
    count: int, form: ExpertForm, plain: dict[int, ExpertWeights]
) -> Iterator[dict[int, ExpertWeights]]:
    """The experts of layer 4 in so many slabs: each has some of them, in either of their places."""
    layout = SlabLayout({4: layer_layout(EXPERTS, pack(form, plain[0]))})
    slabs = [Slab.create("m", layout) for _ in range(count)]
    bank = bank_of_slabs([borrow(slab.lend()) for slab in slabs], 4)
    held = {}
    for e, expert in plain.items():
        slab = slabs[e % count]
        one = slab.write(4, e, pack(form, expert), version=1, copy=e // 2 % COPIES)
        place = e % count * COPIES * EXPERTS + one.place
        held[e] = replace(one, bank=bank, place=place)
    yield held
    for slab in slabs:
        slab.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_experts_that_lie_together_are_computed_in_one_call(
    slabs: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    plain = experts(dtype)
    calls = []
    real = fused.LayerBank.ffn
    monkeypatch.setattr(
        fused.LayerBank, "ffn", lambda self, *given: calls.append(self) or real(self, *given)
    )
    given = call(tokens, dtype)
    expected, found = torch.empty(tokens, HIDDEN), torch.full((tokens, HIDDEN), torch.nan)
    with in_slabs(slabs, form, plain) as held:
        loop_kernel(form, held, *given, found)
    assert len(calls) == (1 if tokens else 0)
    reference_kernel(form, plain, *given, expected)
    if tokens:
        assert_near(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("slabs", [1, 3])
def test_a_layer_is_computed_at_once(slabs: int, tokens: int, dtype: torch.dtype) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["gelu"])
    plain = experts(dtype)
    x_TH, ids_TK, weights_TK = call(tokens, dtype)
    ids_TK = ids_TK.abs().int()  # none is unused
    expected = torch.empty(tokens, HIDDEN)
    reference_kernel(form, plain, x_TH, ids_TK, weights_TK, expected)
    with in_slabs(slabs, form, plain) as held:
        reach = LayerReach(CpuLayer(form, held), held, [], ["host"] * EXPERTS, HIDDEN, dtype)
        place_TK = reach.places(x_TH, ids_TK, weights_TK)
        assert place_TK is not None
        found = reach.compute_all(x_TH, ids_TK, weights_TK, place_TK)
    assert found is not None
    assert found.dtype == dtype
    assert_near(found.float(), expected, dtype)


@pytest.mark.skipif(not TILES, reason="no tiles")
def test_the_first_call_of_a_process_has_its_tiles() -> None:
    """The machine gives them to those that ask; whoever does not, dies of the first instruction."""
    first = (
        "import torch; from moesaic.kernels import fused;"
        "assert fused.instructions(torch.bfloat16);"
        "m = torch.ones(64, 64).bfloat16();"
        "fused.ffn(m[:2], fused.pack(torch.cat([m, m])), fused.pack(m), 'silu')"
    )
    assert subprocess.run([sys.executable, "-c", first], timeout=60).returncode == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpacking_gives_every_bit_back(dtype: torch.dtype) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    most = torch.iinfo(whole).max
    bits = torch.randint(-most - 1, most, (2 * INTERMEDIATE, HIDDEN)).to(whole)
    plain = ExpertWeights(
        up=bits.view(dtype), down=random(HIDDEN, INTERMEDIATE, seed=3, dtype=dtype)
    )
    back = unpack(form, pack(form, plain))
    assert back.fused is None
    assert torch.equal(back.up.view(whole), bits)
    assert torch.equal(back.down, plain.down)


@pytest.mark.parametrize("activate", [interleaved, clamped, lambda up: functional.silu(up)])
def test_other_activations_stay_with_onednn(activate: Activation) -> None:
    assert fused.activation_of(activate) is None
    packed = pack(ExpertForm(transposed=False, activate=activate), experts(torch.float32)[0])
    assert packed.fused is None
    assert packed.up.is_mkldnn


@pytest.mark.parametrize("change", ["size", "bias"])
def test_what_the_kernel_does_not_take_stays_with_onednn(change: str) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    dtype = torch.float32
    expert = experts(dtype, intermediate=40 if change == "size" else INTERMEDIATE)[0]
    if change == "bias":
        bias = random(HIDDEN, seed=5, dtype=dtype)
        expert = ExpertWeights(expert.up, expert.down, down_bias=bias)
    packed = pack(form, expert)
    assert packed.fused is None
    assert packed.up.is_mkldnn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_exact_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    packed = {0: pack(form, experts(dtype)[0])}
    x_TH = random(3 * TILE_ROWS, HIDDEN, seed=7, dtype=dtype)

    def rows(x_TH: Tensor) -> Tensor:
        out_TKH = torch.empty(x_TH.shape[0], 1, HIDDEN)
        ids_TK = torch.zeros(x_TH.shape[0], 1, dtype=torch.int32)
        exact_rows(form, packed, x_TH, ids_TK, torch.ones(x_TH.shape[0], 1), out_TKH)
        return out_TKH[:, 0]

    together = rows(x_TH)
    for t in (0, 5, TILE_ROWS, 3 * TILE_ROWS - 1):
        assert torch.equal(rows(x_TH[t : t + 1])[0], together[t])
