"""vLLM's fused kernel for experts on CPUs; it needs vLLM and a CPU with matrix tiles (AMX).

It computes up-projection, gate and down-projection of one expert in one call, on matrices in its
own layout. This file loads only vLLM's library of kernels and does not import vLLM. All names of
vLLM that the project relies on are here, and `tests/with_vllm` checks them.

Shape suffixes: R = rows of one expert, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

_LIBRARY = "_C.abi3.so"
_ISA = "amx"
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


@cache
def available() -> bool:
    """Load the kernel, and return whether this process can use it."""
    if not torch.cpu._is_amx_tile_supported():
        return False
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return False
    library = Path(found.submodule_search_locations[0]) / _LIBRARY
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
    # A process must ask Linux for AMX once; otherwise its first tile instruction kills it.
    return torch.cpu._init_amx()


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
        up.dtype == torch.bfloat16
        and up.shape == (2 * intermediate, hidden)
        and hidden % _ALIGNMENT == 0
        and intermediate % _ALIGNMENT == 0
        and available()
    )


def pack(matrix: Tensor) -> Tensor:
    """Bring a bfloat16 matrix into the kernel's layout, of the same shape; `unpack` reverses it."""
    packed = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    torch.ops._C.prepack_moe_weight(matrix.contiguous()[None], packed[None], _ISA)
    return packed


def unpack(packed: Tensor) -> Tensor:
    # Packing only permutes elements. To find the permutation, pack a matrix of the elements' own
    # indices. Elements have 16 bits and indices have 32, so pack the low and the high halves
    # separately and join them: ``origin`` then has, for each packed place, the index of its
    # element in the plain matrix.
    place = torch.arange(packed.numel(), dtype=torch.int32).view(packed.shape)
    halves = [
        pack(half.to(torch.int16).view(torch.bfloat16)).view(torch.int16).int() & 0xFFFF
        for half in (place, place >> 16)
    ]
    origin = (halves[0] | halves[1] << 16).view(-1).long()
    plain = torch.empty_like(packed)
    plain.view(-1)[origin] = packed.view(-1)
    return plain


def ffn(x_RH: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute one expert on its rows: (R, H) -> (R, H), all bfloat16, with packed matrices."""
    rows = x_RH.shape[0]
    y_RH = torch.empty_like(x_RH)
    torch.ops._C.cpu_fused_moe(
        y_RH,
        x_RH,
        up[None],
        down[None],
        None,
        None,
        torch.ones(rows, 1),
        torch.zeros(rows, 1, dtype=torch.int32),
        True,
        activation,
        _ISA,
    )
    return y_RH
