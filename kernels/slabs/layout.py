"""Where the experts of a model lie in a slab: computed from their shapes, without an allocator.

A slab is sparse: memory that nothing was written to takes no page. So every expert of every layer
has places of its own, whether a host holds it or not, and a place is found by arithmetic. A layer's
experts lie together, tensor by tensor, so that a kernel sees each as one array (E, ...):

    header | layer 0: up of all experts, down of all experts, ... | layer 1: ...

Each expert has `COPIES` places, because two versions of its weights may be there at once. A place
begins on a page, so that pages can be freed and mapped one by one.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from ..onednn import PackedMatrix

PAGE_BYTES = mmap.PAGESIZE
COPIES = 2
# generation, version, checksum (64 bits each), state (32 bits), reserved.
SLOT_ENTRY_BYTES = 32


class Packing(StrEnum):
    """The layout of a tensor within its place."""

    PLAIN = "plain"
    ONEDNN = "onednn"
    VLLM = "vllm"  # its fused kernel's; the shape stays


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One tensor that each expert of a layer has, as it lies in its place."""

    name: str  # as in `ExpertWeights.tensors`
    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: Packing = Packing.PLAIN
    packed: PackedMatrix | None = None  # with oneDNN's packing

    @property
    def nbytes(self) -> int:
        if self.packed is not None:
            return self.packed.nbytes
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def stride_bytes(self) -> int:
        """The distance between two experts."""
        return -(-self.nbytes // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """The experts of one layer."""

    experts: int
    tensors: tuple[SlotTensor, ...]
    fused: str | None = None  # the activation, for vLLM's fused kernel

    @property
    def expert_bytes(self) -> int:
        """The memory that one copy of one expert takes."""
        return sum(tensor.stride_bytes for tensor in self.tensors)


class SlabLayout:
    """The places of all experts of a model: {layer: its layout}."""

    def __init__(self, layers: Mapping[int, LayerLayout]) -> None:
        self.layers = dict(layers)
        self.slots = COPIES * sum(layer.experts for layer in layers.values())
        self._first_slot: dict[int, int] = {}
        self._regions: dict[tuple[int, str], int] = {}
        slot, offset = 0, -(-self.slots * SLOT_ENTRY_BYTES // PAGE_BYTES) * PAGE_BYTES
        for number, layer in self.layers.items():
            self._first_slot[number] = slot
            slot += COPIES * layer.experts
            for tensor in layer.tensors:
                self._regions[number, tensor.name] = offset
                offset += COPIES * layer.experts * tensor.stride_bytes
        self.nbytes = offset

    def slot(self, layer: int, expert: int, copy: int = 0) -> int:
        """Return the number of an expert's slot among all slots of the slab."""
        experts = self.layers[layer].experts
        if not (0 <= expert < experts and 0 <= copy < COPIES):
            raise IndexError(f"layer {layer} has no place for copy {copy} of expert {expert}")
        return self._first_slot[layer] + copy * experts + expert

    def offset(self, layer: int, tensor: SlotTensor, expert: int, copy: int = 0) -> int:
        """Return where a tensor of an expert begins, in bytes."""
        place = self.slot(layer, expert, copy) - self._first_slot[layer]
        return self._regions[layer, tensor.name] + place * tensor.stride_bytes
