"""vLLM's fused kernel for experts on CPUs, where vLLM is installed and the CPU has tiles (AMX).

It computes up-projection, gate and down-projection of one expert in one call, on matrices in its
own layout. vLLM itself is not imported: its library of kernels is loaded alone. Every name of
vLLM's that is relied on is here, and `tests/with_vllm` shows that they are as expected.

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
_ALIGNMENT = 32  # of hidden and intermediate size
_SCHEMA = (
    "_C::cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? "
    "w13_bias, Tensor? w2_bias, Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, "
    "str isa) -> ()"
)
# Of gated experts whose up-projection is all gates, then all values.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


@cache
def available() -> bool:
    """True where the kernel can be used in this process; loads it."""
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
        # A vLLM for other devices, or of another torch.
        log.info("vLLM's kernels for CPUs are not used: %s: %s", library, error)
        return False
    if schema != _SCHEMA:
        log.warning("vLLM's kernels for CPUs are not used: they take %s", schema)
        return False
    # A process has to ask for tiles once; without, their first instruction would end it.
    return torch.cpu._init_amx()


def activation_of(activate: Callable[[Tensor], Tensor]) -> str | None:
    """The kernel's name for ``activate``, (R, 2I) -> (R, I); None if it has none.

    Told by what it computes, far from zero too: some activations clamp.
    """
    magnitudes_R1 = torch.tensor([0.1, 1.0, 10.0, 100.0, 1000.0]).unsqueeze(1)
    probe_RI = magnitudes_R1 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    gate_RI, value_RI = probe_RI.chunk(2, dim=-1)
    try:
        found_RI = activate(probe_RI)
    except (RuntimeError, IndexError, ValueError):
        return None  # it takes other shapes or dtypes
    for name, function in _ACTIVATIONS.items():
        expected_RI = function(gate_RI) * value_RI
        if found_RI.shape == expected_RI.shape and torch.allclose(found_RI, expected_RI):
            return name
    return None


def takes(up: Tensor, down: Tensor) -> bool:
    """Whether the kernel takes an expert of these matrices, (2I, H) and (H, I)."""
    hidden, intermediate = down.shape
    return (
        up.dtype == torch.bfloat16
        and up.shape == (2 * intermediate, hidden)
        and hidden % _ALIGNMENT == 0
        and intermediate % _ALIGNMENT == 0
        and available()
    )


def pack(matrix: Tensor) -> Tensor:
    """A bfloat16 matrix in the kernel's layout, of the same shape. `unpack` is the way back."""
    packed = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    torch.ops._C.prepack_moe_weight(matrix.contiguous()[None], packed[None], _ISA)
    return packed


def unpack(packed: Tensor) -> Tensor:
    # Packing moves numbers and nothing else. Where to is read off the packed numbers of places,
    # in halves: an element has 16 bits.
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
    """One expert on its rows: (R, H) -> (R, H), all bfloat16, the matrices packed."""
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
