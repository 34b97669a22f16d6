"""The experts of one model on a device, in slots that a grouped kernel computes from.

Experts whose tensors are alike share a pool of places, whatever their layer. The places of one
tensor are one tensor (places, ...), so a kernel finds an expert by the number of its place. That
tensor covers all places that could ever be needed; only those that are filled have memory.

What lies where is said in shared memory of the CPU (`layout.py`). So another process of the machine
can map the same memory of the device and compute with it (`borrowed_device_slab.py`).
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..ffn import ExpertForm
from ..grouped.activation import Activation
from ..grouped.slots import LayerSlots, SlotForm, from_slot, to_slot
from . import memfd
from .layout import COPIES, LayerLayout, SlabLayout, SlotPool, SlotTensor
from .slot_entries import SlotEntries

_MOST_TABLES = 1024


class Memory(Protocol):
    """Addresses of which any chunk can be given memory; `DeviceMemory` is one."""

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def backed_bytes(self) -> int: ...

    def map(self, chunk: int) -> None:
        """Give a chunk memory. Raises torch.OutOfMemoryError, with nothing changed."""
        ...

    def unmap(self, chunk: int) -> None:
        """Take a chunk's memory away, when nothing that was begun before uses it any more."""
        ...

    def descriptor(self, chunk: int) -> int:
        """Return a new descriptor of a chunk's memory; the caller closes it."""
        ...

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        """Map the memory of another process as a chunk, and close the descriptor."""
        ...

    def tensor(self, nbytes: int) -> Tensor:
        """Return the first bytes of the range, (nbytes,) uint8; only mapped chunks may be used."""
        ...

    def close(self) -> None: ...


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


class _Pool:
    """A pool's memory, which comes and goes with the places that are used."""

    def __init__(self, pool: SlotPool, allocate: Callable[[int], Memory]) -> None:
        self._pool = pool
        self._memory = {t.name: allocate(pool.places * pool.stride_bytes(t)) for t in pool.tensors}
        for memory in self._memory.values():
            if memory.chunk_bytes != pool.chunk_bytes:
                raise ValueError(f"chunks of {memory.chunk_bytes}, not {pool.chunk_bytes} bytes")
        self._free = list(range(pool.places))  # the lowest first, so that used ones stay together
        self._users: dict[int, int] = {}  # of each chunk that has memory, by its number

    @property
    def backed_bytes(self) -> int:
        return sum(memory.backed_bytes for memory in self._memory.values())

    def take(self) -> tuple[int, list[int]]:
        """Give a free place memory; return its number and the chunks that were mapped for it."""
        place = heapq.heappop(self._free)
        made: list[int] = []
        try:
            for chunk in self._pool.chunks(place):
                if chunk not in self._users:
                    tensor, number = self._pool.part(chunk)
                    self._memory[tensor.name].map(number)
                    made.append(chunk)
        except BaseException:
            self._unmap(made)
            heapq.heappush(self._free, place)
            raise
        for chunk in self._pool.chunks(place):
            self._users[chunk] = self._users.get(chunk, 0) + 1
        return place, made

    def unused(self, place: int) -> list[int]:
        """Return the chunks that `give_back` unmaps."""
        return [chunk for chunk in self._pool.chunks(place) if self._users[chunk] == 1]

    def give_back(self, place: int) -> None:
        unused = self.unused(place)
        for chunk in self._pool.chunks(place):
            self._users[chunk] -= 1
        for chunk in unused:
            del self._users[chunk]
        self._unmap(unused)
        heapq.heappush(self._free, place)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """All places of each tensor of the experts, by its name."""
        found = {}
        for tensor in self._pool.tensors:
            memory = self._memory[tensor.name]
            found[tensor.name] = as_places(memory, self._pool, tensor, self._pool.places)
        return found

    def descriptor(self, chunk: int) -> int:
        tensor, number = self._pool.part(chunk)
        return self._memory[tensor.name].descriptor(number)

    def close(self) -> None:
        self.__dict__.pop("parts", None)
        for memory in self._memory.values():
            memory.close()

    def _unmap(self, chunks: list[int]) -> None:
        for chunk in chunks:
            tensor, number = self._pool.part(chunk)
            self._memory[tensor.name].unmap(number)


