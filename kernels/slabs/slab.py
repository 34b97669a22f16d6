"""A slab: sparse shared memory in which one host keeps the experts of one model.

The memory is an anonymous memfd, so nothing of it is left when the last process that has it ends.
It is sealed against growing and shrinking: whoever maps it never runs into its end. It is not
sealed against writing, because the host refills places.

The header has an entry for each slot. Its generation is odd while the slot is written or freed, and
even otherwise. A reader that finds the same even generation before and after it used a slot has
used one expert's weights, whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .. import onednn
from ..ffn import ExpertWeights
from ..fused import LayerBank
from .layout import COPIES, SLOT_ENTRY_BYTES, LayerLayout, Packing, SlabLayout, SlotTensor

_ENTRY = np.dtype(
    [
        ("generation", np.uint64),
        ("version", np.uint64),
        ("checksum", np.uint64),
        ("state", np.uint32),
        ("reserved", np.uint32),
    ]
)
assert _ENTRY.itemsize == SLOT_ENTRY_BYTES
# Of Linux's fallocate; Python has no name for them.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class SlotState(IntEnum):
    """What a slot holds. Memory begins with zeros, so 0 is an empty slot."""

    EMPTY = 0
    READY = 1


class SlabReader:
    """The experts in a slab's memory, which is mapped in this process."""

    def __init__(self, layout: SlabLayout, memory: Any) -> None:
        """Read ``memory``, a buffer that PyTorch takes; tensors over it keep it."""
        self.layout = layout
        self._memory = memory
        self._banks: dict[int, LayerBank | None] = {}
        self._slots = np.frombuffer(
            memory, dtype=_ENTRY, count=layout.slots, offset=layout.entries_start
        )
        changes = np.frombuffer(memory, np.uint64, count=1, offset=layout.changes_start)
        self._changes = changes.data  # read in each call, where an array takes twice as long

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

    @property
    def changes(self) -> int:
        """How many changes of slots have begun: nothing has changed while it stays the same."""
        return self._changes[0]

    def generation(self, layer: int, expert: int, copy: int = 0) -> int:
        """Return a slot's generation, which is odd while the slot changes."""
        return int(self._slots["generation"][self.layout.slot(layer, expert, copy)])

    def generations(self, slots: np.ndarray) -> np.ndarray:
        """Return the generations of several slots, by their numbers."""
        return self._slots["generation"][slots]

    def version(self, layer: int, expert: int, copy: int = 0) -> int | None:
        """Return the version of the weights in a slot, or None if it is empty."""
        entry = self._slots[self.layout.slot(layer, expert, copy)]
        return int(entry["version"]) if entry["state"] == SlotState.READY else None

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
        ready = (self._slots["state"] == SlotState.READY) & (self._slots["generation"] % 2 == 0)
        return [
            (*self.layout.place(slot), int(self._slots["version"][slot]))
            for slot in np.flatnonzero(ready).tolist()
        ]

    def is_sound(self, layer: int, expert: int, copy: int = 0) -> bool:
        """Return whether a filled slot still has the bytes that were written to it."""
        entry = self._slots[self.layout.slot(layer, expert, copy)]
        return int(entry["checksum"]) == self._checksum(layer, expert, copy)

    def _bytes(self, layer: int, tensor: SlotTensor, expert: int, copy: int) -> Tensor:
        start = self.layout.offset(layer, tensor, expert, copy)
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=tensor.nbytes, offset=start)

    def _tensor(self, layer: int, tensor: SlotTensor, expert: int, copy: int) -> Tensor:
        memory = self._bytes(layer, tensor, expert, copy)
        if tensor.packed is not None:
            return onednn.view(memory, tensor.packed)
        return memory.view(tensor.dtype).view(tensor.shape)

    def _checksum(self, layer: int, expert: int, copy: int) -> int:
        digest = xxhash.xxh3_64()
        for tensor in self.layout.layers[layer].tensors:
            digest.update(self._bytes(layer, tensor, expert, copy).numpy().data)
        return digest.intdigest()


