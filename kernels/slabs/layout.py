"""Where the experts of a model lie in a slab: computed from their shapes, without an allocator.

A slab is sparse: memory that nothing was written to takes no page. So every expert of every layer
has places of its own, whether a host holds it or not, and a place is found by arithmetic. A layer's
experts lie together, tensor by tensor, so that a kernel sees each as one array (E, ...):

    manifest | changes | slots | layer 0: up of all experts, down of all experts, ... | layer 1: ...

The manifest says all this to a process that maps the slab and knows nothing else of it. Each slot
has an entry with its generation, version, checksum and state, and a counter says how many changes
of slots have begun. Each expert has `COPIES` places, because two versions of its weights may be
there at once. A place begins on a page, so that pages can be freed and mapped one by one.

Experts on a device lie in the device's memory, in pools (`SlotPool`). Their slab holds no weights:

    manifest | changes | slots | chunks

A slot's entry gives the expert's place in its pool. A pool's memory is mapped in chunks. Each
mapped chunk has a serial number; memory that is mapped there later gets a new one. Before these
numbers stands the last one that was given, so that no later owner of the slab gives it again.
"""

from __future__ import annotations

import base64
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from ..onednn import PackedMatrix

PAGE_BYTES = mmap.PAGESIZE
COPIES = 2
CHUNK_SERIAL_BYTES = 8
# generation, version, checksum (64 bits each), state, place (32 bits each).
SLOT_ENTRY_BYTES = 32


# The last byte counts changes of this format.
_MAGIC = b"MOESLAB\x05"
_LENGTH_BYTES = 8
_CACHE_LINE = 64
# Places on a device begin at such a part of a chunk, or at so many bytes, whichever is more: then
# few places take whole chunks.
_UNITS_OF_A_CHUNK = 1024
_DEVICE_ALIGNMENT = 16


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit


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
        return _aligned(self.nbytes, PAGE_BYTES)


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


