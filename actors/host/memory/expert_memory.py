"""The memory in which a host keeps one model's experts: the CPU's, or a device's."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ....cluster.expert_keys import ExpertKey, ExpertVersion
from ....kernels import onednn
from ....kernels.ffn import ExpertForm, ExpertWeights, can_pack, pack, unpack
from ....kernels.slabs.bounded_memory import MemoryBudget
from ....kernels.slabs.device_memory import CHUNK_BYTES, DeviceMemory
from ....kernels.slabs.device_pool import Memory
from ....kernels.slabs.device_slab import DeviceSlab, SlotLayer
from ....kernels.slabs.layer_arithmetic import CpuLayer, DeviceLayer, LayerArithmetic
from ....kernels.slabs.layout import COPIES, LayerLayout, SlabLayout
from ....kernels.slabs.slab import Slab, layer_layout
from ....models.trunk.experts_layers import ExpertsLayer, expert_shapes
from ....proto.errors import Busy, NotHere
from ...runtime.devices import device_name
from .kept_memory import LeftMemory

_NO_CHUNKS: Mapping[int, int] = {}


class ExpertMemory(Protocol):
    """One model's experts. Control threads keep and drop them while the loop computes."""

    @property
    def nbytes(self) -> int:
        """The size of the experts that are held."""
        ...

    def keep(self, given: ExpertVersion, form: ExpertForm, weights: ExpertWeights) -> None:
        """Keep an expert. Raises Busy while there is no room for it, or its version."""
        ...

    def reading(self, wanted: ExpertVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Give an expert's tensors, in its model's layout, inside of the block alone.

        Meanwhile no expert is kept or dropped. Raises NotHere.
        """
        ...

    def drop(self, gone: ExpertVersion) -> None:
        """Free an expert's memory, if it is there."""
        ...

    def layer(self, layer: int, version: int, others: Mapping[int, int]) -> LayerArithmetic:
        """Return the arithmetic of what is held of ``version``, or for ``others`` of theirs."""
        ...

    def lend(self) -> int | None:
        """Return a descriptor of the memory for routers to read, or None if there is none yet.

        The caller closes it.
        """
        ...

    def chunks(self) -> Mapping[int, int]:
        """Return {number: serial} of the parts of a device's memory, which are lent one by one.

        It is the same object as long as nothing has changed.
        """
        ...

    def lend_chunk(self, number: int, serial: int) -> int | None:
        """Return a descriptor of such a part, or None if it has gone; the caller closes it."""
        ...

    @property
    def descriptor(self) -> int | None:
        """The memory itself, for a successor of this process; None if there is none yet."""
        ...

    def adopt(self, left: LeftMemory, forms: Mapping[int, ExpertForm]) -> list[ExpertVersion]:
        """Take over the memory of an earlier process, and return what is held now.

        Only layers that have one of ``forms`` are held. Raises ValueError for memory that this
        process would not have made so, and RuntimeError if it cannot be mapped.
        """
        ...

    def is_sound(self, held: ExpertVersion) -> bool:
        """Return whether an expert still has the bytes that were written, or has left."""
        ...

    def keep_spare(self, stays: bool) -> None:
        """Let memory of versions that are dropped wait for the next ones, or return it."""
        ...

    def close(self) -> None: ...


class SlabMemory:
    """Experts in a slab of shared memory, in the layout of the kernel that computes them."""

    def __init__(
        self,
        name: str,
        layers: Mapping[int, ExpertsLayer],
        dtype: torch.dtype,
        about: Mapping[str, Any] | None = None,
        *,
        learns: bool = False,
    ) -> None:
        """``about`` names the model in the memory itself, for a successor of this process.

        ``learns``: the experts are trained. They lie as in the model, so that backward calls can
        read them, which with many rows is as fast (`kernels/backward/`).
        """
        self._learns = learns
        self._keeps_spare = False
        self._name = name
        self._layers = layers
        self._dtype = dtype
        self._about = about
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # slots are written by one thread at a time
        self._slab: Slab | None = None
        self._closed = False
        self._forms: dict[int, ExpertForm] = {}
        # {layer: {version: {expert: its weights}}}
        self._experts: dict[int, dict[int, dict[int, ExpertWeights]]] = {}

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(
                weights.nbytes
                for versions in self._experts.values()
                for experts in versions.values()
                for weights in experts.values()
            )

    def keep(self, given: ExpertVersion, form: ExpertForm, weights: ExpertWeights) -> None:
        key, version = given
        packed = weights if self._learns else _in_layout(form, weights)
        with self._writing:
            if self._closed:
                raise NotHere(f"{given}: another model has taken the place of its own")
            kept = self._write(given, packed)
        with self._lock:
            self._forms[key.layer] = form
            versions = self._experts.setdefault(key.layer, {})
            versions.setdefault(version, {})[key.expert] = kept

    @contextmanager
    def reading(self, wanted: ExpertVersion) -> Iterator[Mapping[str, Tensor]]:
        key, version = wanted
        with self._writing:
            weights = self._experts.get(key.layer, {}).get(version, {}).get(key.expert)
            if weights is None:
                raise NotHere(f"{wanted} is not on this host")
            yield unpack(self._forms[key.layer], weights).tensors()

    def drop(self, gone: ExpertVersion) -> None:
        key, version = gone
        place = key.layer, key.expert
        with self._writing, self._lock:
            versions = self._experts.get(key.layer, {})
            dropped = versions.get(version, {}).pop(key.expert, None)
            slab = self._slab
            if dropped is None or slab is None:
                return
            copy = slab.copy_of(*place, version)
            if copy is None:
                return
            # Training makes a version in each step, and writing into fresh memory takes longer: it
            # stays for the next one as long as the host has the expert.
            others = [c for c in range(COPIES) if c != copy and slab.version(*place, c) is not None]
            stays = self._keeps_spare and bool(others)
            slab.free(*place, copy, keep_memory=stays)
            if self._keeps_spare and not others:
                for other in range(COPIES):
                    slab.release(*place, other)

    def keep_spare(self, stays: bool) -> None:
        with self._writing:
            self._keeps_spare, slab = stays, self._slab
        if stays or slab is None:
            return
        for number, layer in slab.layout.layers.items():
            with self._writing:
                for expert in range(layer.experts):
                    for copy in range(COPIES):
                        slab.release(number, expert, copy)

    def adopt(self, left: LeftMemory, forms: Mapping[int, ExpertForm]) -> list[ExpertVersion]:
        with self._writing, self._lock:
            if self._slab is not None:
                raise ValueError("experts of the model were loaded meanwhile")
            slab = Slab.adopt(os.dup(left.descriptor))
            if slab.layout.layers != self._layouts():
                slab.close()
                raise ValueError(
                    "its experts lie there in another layout than that of this process"
                )
            self._slab = slab
            self._forms.update(forms)
            held = []
            for layer, expert, copy, version in slab.filled():
                if layer not in forms:
                    slab.free(layer, expert, copy)
                    continue
                versions = self._experts.setdefault(layer, {})
                versions.setdefault(version, {})[expert] = slab.view(layer, expert, copy)
                held.append(ExpertVersion(ExpertKey(self._name, layer, expert), version))
            return held

    def is_sound(self, held: ExpertVersion) -> bool:
        key, version = held
        slab = self._slab
        copy = None if slab is None else slab.copy_of(key.layer, key.expert, version)
        if slab is None or copy is None:
            return True
        generation = slab.generation(key.layer, key.expert, copy)
        if generation % 2:
            return True  # it is leaving
        sound = slab.is_sound(key.layer, key.expert, copy)
        return sound or slab.generation(key.layer, key.expert, copy) != generation

    def layer(self, layer: int, version: int, others: Mapping[int, int]) -> CpuLayer:
        versions = self._experts[layer]
        experts: Mapping[int, ExpertWeights] = versions.get(version, {})
        if others:
            found = {e: versions.get(v, {}).get(e) for e, v in others.items()}
            experts = {**experts, **{e: w for e, w in found.items() if w is not None}}
        return CpuLayer(self._forms[layer], experts)

    def lend(self) -> int | None:
        with self._lock:
            return None if self._slab is None else self._slab.lend()

    def chunks(self) -> Mapping[int, int]:
        return _NO_CHUNKS

    def lend_chunk(self, number: int, serial: int) -> int | None:
        return None

    @property
    def descriptor(self) -> int | None:
        with self._lock:
            return None if self._slab is None else self._slab.descriptor

    def close(self) -> None:
        """Let the memory go with the last expert that still lies in it."""
        with self._writing, self._lock:
            self._closed = True
            self._experts.clear()
            if self._slab is not None:
                # Another model may come under this one's name, with the same versions.
                self._slab.retire()
                self._slab.close()
                self._slab = None

    def _layouts(self) -> dict[int, LayerLayout]:
        return _layouts(self._layers, self._dtype, packed=not self._learns)

    def _write(self, given: ExpertVersion, weights: ExpertWeights) -> ExpertWeights:
        key, version = given
        if self._slab is None:
            self._slab = Slab.create(self._name, SlabLayout(self._layouts(), self._about))
        slab, place = self._slab, (key.layer, key.expert)
        copy = slab.copy_of(*place, version)
        if copy is not None:
            # The controller's load and a trunk's put may bring the same expert at the same time,
            # and the first of them may be served by now.
            if slab.holds(*place, weights, copy):
                return slab.view(*place, copy)
            # What an interrupted load left here was never served.
            slab.free(*place, copy)
        copy = slab.free_copy(*place)
        if copy is None:
            raise _no_room(given, [slab.version(*place, one) for one in range(COPIES)])
        return slab.write(*place, weights, version=version, copy=copy)


class SlotMemory:
    """Experts in slots of a device's memory."""

    def __init__(
        self,
        name: str,
        layers: Mapping[int, ExpertsLayer],
        dtype: torch.dtype,
        device: torch.device,
        about: Mapping[str, Any] | None = None,
        allocate: Callable[[int], Memory] | None = None,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        budget: MemoryBudget | None = None,
    ) -> None:
        """``about`` names the model in the memory itself, for a successor of this process.

        ``allocate`` returns ranges of the device's addresses (None: of a CUDA device). ``budget``
        is of all memory of the host's experts; None: this memory has its own, unlimited.
        """
        self._name = name
        self._shapes = {
            number: SlotLayer(
                layer.num_experts,
                layer.form(),
                bool(layer.module.has_gate),
                tuple(expert_shapes(layer).items()),
                dtype,
            )
            for number, layer in layers.items()
        }
        self._device = device
        self._allocate = (budget or MemoryBudget()).bound(
            allocate or (lambda nbytes: DeviceMemory(device, nbytes))
        )
        self._of_device = {"chunk_bytes": chunk_bytes, "device_name": device_name(device)}
        self._slab = DeviceSlab.create(
            name, self._shapes, device, self._allocate, about=about, **self._of_device
        )
        self._sizes = {
            number: sum(torch.Size(shape).numel() for _, shape in layer.shapes) * dtype.itemsize
            for number, layer in self._shapes.items()
        }
        self._writing = threading.Lock()  # slots are written by one thread at a time
        self._held: set[ExpertVersion] = set()

    @property
    def nbytes(self) -> int:
        return sum(self._sizes[held.key.layer] for held in list(self._held))

    def keep(self, given: ExpertVersion, form: ExpertForm, weights: ExpertWeights) -> None:
        key, version = given
        with self._writing:
            if given in self._held:
                # The controller's load and a trunk's put may bring the same expert at the same
                # time, and the first of them may be served by now.
                there = self._slab.read(key.layer, key.expert, version)
                given_tensors = {n: t.to(self._device) for n, t in weights.tensors().items()}
                if all(torch.equal(t, given_tensors[name]) for name, t in there.items()):
                    return
                # What an interrupted load left here was never served.
                self._slab.free(key.layer, key.expert, version)
                self._held.discard(given)
            there = self._slab.versions(key.layer, key.expert)
            if len(there) >= COPIES:
                raise _no_room(given, there)
            try:
                self._slab.write(key.layer, key.expert, weights.tensors(), version=version)
            except torch.OutOfMemoryError as error:
                raise Busy(f"{given}: no room on this host's GPU: {error}") from error
            self._held.add(given)

    @contextmanager
    def reading(self, wanted: ExpertVersion) -> Iterator[Mapping[str, Tensor]]:
        key, version = wanted
        with self._writing:
            if wanted not in self._held:
                raise NotHere(f"{wanted} is not on this host")
            yield self._slab.read(key.layer, key.expert, version)

    def drop(self, gone: ExpertVersion) -> None:
        key, version = gone
        with self._writing:
            self._held.discard(gone)
            self._slab.free(key.layer, key.expert, version)

    def layer(self, layer: int, version: int, others: Mapping[int, int]) -> DeviceLayer:
        return DeviceLayer(self._slab.layer(layer, version, others))

    def in_models_layout(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors that lie as those of an expert in its slot."""
        return self._slab.in_models_layout(layer, tensors)

    def lend(self) -> int | None:
        with self._writing:
            return self._slab.lend() if self._held else None

    def chunks(self) -> Mapping[int, int]:
        return self._slab.chunks()

    def lend_chunk(self, number: int, serial: int) -> int | None:
        return self._slab.lend_chunk(number, serial)

    @property
    def descriptor(self) -> int | None:
        return self._slab.descriptor if self._slab.descriptor >= 0 else None

    def adopt(self, left: LeftMemory, forms: Mapping[int, ExpertForm]) -> list[ExpertVersion]:
        with self._writing:
            if self._held:
                raise ValueError("experts of the model were loaded meanwhile")
            slab = DeviceSlab.adopt(
                *left.take(), self._shapes, self._device, self._allocate, **self._of_device
            )
            self._slab.close()
            self._slab = slab
            for layer, expert, version in slab.filled():
                if layer in forms:
                    self._held.add(ExpertVersion(ExpertKey(self._name, layer, expert), version))
                else:
                    slab.free(layer, expert, version)
            return sorted(self._held)

    def is_sound(self, held: ExpertVersion) -> bool:
        key, version = held
        with self._writing:  # so that it is not freed meanwhile
            return held not in self._held or self._slab.is_sound(key.layer, key.expert, version)

    def keep_spare(self, stays: bool) -> None:
        """Do nothing: the slots of a card all keep their memory."""

    def close(self) -> None:
        with self._writing:
            self._held.clear()
            self._slab.close()


def _no_room(given: ExpertVersion, versions: list[int | None] | list[int]) -> Busy:
    there = " and ".join(map(str, versions))
    return Busy(
        f"{given}: this host has versions {there} of it and no room for a third; send it "
        "again when no router uses the older one any more"
    )


def _in_layout(form: ExpertForm, weights: ExpertWeights) -> ExpertWeights:
    """Return an expert in the layout of the kernel that will compute it on this CPU."""
    if can_pack(torch.device("cpu"), weights.up.dtype) and onednn.available():
        return pack(form, weights)
    return weights


def _layouts(
    layers: Mapping[int, ExpertsLayer], dtype: torch.dtype, *, packed: bool
) -> dict[int, LayerLayout]:
    """Return how the experts of each layer lie in memory.

    Layers whose experts have the same shapes and arithmetic share the result of one trial.
    """
    known: dict[object, LayerLayout] = {}
    found = {}
    for number, layer in layers.items():
        form, shapes = layer.form(), expert_shapes(layer)
        alike = (layer.num_experts, tuple(shapes.items()), form.transposed, type(layer.module))
        if alike not in known:
            blank = ExpertWeights.of({n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()})
            example = _in_layout(form, blank) if packed else blank
            known[alike] = layer_layout(layer.num_experts, example)
        found[number] = known[alike]
    return found
