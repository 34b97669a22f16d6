"""vLLM's fused kernel for experts on CPUs, against the reference.

Shape suffixes: T = tokens, K = choices of a token, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

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

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")
if not torch.cpu._is_amx_tile_supported():
    pytest.skip("this CPU has no tiles", allow_module_level=True)

HIDDEN, INTERMEDIATE, EXPERTS = 96, 160, 5
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


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def experts(transposed: bool = False, intermediate: int = INTERMEDIATE) -> dict[int, ExpertWeights]:
    def matrix(seed: int, rows: int, columns: int) -> Tensor:
        plain = random(rows, columns, seed=seed, scale=0.1)
        return plain.t().contiguous() if transposed else plain

    return {
        e: ExpertWeights(
            up=matrix(2 * e, 2 * intermediate, HIDDEN), down=matrix(2 * e + 1, HIDDEN, intermediate)
        )
        for e in range(EXPERTS)
    }


def test_the_library_is_found_and_takes_what_it_is_given() -> None:
    assert fused.available()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 7, 64, 130])
def test_the_sum_of_experts(name: str, tokens: int, transposed: bool) -> None:
    form = ExpertForm(transposed=transposed, activate=ACTIVATIONS[name])
    plain = experts(transposed)
    packed = {e: pack(form, expert) for e, expert in plain.items()}
    assert {expert.fused for expert in packed.values()} == {name}
    x_TH = random(tokens, HIDDEN, seed=99)
    generator = torch.Generator().manual_seed(1)
    ids_TK = torch.randint(-1, EXPERTS, (tokens, 3), generator=generator, dtype=torch.int32)
    weights_TK = torch.rand(tokens, 3, generator=generator)
    expected, found = torch.empty(tokens, HIDDEN), torch.full((tokens, HIDDEN), torch.nan)
    reference_kernel(form, plain, x_TH, ids_TK, weights_TK, expected)
    loop_kernel(form, packed, x_TH, ids_TK, weights_TK, found)
    assert float((found - expected).abs().max()) <= 4e-2 * float(expected.abs().max())


def test_the_first_call_of_a_process_has_its_tiles() -> None:
    """The machine gives them to those that ask; whoever does not, dies of the first instruction."""
    first = (
        "import torch; from moesaic.kernels import fused; assert fused.available();"
        "m = torch.ones(64, 64).bfloat16();"
        "fused.ffn(m[:2], fused.pack(torch.cat([m, m])), fused.pack(m), 'silu')"
    )
    assert subprocess.run([sys.executable, "-c", first], timeout=60).returncode == 0


def test_unpacking_gives_every_bit_back() -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    bits = torch.randint(-(1 << 15), 1 << 15, (2 * INTERMEDIATE, HIDDEN), dtype=torch.int16)
    plain = ExpertWeights(up=bits.view(torch.bfloat16), down=random(HIDDEN, INTERMEDIATE, seed=3))
    back = unpack(form, pack(form, plain))
    assert back.fused is None
    assert torch.equal(back.up.view(torch.int16), bits)
    assert torch.equal(back.down, plain.down)


@pytest.mark.parametrize("activate", [interleaved, clamped, lambda up: functional.silu(up)])
def test_other_activations_stay_with_onednn(activate: Activation) -> None:
    assert fused.activation_of(activate) is None
    packed = pack(ExpertForm(transposed=False, activate=activate), experts()[0])
    assert packed.fused is None
    assert packed.up.is_mkldnn


@pytest.mark.parametrize("change", ["size", "bias", "dtype"])
def test_what_the_kernel_does_not_take_stays_with_onednn(change: str) -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    expert = experts(intermediate=40 if change == "size" else INTERMEDIATE)[0]
    if change == "bias":
        expert = ExpertWeights(expert.up, expert.down, down_bias=random(HIDDEN, seed=5))
    if change == "dtype":
        expert = ExpertWeights(expert.up.float(), expert.down.float())
    packed = pack(form, expert)
    assert packed.fused is None
    assert packed.up.is_mkldnn


def test_with_exact_a_rows_bits_are_its_own() -> None:
    form = ExpertForm(transposed=False, activate=ACTIVATIONS["silu"])
    packed = {0: pack(form, experts()[0])}
    x_TH = random(3 * TILE_ROWS, HIDDEN, seed=7)

    def rows(x_TH: Tensor) -> Tensor:
        out_TKH = torch.empty(x_TH.shape[0], 1, HIDDEN)
        ids_TK = torch.zeros(x_TH.shape[0], 1, dtype=torch.int32)
        exact_rows(form, packed, x_TH, ids_TK, torch.ones(x_TH.shape[0], 1), out_TKH)
        return out_TKH[:, 0]

    together = rows(x_TH)
    for t in (0, 5, TILE_ROWS, 3 * TILE_ROWS - 1):
        assert torch.equal(rows(x_TH[t : t + 1])[0], together[t])
