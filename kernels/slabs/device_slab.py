"""The experts of one model on a device, in slots that a grouped kernel computes from.

Experts whose tensors are alike share a pool of places, whatever their layer. The places of one
tensor are one tensor (places, ...), so a kernel finds an expert by the number of its place. That
tensor covers all places that could ever be needed; only those that are filled have memory.

What lies where is said in shared memory of the CPU (`layout.py`). So another process of the machine
can map the same memory of the device and compute with it (`borrowed_device_slab.py`).
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ffn import ExpertForm
from ..grouped.activation import Activation
from ..grouped.slots import LayerSlots, SlotForm, from_slot, to_slot
from . import memfd
from .checksum import checksum
from .device_pool import DevicePool, Memory
from .layout import COPIES, LayerLayout, SlabLayout, SlotTensor
from .slot_entries import SlotEntries

_MOST_TABLES = 1024


@dataclass(frozen=True, slots=True)
class SlotLayer:
    """The experts of one layer: how many, what they compute, and their shapes."""

    experts: int
    form: ExpertForm
    gated: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # by name, in the model's layout
    dtype: torch.dtype

    def slot_form(self) -> SlotForm:
        """Return what the kernel is told; recognising the function takes a millisecond."""
        known = Activation.of(self.form.activate, gated=self.gated)
        return SlotForm(known, None if known else self.form.activate, self.form.post_norm)

    def layout(self) -> LayerLayout:
        """Return how the experts lie in their slots."""
        blank = {n: torch.empty(s, dtype=self.dtype, device="meta") for n, s in self.shapes}
        tensors = to_slot(None, blank, transposed=self.form.transposed)
        return LayerLayout(
            self.experts,
            tuple(SlotTensor(n, tuple(t.shape), self.dtype) for n, t in tensors.items()),
        )


class DeviceSlab:
    """Experts by layer, number and version. One thread at a time writes; others read meanwhile."""

    def __init__(
        self,
        layers: Mapping[int, SlotLayer],
        device: torch.device,
        allocate: Callable[[int], Memory],
        layout: SlabLayout,
        header: int,
        memory: mmap.mmap,
    ) -> None:
        """Take a memfd, which this object closes, and a mapping of it; see `create`."""
        self._layers = dict(layers)
        self._device = device
        self.layout = layout
        self.descriptor = header
        # No process needs the memory's mapping but through these.
        self.entries = SlotEntries(layout, memory)
        self._last_serial = np.frombuffer(
            memory, np.uint64, count=1, offset=layout.last_serial_start
        )
        self._serials = np.frombuffer(
            memory, np.uint64, count=layout.chunks, offset=layout.chunks_start
        )
        self._chunks: Mapping[int, int] = {}  # replaced when it changes
        self._lock = threading.Lock()
        self._forms: dict[int, SlotForm] = {}
        # Tables on the device, until something is written or freed.
        self._tables: dict[object, LayerSlots] = {}
        self._pools: dict[tuple[SlotTensor, ...], DevicePool] = {}
        try:
            self._layer_0 = torch.zeros((), dtype=torch.int32, device=device)
            for pool in layout.pools:
                self._pools[pool.tensors] = DevicePool(pool, allocate)
        except BaseException:
            self._let_go()
            raise

    @classmethod
    def create(
        cls,
        name: str,
        layers: Mapping[int, SlotLayer],
        device: torch.device,
        allocate: Callable[[int], Memory],
        *,
        chunk_bytes: int,
        device_name: str,
        about: Mapping[str, Any] | None = None,
    ) -> DeviceSlab:
        """Make an empty slab.

        ``allocate`` returns a range of so many bytes, or a little more, without memory. All
        processes know the device by ``device_name``.
        """
        layouts = {number: layer.layout() for number, layer in layers.items()}
        layout = SlabLayout(layouts, about, chunk_bytes=chunk_bytes, device=device_name)
        header, memory = memfd.create(name, layout.nbytes, layout.header())
        return cls(layers, device, allocate, layout, header, memory)

    @classmethod
    def adopt(
        cls,
        header: int,
        chunks: Mapping[int, tuple[int, int]],
        layers: Mapping[int, SlotLayer],
        device: torch.device,
        allocate: Callable[[int], Memory],
        *,
        chunk_bytes: int,
        device_name: str,
    ) -> DeviceSlab:
        """Take over the slab of a process that has ended; all descriptors are this object's now.

        ``chunks`` has {number: (serial, descriptor)}. No weights are read. Raises ValueError for a
        slab that this process would have made otherwise, and RuntimeError if a chunk cannot be
        mapped; then nothing of it stays open or mapped.
        """
        serials = {number: serial for number, (serial, _) in chunks.items()}
        unused = {number: descriptor for number, (_, descriptor) in chunks.items()}
        try:
            try:
                memory = memfd.adopt(header)
                layout = SlabLayout.read(memoryview(memory))
                _check(layout, layers, chunk_bytes, device_name)
            except BaseException:
                os.close(header)
                raise
            slab = cls(layers, device, allocate, layout, header, memory)
            try:
                slab._take_over(serials, unused)
            except BaseException:
                slab._let_go()
                raise
        finally:
            for descriptor in unused.values():
                os.close(descriptor)
        return slab

    @property
    def backed_bytes(self) -> int:
        return sum(pool.backed_bytes for pool in self._pools.values())

    def versions(self, layer: int, expert: int) -> list[int]:
        slots = [self.layout.slot(layer, expert, copy) for copy in range(COPIES)]
        found = (self.entries.version(slot) for slot in slots)
        return sorted(version for version in found if version is not None)

    def write(
        self, layer: int, expert: int, tensors: Mapping[str, Tensor], *, version: int
    ) -> None:
        """Keep a version of an expert, given in its model's layout.

        Raises torch.OutOfMemoryError, with nothing kept, and ValueError if no slot is empty.
        """
        slots = [self.layout.slot(layer, expert, copy) for copy in range(COPIES)]
        slot = next((one for one in slots if self.entries.version(one) is None), None)
        if slot is None:
            raise ValueError(f"layer {layer} has {COPIES} versions of expert {expert} already")
        transposed = self._layers[layer].form.transposed
        given = to_slot(self._form(layer).activation, tensors, transposed=transposed)
        pool = self._pool(layer)
        with self._lock:
            place, made = pool.take()
            self._came(made)
        self.entries.begin(slot)
        try:
            for name, tensor in given.items():
                pool.parts[name][place].copy_(tensor)
            tensors_there = self.layout.layers[layer].tensors
            written = checksum(given[tensor.name].to(tensor.dtype) for tensor in tensors_there)
            if self._device.type == "cuda":
                # Whoever finds the slot filled may read it, in other processes too.
                torch.cuda.current_stream(self._device).synchronize()
        except BaseException:
            self._give_back(pool, place)
            self.entries.empty(slot)
            raise
        self.entries.fill(slot, version, checksum=written, place=place)
        with self._lock:
            self._tables.clear()

    def read(self, layer: int, expert: int, version: int) -> dict[str, Tensor]:
        """Return copies of an expert's tensors in its model's layout. Raises KeyError."""
        slot = self._slot(layer, expert, version)
        if slot is None:
            raise KeyError(f"layer {layer} has no version {version} of expert {expert}")
        place = self.entries.place(slot)
        tensors = {name: part[place] for name, part in self._pool(layer).parts.items()}
        return self.in_models_layout(layer, tensors)

    def in_models_layout(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors that lie as those of an expert in its slot."""
        transposed = self._layers[layer].form.transposed
        return from_slot(self._form(layer).activation, tensors, transposed=transposed)

    def is_sound(self, layer: int, expert: int, version: int) -> bool:
        """Return whether an expert has the bytes that were written; it must not be freed meanwhile.

        Raises KeyError.
        """
        slot = self._slot(layer, expert, version)
        if slot is None:
            raise KeyError(f"layer {layer} has no version {version} of expert {expert}")
        place, parts = self.entries.place(slot), self._pool(layer).parts
        # A stream of its own: computations go on meanwhile.
        cuda = self._device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._device)) if cuda else nullcontext():
            found = checksum(parts[t.name][place] for t in self.layout.layers[layer].tensors)
        return found == self.entries.checksum(slot)

    def filled(self) -> list[tuple[int, int, int]]:
        """Return (layer, expert, version) of each slot that holds an expert."""
        return [
            (layer, expert, version)
            for slot in self.entries.filled()
            for layer, expert, _ in [self.layout.place(slot)]
            if (version := self.entries.version(slot)) is not None
        ]

    def free(self, layer: int, expert: int, version: int) -> None:
        """Drop a version of an expert, if it is there."""
        slot = self._slot(layer, expert, version)
        if slot is None:
            return
        place = self.entries.place(slot)
        self.entries.begin(slot)
        with self._lock:
            self._tables.clear()
        self._give_back(self._pool(layer), place)
        self.entries.empty(slot)

    def layer(self, layer: int, version: int, others: Mapping[int, int]) -> LayerSlots:
        """Return a layer's slots, with a table of what is held of ``version``.

        ``others`` has the experts of another version, which is used for them.
        """
        key = layer, version, tuple(sorted(others.items()))
        with self._lock:
            found = self._tables.get(key)
            if found is None:
                if len(self._tables) >= _MOST_TABLES:  # each call may name other exceptions
                    self._tables.clear()
                found = self._tables[key] = self._make_layer(layer, version, others)
        return found

    # ---- lending --------------------------------------------------------------------------------

    def lend(self) -> int:
        """Return a new descriptor that says what lies where; the caller closes it."""
        return memfd.reopen(self.descriptor)

    def chunks(self) -> Mapping[int, int]:
        """Return {number: serial} of the chunks that have memory; it does not change any more."""
        return self._chunks

    def lend_chunk(self, number: int, serial: int) -> int | None:
        """Return a new descriptor of a chunk's memory, or None if it has gone; close it."""
        with self._lock:
            if self._chunks.get(number) != serial:
                return None
            return self._pool_of(number).descriptor(number)

    def close(self) -> None:
        """Free all memory. Nothing may use a slot any more."""
        with self._lock:
            if self.descriptor < 0:
                return
            # Another model may come under this one's name, with the same versions.
            self.entries.retire()
            self._serials[:] = 0
            self._let_go()

    def _let_go(self) -> None:
        """Unmap and close everything, and leave what the header says as it is."""
        self._tables.clear()
        self._chunks = {}
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
        os.close(self.descriptor)
        self.descriptor = -1

    def _take_over(self, serials: Mapping[int, int], descriptors: dict[int, int]) -> None:
        """Empty the slots that cannot be used, and map the chunks of all others.

        The slots that can be used are those that were not being changed and whose chunks are here,
        with the serial numbers that the header has. That is right at whatever moment the owner
        ended, and however late it handed its chunks on. It gave a chunk its number before it
        filled a slot there, took the number back before it gave the memory back, and never gave a
        number twice. So the same number means the same memory, and that holds a slot's expert
        since the slot counts as filled.
        """
        for slot in self.entries.take_over():
            self.entries.empty(slot)
        used: dict[tuple[SlotTensor, ...], set[int]] = {tensors: set() for tensors in self._pools}
        chunks: dict[int, int] = {}
        for slot in self.entries.filled():
            layer, _, _ = self.layout.place(slot)
            pool, place = self.layout.pool(layer), self.entries.place(slot)
            taken = used[pool.tensors]
            if place >= pool.places or place in taken:
                raise ValueError(f"slot {slot} names place {place}, which another one has, or none")
            there = {chunk: int(self._serials[chunk]) for chunk in pool.chunks(place)}
            if there.items() <= serials.items():
                taken.add(place)
                chunks.update(there)
            else:
                self.entries.begin(slot)
                self.entries.empty(slot)
        gone = np.ones(self.layout.chunks, dtype=bool)
        gone[list(chunks)] = False
        self._serials[gone] = 0
        self._chunks = chunks
        for tensors, places in used.items():
            self._pools[tensors].adopt(places, descriptors)

    def _make_layer(self, layer: int, version: int, others: Mapping[int, int]) -> LayerSlots:
        places = []
        for expert in range(self._layers[layer].experts):
            slot = self._slot(layer, expert, others.get(expert, version))
            places.append(-1 if slot is None else self.entries.place(slot))
        table_LE = torch.tensor([places], dtype=torch.int32).to(self._device)
        return layer_slots(self._form(layer), self._pool(layer).parts, table_LE, self._layer_0)

    def _slot(self, layer: int, expert: int, version: int) -> int | None:
        slots = [self.layout.slot(layer, expert, copy) for copy in range(COPIES)]
        return next((one for one in slots if self.entries.version(one) == version), None)

    def _form(self, layer: int) -> SlotForm:
        if layer not in self._forms:
            self._forms[layer] = self._layers[layer].slot_form()
        return self._forms[layer]

    def _pool(self, layer: int) -> DevicePool:
        return self._pools[self.layout.layers[layer].tensors]

    def _pool_of(self, chunk: int) -> DevicePool:
        pool = next(pool for pool in self.layout.pools if pool.has(chunk))
        return self._pools[pool.tensors]

    def _came(self, chunks: Sequence[int]) -> None:
        """Give chunks that were mapped serial numbers; the caller has the lock."""
        numbered = dict(zip(chunks, itertools.count(int(self._last_serial[0]) + 1)))
        # First, so that whoever adopts the slab does not give them again.
        self._last_serial[0] += len(chunks)
        for chunk, serial in numbered.items():
            self._serials[chunk] = serial
        if numbered:
            self._chunks = {**self._chunks, **numbered}

    def _give_back(self, pool: DevicePool, place: int) -> None:
        with self._lock:
            gone = pool.unused(place)
            self._serials[gone] = 0
            if gone:
                self._chunks = {n: s for n, s in self._chunks.items() if n not in gone}
            pool.give_back(place)


def _check(
    layout: SlabLayout, layers: Mapping[int, SlotLayer], chunk_bytes: int, device_name: str
) -> None:
    """Check that a slab is as this process would have made it. Raises ValueError."""
    if not layout.chunk_bytes:
        raise ValueError("its experts are in the memory of a CPU")
    if layout.device != device_name:
        raise ValueError(f"its experts are on {layout.device}, and this host is on {device_name}")
    layouts = {number: layer.layout() for number, layer in layers.items()}
    if (layout.layers, layout.chunk_bytes) != (layouts, chunk_bytes):
        raise ValueError("its experts lie there in another layout than that of this process")


def layer_slots(
    form: SlotForm, parts: Mapping[str, Tensor], table_LE: Tensor, layer: Tensor
) -> LayerSlots:
    """Return what the kernel takes, of all places of each tensor by its name."""
    biases = parts.get("up_bias"), parts.get("down_bias")
    return LayerSlots(form, parts["up"], parts["down"], *biases, table_LE, layer)
