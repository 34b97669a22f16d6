"""A slab: sparse shared memory in which one host keeps the experts of one model.

The header has an entry for each slot (`slot_entries.py`).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from .. import onednn
from ..ffn import ExpertWeights
from ..fused import LayerBank
from . import memfd
from .checksum import checksum, copy_and_digest, octets_of
from .layout import COPIES, LayerLayout, Packing, SlabLayout, SlotTensor
from .slot_entries import SlotEntries


class SlabReader:
    """The experts in a slab's memory, which is mapped in this process."""

    def __init__(self, layout: SlabLayout, memory: Any) -> None:
        """Read ``memory``, a buffer that PyTorch takes; tensors over it keep it."""
        self.layout = layout
        self._memory = memory
        self._banks: dict[int, LayerBank | None] = {}
        self.entries = SlotEntries(layout, memory)

    def view(self, layer: int, expert: int, copy: int = 0) -> ExpertWeights:
        """Return an expert as tensors over the slab, which they keep alive."""
        shape = self.layout.layers[layer]
        tensors = {t.name: self._tensor(layer, t, expert, copy) for t in shape.tensors}
        weights = ExpertWeights.of(tensors, fused=shape.fused, memory=self._memory)
        bank = self.bank(layer)
        if bank is None:
            return weights
        return replace(weights, bank=bank, place=self.layout.place_in_layer(layer, expert, copy))

    def bank(self, layer: int) -> LayerBank | None:
        """Return all places of a layer, if the kernel that computes them together can take them."""
        if layer not in self._banks:
            shape = self.layout.layers[layer]
            tight = all(tensor.nbytes == tensor.stride_bytes for tensor in shape.tensors)
            self._banks[layer] = None
            if shape.fused is not None and tight:
                places = {t.name: self._places(layer, t) for t in shape.tensors}
                self._banks[layer] = LayerBank(places["up"], places["down"], shape.fused)
        return self._banks[layer]

    def _places(self, layer: int, tensor: SlotTensor) -> Tensor:
        """Return one tensor of all experts of a layer, both places of each."""
        count = COPIES * self.layout.layers[layer].experts
        start, size = self.layout.offset(layer, tensor, 0), count * tensor.nbytes
        memory = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=start)
        return memory.view(tensor.dtype).view(count, *tensor.shape)

    def generation(self, layer: int, expert: int, copy: int = 0) -> int:
        """Return a slot's generation, which is odd while the slot changes."""
        return self.entries.generation(self.layout.slot(layer, expert, copy))

    def version(self, layer: int, expert: int, copy: int = 0) -> int | None:
        """Return the version of the weights in a slot, or None if it is empty."""
        return self.entries.version(self.layout.slot(layer, expert, copy))

    def copy_of(self, layer: int, expert: int, version: int) -> int | None:
        """Return which copy of an expert has this version, or None."""
        copies = range(COPIES)
        return next((c for c in copies if self.version(layer, expert, c) == version), None)

    def free_copy(self, layer: int, expert: int) -> int | None:
        """Return a copy of an expert that is empty, or None."""
        copies = range(COPIES)
        return next((c for c in copies if self.version(layer, expert, c) is None), None)

    def filled(self) -> list[tuple[int, int, int, int]]:
        """Return (layer, expert, copy, version) of each slot that holds an expert."""
        return [
            (*self.layout.place(slot), version)
            for slot in self.entries.filled()
            if (version := self.entries.version(slot)) is not None
        ]

    def is_sound(self, layer: int, expert: int, copy: int = 0) -> bool:
        """Return whether a filled slot still has the bytes that were written to it."""
        slot = self.layout.slot(layer, expert, copy)
        return self.entries.checksum(slot) == self._checksum(layer, expert, copy)

    def _bytes(self, layer: int, tensor: SlotTensor, expert: int, copy: int) -> Tensor:
        start = self.layout.offset(layer, tensor, expert, copy)
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=start)

    def _tensor(self, layer: int, tensor: SlotTensor, expert: int, copy: int) -> Tensor:
        memory = self._bytes(layer, tensor, expert, copy)
        if tensor.packed is not None:
            return onednn.view(memory, tensor.packed)
        return memory.view(tensor.dtype).view(tensor.shape)

    def _checksum(self, layer: int, expert: int, copy: int) -> int:
        tensors = self.layout.layers[layer].tensors
        return checksum(self._bytes(layer, tensor, expert, copy) for tensor in tensors)