@dataclass(frozen=True, slots=True)
class SlotPool:
    """The places on a device of all experts whose tensors are alike, whatever their layer.

    Each tensor has an address range of its own, an array with one element for each place. The range
    is divided into chunks, which are numbered from ``first_chunk[tensor]``.
    """

    tensors: tuple[SlotTensor, ...]
    places: int
    chunk_bytes: int
    first_chunk: Mapping[str, int]

    @property
    def _unit(self) -> int:
        return max(self.chunk_bytes // _UNITS_OF_A_CHUNK, _DEVICE_ALIGNMENT)

    @property
    def apart(self) -> int:
        """How many places, or more, take whole chunks of each tensor's range."""
        return _aligned(self.places, self.chunk_bytes // self._unit)

    def stride_bytes(self, tensor: SlotTensor) -> int:
        """Return the distance between two places."""
        return _aligned(tensor.nbytes, self._unit)

    def chunks(self, place: int) -> list[int]:
        """Return the numbers of the chunks that a place has a part in."""
        return [
            self.first_chunk[tensor.name] + n
            for tensor in self.tensors
            for n in _chunks(place * self.stride_bytes(tensor), tensor.nbytes, self.chunk_bytes)
        ]

    def has(self, chunk: int) -> bool:
        """Return whether a chunk is one of this pool's."""
        start = min(self.first_chunk.values())
        return start <= chunk < start + sum(map(self.count_chunks, self.tensors))

    def part(self, chunk: int) -> tuple[SlotTensor, int]:
        """Return the tensor whose range has a chunk, and the chunk's number within the range."""
        started = [t for t in self.tensors if self.first_chunk[t.name] <= chunk]
        tensor = max(started, key=lambda tensor: self.first_chunk[tensor.name])
        return tensor, chunk - self.first_chunk[tensor.name]

    def count_chunks(self, tensor: SlotTensor) -> int:
        return len(_chunks(0, self.places * self.stride_bytes(tensor), self.chunk_bytes))


def _chunks(start: int, nbytes: int, chunk_bytes: int) -> range:
    """Return which chunks of a range of addresses have a part of these bytes."""
    return range(start // chunk_bytes, (start + nbytes - 1) // chunk_bytes + 1)


class SlabLayout:
    """The places of all experts of a model: {layer: its layout}."""

    def __init__(
        self,
        layers: Mapping[int, LayerLayout],
        about: Mapping[str, Any] | None = None,
        *,
        chunk_bytes: int = 0,
        device: str = "cpu",
    ) -> None:
        """``about`` is what else the manifest says, in JSON's types: which model this is.

        With ``chunk_bytes`` the experts lie on a device, in chunks of so many bytes. All processes
        know the device by the name ``device``.
        """
        self.layers = dict(layers)
        self.about = dict(about or {})
        self.chunk_bytes = chunk_bytes
        self.device = device
        self.manifest = _encode(self)
        manifest_end = len(_MAGIC) + _LENGTH_BYTES + len(self.manifest)
        self.changes_start = _aligned(manifest_end, _CACHE_LINE)
        self.entries_start = self.changes_start + _CACHE_LINE
        self.slots = COPIES * sum(layer.experts for layer in layers.values())
        self._first_slot: dict[int, int] = {}
        self._regions: dict[tuple[int, str], int] = {}
        slot = 0
        for number, layer in self.layers.items():
            self._first_slot[number] = slot
            slot += COPIES * layer.experts
        offset = _aligned(self.entries_start + self.slots * SLOT_ENTRY_BYTES, PAGE_BYTES)
        self.last_serial_start = offset
        self.chunks_start = offset + CHUNK_SERIAL_BYTES  # of the serial numbers of chunks
        self.pools, self.chunks = _pools(self.layers, chunk_bytes) if chunk_bytes else ([], 0)
        if chunk_bytes:
            offset += _aligned((1 + self.chunks) * CHUNK_SERIAL_BYTES, PAGE_BYTES)
        for number, layer in self.layers.items() if not chunk_bytes else ():
            for tensor in layer.tensors:
                self._regions[number, tensor.name] = offset
                offset += COPIES * layer.experts * tensor.stride_bytes
        self.nbytes = offset

    @classmethod
    def read(cls, memory: memoryview) -> SlabLayout:
        """Read the layout of a slab that another process made. Raises ValueError."""
        start = len(_MAGIC) + _LENGTH_BYTES
        if bytes(memory[: len(_MAGIC)]) != _MAGIC:
            raise ValueError("the memory does not begin as a slab of this version does")
        length = int.from_bytes(memory[len(_MAGIC) : start], "little")
        if length > len(memory) - start:
            raise ValueError(f"the manifest has {length} bytes, more than the slab")
        try:
            named = json.loads(bytes(memory[start : start + length]))
            layout = cls(
                _decode(named),
                named["about"],
                chunk_bytes=named["chunk_bytes"],
                device=named["device"],
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"the manifest cannot be read: {error}") from error
        if layout.nbytes != len(memory):
            raise ValueError(
                f"the manifest describes {layout.nbytes} bytes, but the slab has {len(memory)}"
            )
        return layout

    def header(self) -> bytes:
        """Return the first bytes of a slab with this layout."""
        return _MAGIC + len(self.manifest).to_bytes(_LENGTH_BYTES, "little") + self.manifest

    def slot(self, layer: int, expert: int, copy: int = 0) -> int:
        """Return the number of an expert's slot among all slots of the slab."""
        experts = self.layers[layer].experts
        if not (0 <= expert < experts and 0 <= copy < COPIES):
            raise IndexError(f"layer {layer} has no place for copy {copy} of expert {expert}")
        return self._first_slot[layer] + copy * experts + expert

    def pool(self, layer: int) -> SlotPool:
        """Return the pool of a layer whose experts lie on a device."""
        tensors = self.layers[layer].tensors
        return next(pool for pool in self.pools if pool.tensors == tensors)

    def place_in_layer(self, layer: int, expert: int, copy: int = 0) -> int:
        """Return the number of an expert's place among those of its layer."""
        return self.slot(layer, expert, copy) - self._first_slot[layer]

    def place(self, slot: int) -> tuple[int, int, int]:
        """Return the layer, the expert and the copy of a slot, by its number."""
        layer, first = max(
            ((number, first) for number, first in self._first_slot.items() if first <= slot),
            key=lambda found: found[1],
        )
        copy, expert = divmod(slot - first, self.layers[layer].experts)
        return layer, expert, copy

    def offset(self, layer: int, tensor: SlotTensor, expert: int, copy: int = 0) -> int:
        """Return where a tensor of an expert begins, in bytes."""
        place = self.place_in_layer(layer, expert, copy)
        return self._regions[layer, tensor.name] + place * tensor.stride_bytes


def _pools(layers: Mapping[int, LayerLayout], chunk_bytes: int) -> tuple[list[SlotPool], int]:
    """Return the pools of a device's experts, and the number of their chunks."""
    places: dict[tuple[SlotTensor, ...], int] = {}
    for layer in layers.values():
        places[layer.tensors] = places.get(layer.tensors, 0) + COPIES * layer.experts
    pools, chunk = [], 0
    for tensors, count in places.items():
        first: dict[str, int] = {}
        pool = SlotPool(tensors, count, chunk_bytes, first)
        for tensor in tensors:
            first[tensor.name] = chunk
            chunk += pool.count_chunks(tensor)
        pools.append(pool)
    return pools, chunk


def _encode(layout: SlabLayout) -> bytes:
    """Return JSON; layers that are alike share a form."""
    forms: list[LayerLayout] = []
    for layer in layout.layers.values():
        if layer not in forms:
            forms.append(layer)
    named = {
        "about": layout.about,
        "chunk_bytes": layout.chunk_bytes,
        "device": layout.device,
        # Packed layouts are of one version of PyTorch.
        "torch": torch.__version__,
        "forms": [
            {
                "experts": form.experts,
                "fused": form.fused,
                "tensors": [_encode_tensor(tensor) for tensor in form.tensors],
            }
            for form in forms
        ],
        "layers": [[number, forms.index(layer)] for number, layer in layout.layers.items()],
    }
    return json.dumps(named).encode()


def _encode_tensor(tensor: SlotTensor) -> dict[str, Any]:
    packed = tensor.packed
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "packing": tensor.packing.value,
        "bytes": tensor.nbytes,
        "descriptor": None if packed is None else base64.b64encode(packed.descriptor).decode(),
    }


def _decode(named: Mapping[str, Any]) -> dict[int, LayerLayout]:
    if not isinstance(named["chunk_bytes"], int) or named["chunk_bytes"] < 0:
        raise ValueError(f"chunk_bytes: {named['chunk_bytes']}")
    if named["torch"] != torch.__version__:
        raise ValueError(f"torch {named['torch']} wrote it, and this is torch {torch.__version__}")
    forms = [
        LayerLayout(
            form["experts"], tuple(map(_decode_tensor, form["tensors"])), fused=form["fused"]
        )
        for form in named["forms"]
    ]
    if not all(isinstance(form.experts, int) and form.experts > 0 for form in forms):
        raise ValueError("experts: a layer needs at least one")
    return {number: forms[form] for number, form in named["layers"]}


def _decode_tensor(given: Mapping[str, Any]) -> SlotTensor:
    shape, dtype = tuple(given["shape"]), getattr(torch, given["dtype"])
    if not isinstance(dtype, torch.dtype) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{given['name']}: shape {shape} and dtype {given['dtype']}")
    if not isinstance(given["bytes"], int) or given["bytes"] < 1:
        raise ValueError(f"{given['name']}: {given['bytes']} bytes")
    packed = None
    if given["descriptor"] is not None:
        descriptor = base64.b64decode(given["descriptor"], validate=True)
        packed = PackedMatrix(shape, dtype, given["bytes"], descriptor)
    return SlotTensor(given["name"], shape, dtype, Packing(given["packing"]), packed)