class Slab(SlabReader):
    """The experts of one model in one host's memory. One thread at a time may write a slot."""

    def __init__(self, descriptor: int, layout: SlabLayout, memory: mmap.mmap) -> None:
        """Take a memfd, which this object closes, and a mapping of it; see `create`."""
        # Tensors over the mapping hold it; it ends with the last of them.
        super().__init__(layout, memory)
        self.descriptor = descriptor
        self.nbytes = 0  # of the slots that hold an expert

    @classmethod
    def create(cls, name: str, layout: SlabLayout) -> Slab:
        """Make an empty slab."""
        descriptor = os.memfd_create(f"moesaic:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, layout.nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(descriptor, layout.nbytes)
            header = layout.header()
            memory[: len(header)] = header
            return cls(descriptor, layout, memory)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def adopt(cls, descriptor: int) -> Slab:
        """Take over the slab of a process that has ended; the descriptor is this object's now.

        Slots that it was changing when it ended are empty. Raises ValueError for what is no slab.
        """
        try:
            try:
                seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
                memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
            except (OSError, ValueError) as error:
                raise ValueError(f"the descriptor's memory cannot be mapped: {error}") from error
            if seals & _SEALS != _SEALS:
                raise ValueError("the memory is not sealed against growing and shrinking")
            slab = cls(descriptor, SlabLayout.read(memoryview(memory)), memory)
        except BaseException:
            os.close(descriptor)
            raise
        slab._end_changes()
        layers = slab.layout.layers
        slab.nbytes = sum(layers[layer].expert_bytes for layer, _, _, _ in slab.filled())
        return slab

    def write(
        self, layer: int, expert: int, weights: ExpertWeights, *, version: int, copy: int = 0
    ) -> ExpertWeights:
        """Fill an empty slot with an expert in its kernel's layout; return it as it lies there."""
        slot = self.layout.slot(layer, expert, copy)
        entry = self._slots[slot]
        if entry["state"] != SlotState.EMPTY:
            raise ValueError(f"slot {slot} of layer {layer} already holds expert {expert}")
        shape, given = self.layout.layers[layer], weights.tensors()
        if given.keys() != {tensor.name for tensor in shape.tensors}:
            wanted = ", ".join(tensor.name for tensor in shape.tensors)
            raise ValueError(
                f"layer {layer}: its experts consist of {wanted}, but {', '.join(given)} were given"
            )
        self._begin_change(entry)
        try:
            for tensor in shape.tensors:
                memory = self._bytes(layer, tensor, expert, copy)
                if tensor.packed is not None:
                    onednn.copy_into(memory, given[tensor.name])
                else:
                    memory.view(tensor.dtype).view(tensor.shape).copy_(given[tensor.name])
        except BaseException:
            self._punch(layer, expert, copy)
            entry["generation"] += 1
            raise
        entry["version"] = version
        entry["checksum"] = self._checksum(layer, expert, copy)
        entry["state"] = SlotState.READY
        entry["generation"] += 1
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

    def free(self, layer: int, expert: int, copy: int = 0) -> None:
        """Empty a slot and return its memory to the system; views of it read zeros from now on."""
        entry = self._slots[self.layout.slot(layer, expert, copy)]
        if entry["state"] == SlotState.EMPTY:
            return
        self._begin_change(entry)
        entry["state"] = SlotState.EMPTY
        self._punch(layer, expert, copy)
        entry["generation"] += 1
        self.nbytes -= self.layout.layers[layer].expert_bytes

    def lend(self) -> int:
        """Return a new descriptor of the slab, to map it for reading; the caller closes it.

        It is the slab opened again. A seal against writing would bind this host, too.
        """
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def retire(self) -> None:
        """Tell whoever has borrowed the slab that nothing in it may be used any more."""
        self._slots["state"] = SlotState.EMPTY
        self._begin_change(self._slots)

    def close(self) -> None:
        """Close the descriptor; the memory is freed with the last view and the last borrower."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _begin_change(self, entries: Any) -> None:
        """Say that something in these slots changes; only then change it.

        Whoever sees the new number of changes must find the new generations, so these are first.
        """
        entries["generation"] += 1
        self._changes[0] += 1

    def _end_changes(self) -> None:
        """Empty the slots that the last owner was changing when it ended."""
        self._changes[0] += 1  # it may have ended before it counted
        for slot in np.flatnonzero(self._slots["generation"] % 2).tolist():
            entry = self._slots[slot]
            entry["state"] = SlotState.EMPTY
            self._punch(*self.layout.place(slot))
            entry["generation"] += 1

    def _punch(self, layer: int, expert: int, copy: int) -> None:
        for tensor in self.layout.layers[layer].tensors:
            start = self.layout.offset(layer, tensor, expert, copy)
            _punch_hole(self.descriptor, start, tensor.stride_bytes)


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


def _punch_hole(descriptor: int, start: int, size: int) -> None:
    """Give a range of pages of a memfd back to the system; it reads as zeros from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(
        ctypes.c_int(descriptor),
        ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE),
        ctypes.c_long(start),
        ctypes.c_long(size),
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}")