class DeviceSlab:
    """Experts by layer, number and version. One thread at a time writes; others read meanwhile."""

    def __init__(
        self,
        name: str,
        layers: Mapping[int, SlotLayer],
        device: torch.device,
        allocate: Callable[[int], Memory],
        *,
        chunk_bytes: int,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """``allocate`` returns a range of so many bytes, or a little more, without memory."""
        self._layers = dict(layers)
        self._device = device
        layouts = {number: layer.layout() for number, layer in layers.items()}
        self.layout = SlabLayout(layouts, about, chunk_bytes=chunk_bytes)
        # No process needs the memory's mapping but through these.
        self._header, memory = memfd.create(name, self.layout.nbytes, self.layout.header())
        self.entries = SlotEntries(self.layout, memory)
        self._serials = np.frombuffer(
            memory, np.uint64, count=self.layout.chunks, offset=self.layout.chunks_start
        )
        self._chunks: Mapping[int, int] = {}  # replaced when it changes
        self._next_serial = 1
        self._pools = {pool.tensors: _Pool(pool, allocate) for pool in self.layout.pools}
        self._lock = threading.Lock()
        self._forms: dict[int, SlotForm] = {}
        # Tables on the device, until something is written or freed.
        self._tables: dict[object, LayerSlots] = {}
        self._layer_0 = torch.zeros((), dtype=torch.int32, device=device)

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
            if self._device.type == "cuda":
                # Whoever finds the slot filled may read it, in other processes too.
                torch.cuda.current_stream(self._device).synchronize()
        except BaseException:
            self._give_back(pool, place)
            self.entries.empty(slot)
            raise
        self.entries.fill(slot, version, place=place)
        with self._lock:
            self._tables.clear()

    def read(self, layer: int, expert: int, version: int) -> dict[str, Tensor]:
        """Return copies of an expert's tensors in its model's layout. Raises KeyError."""
        slot = self._slot(layer, expert, version)
        if slot is None:
            raise KeyError(f"layer {layer} has no version {version} of expert {expert}")
        place = self.entries.place(slot)
        tensors = {name: part[place] for name, part in self._pool(layer).parts.items()}
        transposed = self._layers[layer].form.transposed
        return from_slot(self._form(layer).activation, tensors, transposed=transposed)

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
        return memfd.reopen(self._header)

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
            if self._header < 0:
                return
            # Another model may come under this one's name, with the same versions.
            self.entries.retire()
            self._tables.clear()
            self._serials[:] = 0
            self._chunks = {}
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()
            os.close(self._header)
            self._header = -1

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

    def _pool(self, layer: int) -> _Pool:
        return self._pools[self.layout.layers[layer].tensors]

    def _pool_of(self, chunk: int) -> _Pool:
        pool = next(pool for pool in self.layout.pools if pool.has(chunk))
        return self._pools[pool.tensors]

    def _came(self, chunks: Sequence[int]) -> None:
        """Give chunks that were mapped serial numbers; the caller has the lock."""
        numbered = dict(zip(chunks, itertools.count(self._next_serial)))
        self._next_serial += len(chunks)
        for chunk, serial in numbered.items():
            self._serials[chunk] = serial
        if numbered:
            self._chunks = {**self._chunks, **numbered}

    def _give_back(self, pool: _Pool, place: int) -> None:
        with self._lock:
            gone = pool.unused(place)
            self._serials[gone] = 0
            if gone:
                self._chunks = {n: s for n, s in self._chunks.items() if n not in gone}
            pool.give_back(place)


def as_places(memory: Memory, pool: SlotPool, tensor: SlotTensor, places: int) -> Tensor:
    """Return the beginning of a range of addresses as places of a tensor, (places, ...)."""
    stride, size = pool.stride_bytes(tensor), torch.Size(tensor.shape).numel()
    rows = memory.tensor(places * stride).view(tensor.dtype).view(places, -1)
    return rows[:, :size].unflatten(1, tensor.shape)


def layer_slots(
    form: SlotForm, parts: Mapping[str, Tensor], table_LE: Tensor, layer: Tensor
) -> LayerSlots:
    """Return what the kernel takes, of all places of each tensor by its name."""
    biases = parts.get("up_bias"), parts.get("down_bias")
    return LayerSlots(form, parts["up"], parts["down"], *biases, table_LE, layer)
