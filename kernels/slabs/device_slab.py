"""The experts of one model on a device, in slots that a grouped kernel computes from.

Experts of one shape share a pool of slots, whatever their layer. A slot is a place in one tensor
(slots, ...) for each part of an expert, so a kernel finds an expert by its slot's number. The
tensors cover all slots that could ever be needed; only slots that are filled have memory.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ffn import ExpertForm
from ..grouped.activation import Activation
from ..grouped.slots import LayerSlots, SlotForm, from_slot, to_slot
from .layout import COPIES

_MOST_TABLES = 1024


class Memory(Protocol):
    """Addresses of which any part can be given memory; `DeviceMemory` is one."""

    @property
    def backed_bytes(self) -> int: ...

    def back(self, start: int, nbytes: int) -> None: ...

    def release(self, start: int, nbytes: int) -> None: ...

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SlotLayer:
    """The experts of one layer: how many, what they compute, and the form of their slots."""

    experts: int
    form: ExpertForm
    gated: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # by name, in the model's layout
    dtype: torch.dtype

    def slot_form(self) -> SlotForm:
        """Return what the kernel is told; recognising the function takes a millisecond."""
        known = Activation.of(self.form.activate, gated=self.gated)
        return SlotForm(known, None if known else self.form.activate, self.form.post_norm)


class _Pool:
    """Slots of one shape."""

    def __init__(
        self, tensors: Mapping[str, Tensor], slots: int, allocate: Callable[[int], Memory]
    ) -> None:
        self._slots = slots
        self._memory: dict[str, Memory] = {}
        self._parts: dict[str, Tensor] = {}
        self._examples = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self._free = list(range(slots))  # the lowest first, so that used ones stay together
        for name, tensor in tensors.items():
            self._memory[name] = allocate(slots * tensor.nbytes)

    @property
    def backed_bytes(self) -> int:
        return sum(memory.backed_bytes for memory in self._memory.values())

    def fill(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy an expert into a free slot, and return its number."""
        slot = heapq.heappop(self._free)
        backed: list[str] = []
        try:
            for name, memory in self._memory.items():
                memory.back(*self._range(name, slot))
                backed.append(name)
            for name, memory in self._memory.items():
                if name not in self._parts:
                    shape, dtype = self._examples[name]
                    self._parts[name] = memory.tensor((self._slots, *shape), dtype)
                self._parts[name][slot].copy_(tensors[name])
        except BaseException:
            self._release(slot, backed)
            raise
        return slot

    def free(self, slot: int) -> None:
        self._release(slot, list(self._memory))

    def part(self, name: str) -> Tensor | None:
        """Return all slots of one part of the experts, or None if they have no such part."""
        return self._parts.get(name)

    def close(self) -> None:
        self._parts.clear()
        for memory in self._memory.values():
            memory.close()

    def _release(self, slot: int, names: list[str]) -> None:
        for name in names:
            self._memory[name].release(*self._range(name, slot))
        heapq.heappush(self._free, slot)

    def _range(self, name: str, slot: int) -> tuple[int, int]:
        shape, dtype = self._examples[name]
        size = math.prod(shape) * dtype.itemsize
        return slot * size, size


class DeviceSlab:
    """Experts by layer, number and version. One thread at a time writes; others read meanwhile."""

    def __init__(
        self,
        layers: Mapping[int, SlotLayer],
        device: torch.device,
        allocate: Callable[[int], Memory],
    ) -> None:
        self._layers = dict(layers)
        self._device = device
        self._allocate = allocate
        self._lock = threading.Lock()
        self._forms: dict[int, SlotForm] = {}
        self._pools: dict[object, _Pool] = {}
        self._held: dict[tuple[int, int, int], int] = {}  # (layer, expert, version): slot
        # Tables on the device, until something is written or freed.
        self._tables: dict[object, LayerSlots] = {}
        self._layer_0 = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def backed_bytes(self) -> int:
        return sum(pool.backed_bytes for pool in self._pools.values())

    def holds(self, layer: int, expert: int, version: int) -> bool:
        return (layer, expert, version) in self._held

    def versions(self, layer: int, expert: int) -> list[int]:
        return sorted(v for at, e, v in list(self._held) if (at, e) == (layer, expert))

    def write(
        self, layer: int, expert: int, tensors: Mapping[str, Tensor], *, version: int
    ) -> None:
        """Keep a version of an expert, given in its model's layout.

        Raises torch.OutOfMemoryError, with nothing kept.
        """
        slot_tensors = to_slot(
            self._form(layer).activation, tensors, transposed=self._layers[layer].form.transposed
        )
        pool = self._pool(layer, slot_tensors)
        slot = pool.fill(slot_tensors)
        with self._lock:
            self._held[layer, expert, version] = slot
            self._tables.clear()

    def read(self, layer: int, expert: int, version: int) -> dict[str, Tensor]:
        """Return copies of an expert's tensors in its model's layout. Raises KeyError."""
        slot = self._held[layer, expert, version]
        tensors = self._parts(layer, slot)
        transposed = self._layers[layer].form.transposed
        return from_slot(self._form(layer).activation, tensors, transposed=transposed)

    def free(self, layer: int, expert: int, version: int) -> None:
        """Drop a version of an expert, if it is there."""
        with self._lock:
            slot = self._held.pop((layer, expert, version), None)
            self._tables.clear()
        if slot is not None:
            self._pools[self._layers[layer].shapes, self._layers[layer].dtype].free(slot)

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

    def close(self) -> None:
        """Free all memory. Nothing may use a slot any more."""
        with self._lock:
            self._held.clear()
            self._tables.clear()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _make_layer(self, layer: int, version: int, others: Mapping[int, int]) -> LayerSlots:
        count = self._layers[layer].experts
        wanted = [(layer, e, others.get(e, version)) for e in range(count)]
        table = torch.tensor([[self._held.get(w, -1) for w in wanted]], dtype=torch.int32)
        pool = self._pools[self._layers[layer].shapes, self._layers[layer].dtype]
        up, down = pool.part("up"), pool.part("down")
        assert up is not None and down is not None, "a pool has slots once it was filled"
        return LayerSlots(
            self._form(layer),
            up,
            down,
            pool.part("up_bias"),
            pool.part("down_bias"),
            table.to(self._device),
            self._layer_0,
        )

    def _form(self, layer: int) -> SlotForm:
        if layer not in self._forms:
            self._forms[layer] = self._layers[layer].slot_form()
        return self._forms[layer]

    def _parts(self, layer: int, slot: int) -> dict[str, Tensor]:
        shape = self._layers[layer]
        pool = self._pools[shape.shapes, shape.dtype]
        parts = {name: pool.part(name) for name, _ in shape.shapes}
        return {name: part[slot] for name, part in parts.items() if part is not None}

    def _pool(self, layer: int, slot_tensors: Mapping[str, Tensor]) -> _Pool:
        shape = self._layers[layer]
        key = shape.shapes, shape.dtype
        if key not in self._pools:
            alike = [one for one in self._layers.values() if (one.shapes, one.dtype) == key]
            slots = COPIES * sum(one.experts for one in alike)
            self._pools[key] = _Pool(slot_tensors, slots, self._allocate)
        return self._pools[key]
