"""The experts of one layer in the slabs of several hosts, mapped as if they lay in one."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..fused import LayerBank
from .memfd import readable
from .slab import SlabReader

# Of Linux's mremap; Python has no name for them.
_MAYMOVE, _FIXED = 1, 2


def bank_of_slabs(slabs: Sequence[SlabReader], layer: int) -> LayerBank | None:
    """Return the places of a layer in all slabs, those of the first slab first.

    Nothing is copied. None: no kernel computes them together, or they differ in form. Raises
    OSError if the system cannot map them.
    """
    banks = [slab.bank(layer) for slab in slabs]
    if len(banks) == 1:
        return banks[0]
    found = [bank for bank in banks if bank is not None]
    shapes = [slab.layout.layers[layer] for slab in slabs]
    if len(found) != len(banks) or any(shape != shapes[0] for shape in shapes):
        return None
    return LayerBank(
        _side_by_side([bank.up_SUH for bank in found]),
        _side_by_side([bank.down_SHI for bank in found]),
        found[0].activation,
    )


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return one tensor of all parts, which are whole pages of shared memory, of one shape."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    # The addresses are reserved first, and are all given back with this mapping.
    memory = mmap.mmap(
        -1,
        sum(part.nbytes for part in parts),
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        prot=mmap.PROT_READ,
    )
    buffer = readable(memory)
    target = ctypes.addressof(buffer)
    for part in parts:
        # From a shared mapping, a move of 0 bytes maps the same pages once more (see mremap(2)).
        mapped = libc.mremap(
            ctypes.c_void_p(part.data_ptr()),
            ctypes.c_size_t(0),
            ctypes.c_size_t(part.nbytes),
            ctypes.c_int(_MAYMOVE | _FIXED),
            ctypes.c_void_p(target),
        )
        if mapped != target:
            number = ctypes.get_errno()
            raise OSError(number, f"mremap: {os.strerror(number)}")
        target += part.nbytes
    joined = torch.frombuffer(buffer, dtype=parts[0].dtype)
    return joined.view(-1, *parts[0].shape[1:])
