"""Experts in slots, as the grouped FFN takes them, and what float64 says of a call.

Shape suffixes: T = tokens, K = assignments of a token, H = hidden size, S = slots, L = layers, E =
experts.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moesaic.kernels.ffn import SHARED_NAMES, ExpertWeights, reference_kernel
from moesaic.kernels.grouped.activation import Activation
from moesaic.kernels.grouped.slots import LayerSlots, SlotForm, to_slot
from moesaic.kernels.slabs import memfd
from moesaic.kernels.slabs.device_memory import CHUNK_BYTES
from moesaic.kernels.slabs.memfd import readable
from tests.helpers.models.forms import Kind

LAYERS, LAYER = 3, 1
_MAP_FIXED = 0x10  # of Linux's mmap; Python has no name for it


def slots_of(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    places: Mapping[int, int],
    *,
    table_size: int,
    device: str = "cpu",
    recognised: bool = True,
) -> LayerSlots:
    """Lay experts in the slots that ``places`` names; whatever is not written is NaN."""
    activation = Activation.of(kind.activate, gated=kind.gated) if recognised else None
    form = SlotForm(
        activation,
        kind.activate if activation is None else None,
        kind.form.post_norm,
    )
    count = max(places.values()) + 2
    table_LE = torch.full((LAYERS, table_size), -1, dtype=torch.int32)
    parts: dict[str, Tensor] = {}
    for number, expert in experts.items():
        filled = to_slot(activation, expert.tensors(), transposed=kind.transposed)
        for name, tensor in filled.items():
            slots = parts.setdefault(name, tensor.new_full((count, *tensor.shape), torch.nan))
            slots[places[number]] = tensor
        table_LE[LAYER, number] = places[number]
    return LayerSlots(
        form,
        parts["up"].to(device),
        parts["down"].to(device),
        parts["up_bias"].to(device) if "up_bias" in parts else None,
        parts["down_bias"].to(device) if "down_bias" in parts else None,
        table_LE.to(device),
        torch.tensor(LAYER, dtype=torch.int32, device=device),
        {name: parts[name].to(device) for name in SHARED_NAMES if name in parts},
    )


def oracle(
    kind: Kind,
    experts: Mapping[int, ExpertWeights],
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """The call in float64, on the CPU."""
    wide = {
        number: ExpertWeights.of({n: t.double().cpu() for n, t in expert.tensors().items()})
        for number, expert in experts.items()
    }
    out_TH = torch.full(x_TH.shape, torch.nan, dtype=torch.float64)
    reference_kernel(
        kind.form, wide, x_TH.double().cpu(), ids_TK.cpu(), weights_TK.double().cpu(), out_TH
    )
    return out_TH


class HostMemory:
    """A device's memory, played by the CPU's: chunks are mapped, and handed to other processes.

    Where no chunk is mapped any more, everything reads as NaN, in every type.
    """

    def __init__(self, nbytes: int, chunk_bytes: int = mmap.PAGESIZE) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks: dict[int, int] = {}  # {number: descriptor}
        self.closed = False
        count = -(-nbytes // chunk_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._buffer = readable(
            mmap.mmap(-1, count * chunk_bytes, flags=flags, prot=mmap.PROT_READ)
        )
        self._nothing, memory = memfd.create("nothing", chunk_bytes, b"\xff" * chunk_bytes)
        memory.close()

    @property
    def backed_bytes(self) -> int:
        return len(self.chunks) * self.chunk_bytes

    def map(self, chunk: int) -> None:
        descriptor, memory = memfd.create("chunk", self.chunk_bytes, b"")
        memory.close()
        self._put(chunk, descriptor, mmap.PROT_READ | mmap.PROT_WRITE)

    def unmap(self, chunk: int) -> None:
        os.close(self.chunks.pop(chunk))
        self._map(chunk, self._nothing, mmap.PROT_READ)

    def descriptor(self, chunk: int) -> int:
        return os.dup(self.chunks[chunk])

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        self._put(chunk, descriptor, mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))

    def tensor(self, nbytes: int) -> Tensor:
        return torch.frombuffer(self._buffer, dtype=torch.uint8, count=nbytes)

    def close(self) -> None:
        for chunk in list(self.chunks):
            self.unmap(chunk)
        if not self.closed:
            os.close(self._nothing)
        self.closed = True

    def _put(self, chunk: int, descriptor: int, protection: int) -> None:
        assert chunk not in self.chunks
        self._map(chunk, descriptor, protection)
        self.chunks[chunk] = descriptor

    def _map(self, chunk: int, descriptor: int, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        target = ctypes.addressof(self._buffer) + chunk * self.chunk_bytes
        mapped = libc.mmap(
            ctypes.c_void_p(target),
            ctypes.c_size_t(self.chunk_bytes),
            ctypes.c_int(protection),
            ctypes.c_int(mmap.MAP_SHARED | _MAP_FIXED),
            ctypes.c_int(descriptor),
            ctypes.c_long(0),
        )
        assert mapped == target, os.strerror(ctypes.get_errno())


def chunks_in_use(device: str) -> float:
    """Chunks of ``cpu``'s memory that this process has mapped, or what is in use of the card."""
    gc.collect()
    if device == "cpu":
        return Path("/proc/self/maps").read_text().count("memfd:moesaic:chunk")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / CHUNK_BYTES
