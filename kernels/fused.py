"""vLLM's fused kernel for experts on CPUs; it needs vLLM, and a CPU that computes the dtype fast.

It computes up-projection, gate and down-projection in one call, of one expert or of a whole layer,
on matrices in its own layout: bfloat16 with matrix tiles (AMX), float32 with the vectors of any
CPU. One call for a layer reads weights two to four times as fast as two products for each expert.
This file loads only vLLM's library of kernels and does not import vLLM. All names of vLLM that the
project relies on are here, and `tests/with_vllm` checks them.

Shape suffixes: R = rows of one expert, N = rows of all experts, T = tokens, K = assignments of a
token, S = places of a layer's experts, H = hidden size, U = up-projection's size, I = intermediate
size.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

_ALIGNMENT = 32  # hidden and intermediate size must be multiples of this
_SCHEMA = (
    "_C::cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? "
    "w13_bias, Tensor? w2_bias, Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, "
    "str isa) -> ()"
)
# For gated experts whose up-projection has all gates first, then all values.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


def _library_name() -> str:
    """Return the build of vLLM's library that vLLM itself loads on this CPU."""
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2.abi3.so"
    return "_C.abi3.so" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512.abi3.so"


@cache
def _loaded() -> bool:
    """Load the library, and return whether its kernel is the one that is known here."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return False
    library = Path(found.submodule_search_locations[0]) / _library_name()
    try:
        torch.ops.load_library(library)
        schema = str(torch.ops._C.cpu_fused_moe.default._schema)
    except (OSError, RuntimeError, AttributeError) as error:
        # This vLLM was built for other devices, or for another version of torch.
        log.info("vLLM's kernels for CPUs are not used: %s: %s", library, error)
        return False
    if schema != _SCHEMA:
        log.warning("vLLM's kernels for CPUs are not used: their schema is unknown: %s", schema)
        return False
    return True


@cache
def instructions(dtype: torch.dtype) -> str | None:
    """Return the kernel's name for the instructions that it uses for ``dtype``; None: it has none.

    Of bfloat16 without tiles oneDNN's products are as fast.
    """
    match dtype:
        case torch.float32 if _loaded():
            return "vec"
        case torch.bfloat16 if torch.cpu._is_amx_tile_supported() and _loaded():
            # A process must ask Linux for AMX once; otherwise its first tile instruction kills it.
            return "amx" if torch.cpu._init_amx() else None
        case _:
            return None


def activation_of(activate: Callable[[Tensor], Tensor]) -> str | None:
    """Return the kernel's name for ``activate``, (R, 2I) -> (R, I); None if it has none.

    Compare what both compute on a probe, with large magnitudes too, because some activations clamp.
    """
    magnitudes_R1 = torch.tensor([0.1, 1.0, 10.0, 100.0, 1000.0]).unsqueeze(1)
    probe_RI = magnitudes_R1 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    gate_RI, value_RI = probe_RI.chunk(2, dim=-1)
    try:
        found_RI = activate(probe_RI)
    except (RuntimeError, IndexError, ValueError):
        return None  # it needs other shapes or dtypes
    for name, function in _ACTIVATIONS.items():
        expected_RI = function(gate_RI) * value_RI
        if found_RI.shape == expected_RI.shape and torch.allclose(found_RI, expected_RI):
            return name
    return None


def takes(up: Tensor, down: Tensor) -> bool:
    """Return whether the kernel supports an expert with these matrices, (2I, H) and (H, I)."""
    hidden, intermediate = down.shape
    return (
        up.shape == (2 * intermediate, hidden)
        and hidden % _ALIGNMENT == 0
        and intermediate % _ALIGNMENT == 0
        and instructions(up.dtype) is not None
    )


def pack(matrix: Tensor) -> Tensor:
    """Bring a matrix into the kernel's layout, of the same shape; `unpack` reverses it."""
    packed = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    torch.ops._C.prepack_moe_weight(
        matrix.contiguous()[None], packed[None], instructions(matrix.dtype)
    )
    return packed


def unpack(packed: Tensor) -> Tensor:
    # Packing only permutes elements. To find the permutation, pack a matrix of the elements' own
    # indices: ``origin`` then has, for each packed place, the index of its element in the plain
    # matrix.
    place = torch.arange(packed.numel(), dtype=torch.int32).view(packed.shape)
    if packed.dtype == torch.float32:
        origin = pack(place.view(torch.float32)).view(torch.int32)
    else:
        # Elements have 16 bits and indices have 32: the halves are packed one by one.
        low, high = (
            pack(half.to(torch.int16).view(torch.bfloat16)).view(torch.int16).int() & 0xFFFF
            for half in (place, place >> 16)
        )
        origin = low | high << 16
    plain = torch.empty_like(packed)
    plain.view(-1)[origin.view(-1).long()] = packed.view(-1)
    return plain


@dataclass(frozen=True, eq=False)
class LayerBank:
    """The places of a layer's packed experts, which lie together in memory."""

    up_SUH: Tensor
    down_SHI: Tensor
    activation: str

    def ffn(self, x_NH: Tensor, place_N: Tensor) -> Tensor:
        """Compute each row with the expert in its place (int32): (N, H) -> (N, H)."""
        rows = x_NH.shape[0]
        return self._call(x_NH, place_N.view(rows, 1), torch.ones(rows, 1), weighted=False)

    def layer(self, x_TH: Tensor, place_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the sum over K of weight * expert(x), (T, H) in x's dtype.

        Places are int32 and weights float32; the sum is taken in float32.
        """
        return self._call(x_TH, place_TK, weights_TK, weighted=True)

    # Found once: each look-up would count in a call.
    @cached_property
    def _kernel(self) -> tuple[Callable[..., None], str | None]:
        return torch.ops._C.cpu_fused_moe.default, instructions(self.up_SUH.dtype)

    def _call(self, x: Tensor, places: Tensor, weights: Tensor, *, weighted: bool) -> Tensor:
        y = torch.empty_like(x)
        if x.shape[0]:
            compute, isa = self._kernel
            compute(
                y,
                x,
                self.up_SUH,
                self.down_SHI,
                None,
                None,
                weights,
                places,
                not weighted,
                self.activation,
                isa,
            )
        return y


def ffn(x_RH: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute one expert on its rows: (R, H) -> (R, H), with packed matrices of the same dtype."""
    bank = LayerBank(up[None], down[None], activation)
    return bank.ffn(x_RH, torch.zeros(x_RH.shape[0], dtype=torch.int32))