class Slab(SlabReader):
    """The experts of one model in one host's memory. One thread at a time may write a slot."""

    def __init__(self, descriptor: int, memory: mmap.mmap, layout: SlabLayout) -> None:
        """Take a memfd, which this object closes, and a mapping of it; see `create`."""
        # Tensors over the mapping hold it; it ends with the last of them.
        super().__init__(layout, memory)
        self.descriptor = descriptor
        self.nbytes = 0  # of the slots that hold an expert

    @classmethod
    def create(cls, name: str, layout: SlabLayout) -> Slab:
        """Make an empty slab."""
        return cls(*memfd.create(name, layout.nbytes, layout.header()), layout)

    @classmethod
    def adopt(cls, descriptor: int) -> Slab:
        """Take over the slab of a process that has ended; the descriptor is this object's now.

        Slots that it was changing when it ended are empty. Raises ValueError for what is no slab
        of a CPU.
        """
        try:
            memory = memfd.adopt(descriptor)
            slab = cls(descriptor, memory, SlabLayout.read(memoryview(memory)))
            if slab.layout.chunk_bytes:
                raise ValueError(f"its experts are on the device {slab.layout.device}")
        except BaseException:
            os.close(descriptor)
            raise
        for slot in slab.entries.take_over():
            slab._punch(*slab.layout.place(slot))
            slab.entries.empty(slot)
        layers = slab.layout.layers
        slab.nbytes = sum(layers[layer].expert_bytes for layer, _, _, _ in slab.filled())
        return slab

    def write(
        self, layer: int, expert: int, weights: ExpertWeights, *, version: int, copy: int = 0
    ) -> ExpertWeights:
        """Fill an empty slot with an expert in its kernel's layout; return it as it lies there."""
        slot = self.layout.slot(layer, expert, copy)
        if self.entries.version(slot) is not None:
            raise ValueError(f"slot {slot} of layer {layer} already holds expert {expert}")
        shape, given = self.layout.layers[layer], weights.tensors()
        if given.keys() != {tensor.name for tensor in shape.tensors}:
            wanted = ", ".join(tensor.name for tensor in shape.tensors)
            raise ValueError(
                f"layer {layer}: its experts consist of {wanted}, but {', '.join(given)} were given"
            )
        self.entries.begin(slot)
        digest = xxhash.xxh3_64()
        try:
            for tensor in shape.tensors:
                memory, weight = self._bytes(layer, tensor, expert, copy), given[tensor.name]
                if tensor.packed is not None:
                    onednn.copy_into(memory, weight)
                    digest.update(memory.numpy().data)
                elif weight.dtype == tensor.dtype and weight.shape == tensor.shape:
                    copy_and_digest(octets_of(weight), memory.numpy(), digest)
                else:
                    raise ValueError(
                        f"{tensor.name} of layer {layer} is {tensor.dtype} {tuple(tensor.shape)}, "
                        f"but {weight.dtype} {tuple(weight.shape)} was given"
                    )
        except BaseException:
            self._punch(layer, expert, copy)
            self.entries.empty(slot)
            raise
        self.entries.fill(slot, version, checksum=digest.intdigest())
        self.nbytes += shape.expert_bytes
        return self.view(layer, expert, copy)

    def holds(self, layer: int, expert: int, weights: ExpertWeights, copy: int = 0) -> bool:
        """Return whether a slot has exactly these weights, given as to `write`."""
        if self.version(layer, expert, copy) is None:
            return False
        given = weights.tensors()
        return all(
            torch.equal(self._bytes(layer, t, expert, copy), _bytes_of(given[t.name], t))
            for t in self.layout.layers[layer].tensors
        )

    def free(self, layer: int, expert: int, copy: int = 0, *, keep_memory: bool = False) -> None:
        """Empty a slot and return its memory to the system; views of it read zeros from now on.

        With ``keep_memory`` it waits for the next expert, and `release` returns it.
        """
        slot = self.layout.slot(layer, expert, copy)
        if self.entries.version(slot) is None:
            return
        self.entries.begin(slot)
        if not keep_memory:
            self._punch(layer, expert, copy)
        self.entries.empty(slot)
        self.nbytes -= self.layout.layers[layer].expert_bytes

    def release(self, layer: int, expert: int, copy: int = 0) -> None:
        """Return the memory of an empty slot to the system."""
        if self.entries.version(self.layout.slot(layer, expert, copy)) is None:
            self._punch(layer, expert, copy)

    def lend(self) -> int:
        """Return a new descriptor of the slab, to map it for reading; the caller closes it."""
        return memfd.reopen(self.descriptor)

    def retire(self) -> None:
        """Tell whoever has borrowed the slab that nothing in it may be used any more."""
        self.entries.retire()

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last view and the last borrower."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _punch(self, layer: int, expert: int, copy: int) -> None:
        for tensor in self.layout.layers[layer].tensors:
            start = self.layout.offset(layer, tensor, expert, copy)
            memfd.punch_hole(self.descriptor, start, tensor.stride_bytes)


def _bytes_of(tensor: Tensor, place: SlotTensor) -> Tensor:
    if place.packed is None:
        return tensor.contiguous().view(-1).view(torch.uint8)
    found = torch.empty(place.nbytes, dtype=torch.uint8)
    onednn.copy_into(found, tensor)
    return found


def layer_layout(experts: int, example: ExpertWeights) -> LayerLayout:
    """Return the layout of a layer whose experts look like ``example``, which may be packed."""
    return LayerLayout(
        experts,
        tuple(
            _slot_tensor(name, tensor, fused=example.fused is not None)
            for name, tensor in example.tensors().items()
        ),
        example.fused,
    )


def _slot_tensor(name: str, tensor: Tensor, *, fused: bool) -> SlotTensor:
    shape = tuple(tensor.shape)
    if tensor.is_mkldnn:
        packed = onednn.PackedMatrix.of(tensor)
        return SlotTensor(name, shape, tensor.dtype, Packing.ONEDNN, packed)
    packing = Packing.VLLM if fused else Packing.PLAIN
    return SlotTensor(name, shape, tensor.dtype, packing)
