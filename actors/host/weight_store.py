"""The weights that a host holds: read from a checkpoint, or sent by a peer or a trunk.

`ExpertStore` keeps them; `ServedWeights` lets calls use what has been sent.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cluster.expert_keys import FIRST_VERSION, SHARED, ExpertKey, ExpertVersion, LayerKey
from ...cluster.host.residency import LayerShape, Residency
from ...cluster.placement import ModelRef
from ...cluster.update_folder import UpdateFolder
from ...kernels.ffn import ExpertForm, ExpertWeights, all_finite
from ...kernels.slabs.bounded_memory import MemoryBudget
from ...kernels.slabs.layer_arithmetic import LayerArithmetic
from ...models.folder.expert_file import read_expert
from ...models.trunk.checkpoint import Checkpoint
from ...models.trunk.config import config_from_dict, read_config, torch_dtype
from ...models.trunk.experts_layers import (
    ExpertsLayer,
    expert_shapes,
    experts_layers,
    shared_shapes,
)
from ...models.trunk.trunk import meta_model
from ...proto.errors import CallError, CheckpointError, Forbidden, NotHere
from .memory.expert_memory import ExpertMemory, SlabMemory, SlotMemory
from .memory.kept_memory import LeftMemory

# Upper bound for a safetensors header: per tensor (besides its name), and for the rest of it.
_HEADER_BYTES = 256


class HostedModel:
    """One model on a host: the layers that have experts, and the memory of those that are held.

    It has no checkpoint: its experts come from a peer or a trunk.
    """

    def __init__(
        self,
        ref: ModelRef,
        layers: Mapping[int, ExpertsLayer],
        device: torch.device,
        about: Mapping[str, Any],
        budget: MemoryBudget | None = None,
    ) -> None:
        """``about`` is what the memory says of the model, for a successor of this process.

        ``budget`` is of all memory of the host's experts on a device.
        """
        self.ref = ref
        self.layers = layers
        dtype = torch_dtype(ref.dtype)
        self.memory: ExpertMemory = (
            SlabMemory(ref.name, layers, dtype, about, learns=ref.learns)
            if device.type == "cpu"
            else SlotMemory(ref.name, layers, dtype, device, about, budget=budget)
        )

    def form(self, layer: int) -> ExpertForm:
        return self.layers[layer].form()

    def read(self, wanted: ExpertVersion) -> ExpertWeights:
        """Read one expert from a file. Raises NotHere and CheckpointError."""
        raise NotHere(
            f"model {self.ref.name!r} has no checkpoint; only a peer or a trunk has its experts"
        )

    def shape(self, layer: int) -> LayerShape:
        experts = self.layers[layer]
        return LayerShape(
            num_experts=experts.num_experts,
            hidden_size=experts.hidden_size,
            dtype=self.ref.dtype,
        )


class _FolderModel(HostedModel):
    """A model with a checkpoint, and perhaps a folder with later versions of its experts."""

    def __init__(
        self,
        ref: ModelRef,
        folder: Path,
        device: torch.device,
        about: Mapping[str, Any],
        budget: MemoryBudget | None,
    ) -> None:
        self._checkpoint = Checkpoint(folder, read_config(folder), dtype=torch_dtype(ref.dtype))
        super().__init__(ref, self._checkpoint.layers, device, about, budget)

    def read(self, wanted: ExpertVersion) -> ExpertWeights:
        key, version = wanted
        if version == FIRST_VERSION:
            return self._checkpoint.read(key.layer, key.expert)
        if self.ref.updates is None:
            raise NotHere(f"{wanted} is not in the checkpoint, which has version {FIRST_VERSION}")
        file = UpdateFolder(self.ref.updates, key.model).weights(version)
        dtype = torch_dtype(self.ref.dtype)
        tensors = {n: t.to(dtype) for n, t in read_expert(file, key.layer, key.expert).items()}
        try:
            _check(key, self.layers[key.layer], tensors, dtype)
        except CallError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return ExpertWeights.of(tensors)


class _MemoryModel(HostedModel):
    """A model of which only the configuration is known."""

    def __init__(
        self,
        ref: ModelRef,
        device: torch.device,
        about: Mapping[str, Any],
        budget: MemoryBudget | None,
    ) -> None:
        # Keeps the layers' modules alive, which the model owns.
        self._owner = meta_model(config_from_dict(dict(ref.config)))
        layers = {layer.layer: layer for layer in experts_layers(self._owner)}
        super().__init__(ref, layers, device, about, budget)


def open_model(
    ref: ModelRef,
    device: torch.device,
    about: Mapping[str, Any],
    budget: MemoryBudget | None = None,
) -> HostedModel:
    """Return a model without any expert. Raises CheckpointError and UnsupportedModel."""
    if ref.path is None:
        return _MemoryModel(ref, device, about, budget)
    return _FolderModel(ref, Path(ref.path), device, about, budget)


OpenModel = Callable[[ModelRef, torch.device, Mapping[str, Any]], HostedModel]


class ExpertStore:
    """The experts of one host. Thread-safe: control threads add and remove, the loop reads."""

    def __init__(self, device: torch.device, open_model: OpenModel = open_model) -> None:
        """``open_model`` finds out what there is to know of a model, without its weights."""
        self.device = device
        self._open_model = open_model
        self._lock = threading.Lock()
        # Two who tell of one model at once must not both make it: one's experts would be lost.
        self._adding = threading.Lock()
        self._models: dict[str, HostedModel] = {}
        self._forms: dict[LayerKey, ExpertForm] = {}

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(model.memory.nbytes for model in self._models.values())

    def add_model(self, ref: ModelRef, about: Mapping[str, Any] | None = None) -> None:
        """Register a model, so that its experts can be loaded or put.

        ``about`` is what the memory of its experts says of the model, for a successor. Raises
        CheckpointError and UnsupportedModel.
        """
        with self._adding:
            with self._lock:
                known = self._models.get(ref.name)
            if known is not None and known.ref == ref:
                return
            model = self._open_model(ref, self.device, about or {})
            with self._lock:
                self._models[ref.name] = model
            if known is not None:
                known.memory.close()

    def remove_model(self, name: str) -> None:
        """Forget a model and free its memory; call it when the loop has released its experts."""
        with self._adding:
            with self._lock:
                model = self._models.pop(name, None)
                self._forms = {key: one for key, one in self._forms.items() if key.model != name}
            if model is not None:
                model.memory.close()

    def adopt(
        self, ref: ModelRef, about: Mapping[str, Any], left: LeftMemory
    ) -> dict[ExpertVersion, LayerShape]:
        """Register a model with the memory that an earlier process has left of it.

        Returns the experts that are there. Raises ValueError and RuntimeError for memory that this
        process cannot use, and CheckpointError and UnsupportedModel.
        """
        model = self._open_model(ref, self.device, about)
        try:
            forms = {number: model.form(number) for number in model.layers}
            held = model.memory.adopt(left, forms)
        except BaseException:
            model.memory.close()
            raise
        with self._lock:
            self._models[ref.name] = model
            self._forms.update({LayerKey(ref.name, n): form for n, form in forms.items()})
        return {one: model.shape(one.key.layer) for one in held}

    def load(self, wanted: ExpertVersion) -> LayerShape:
        """Read one expert from its model's checkpoint, or a later version from its updates.

        Raises CheckpointError, NotHere, and CallError for an expert that its model lacks.
        """
        model, _ = self._layer(wanted.key)
        return self._keep(wanted, model.read(wanted))

    def most_bytes(self, key: ExpertKey) -> int:
        """Return the largest size of a safetensors file that `put` would accept for ``key``.

        Raises NotHere and CallError.
        """
        shapes, dtype = self.expert_forms(key)
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        # The file's JSON header has each tensor's name, dtype, shape and offsets.
        return sum(sizes.values()) + sum(map(len, sizes)) + _HEADER_BYTES * (1 + len(sizes))

    def expert_forms(self, key: ExpertKey) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
        """Return the shapes of an expert's tensors by name, and their type.

        Those of `SHARED` are the ones that each expert of the layer has a copy of. Raises NotHere
        and CallError.
        """
        model, layer = self._layer(key)
        shapes = shared_shapes(layer) if key.expert == SHARED else expert_shapes(layer)
        return shapes, torch_dtype(model.ref.dtype)

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> LayerShape:
        """Keep an expert that was sent to this host.

        Raises CallError for tensors that misfit, and Busy while there is no room for a version.
        """
        self.check(given.key, tensors)
        return self._keep(given, ExpertWeights.of(tensors))

    def check(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """Check whether `put` would accept ``tensors`` as ``key``.

        Raises NotHere for an unknown model, and CallError for an expert or tensors that misfit.
        """
        model, layer = self._layer(key)
        if key.expert == SHARED:
            raise CallError(f"{key}: each expert has a copy of them, and none comes without")
        _check(key, layer, tensors, torch_dtype(model.ref.dtype))

    @contextmanager
    def reading(self, wanted: ExpertVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give the tensors of an expert, as `put` accepts them, inside of the block alone.

        Meanwhile none is kept or dropped. Raises NotHere and CallError.
        """
        model, _ = self._layer(wanted.key)
        with model.memory.reading(wanted) as tensors:
            yield tensors

    def get(self, wanted: ExpertVersion) -> dict[str, Tensor]:
        """Return copies of what `reading` gives."""
        with self.reading(wanted) as tensors:
            return {name: tensor.clone() for name, tensor in tensors.items()}

    def drop(self, gone: ExpertVersion) -> None:
        """Forget an expert and free its memory; call it when the loop has released the expert."""
        with self._lock:
            model = self._models.get(gone.key.model)
        if model is not None:
            model.memory.drop(gone)

    def keep_spare(self, name: str, stays: bool) -> None:
        """Let memory of a model's dropped versions wait for the next ones, or return it."""
        with self._lock:
            model = self._models.get(name)
        if model is not None:
            model.memory.keep_spare(stays)

    def is_sound(self, held: ExpertVersion) -> bool:
        """Return whether an adopted expert has the bytes that were written, or has left."""
        return self._model(held.key.model).memory.is_sound(held)

    def close(self) -> None:
        """Free all experts."""
        with self._lock:
            for model in self._models.values():
                model.memory.close()

    def memories(self) -> list[tuple[str, ExpertMemory]]:
        """Return each model's name and memory."""
        with self._lock:
            return [(name, model.memory) for name, model in self._models.items()]

    def layer(self, key: LayerKey, version: int, others: Mapping[int, int]) -> LayerArithmetic:
        """Return the arithmetic of a layer with the experts of ``version`` that are held.

        ``others`` has the experts of another version, which is used for them.
        """
        return self._models[key.model].memory.layer(key.layer, version, others)

    def in_models_layout(self, key: LayerKey, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of tensors that lie as those of a layer's experts in slots of a device.

        Raises NotHere.
        """
        memory = self._model(key.model).memory
        assert isinstance(memory, SlotMemory), f"{key}: its experts are not in slots"
        return memory.in_models_layout(key.layer, tensors)

    def check_trainable(self, model: str, key: ExpertKey | None = None) -> None:
        """Raise CallError for a model, or one key of it, without a backward pass where it lies."""
        with self._lock:
            found = self._models.get(model)
        if found is None or not isinstance(found.memory, SlotMemory):
            return
        if torch_dtype(found.ref.dtype) == torch.float64:
            raise CallError(
                f"dtype of {model!r}: hosts on GPUs train no float64 experts; use float32, or "
                "hosts with device: cpu"
            )
        if key is not None and key.expert == SHARED:
            raise CallError(
                f"{key}: hosts on GPUs train no post-expert norms; freeze them, or use hosts with "
                "device: cpu"
            )

    def count_experts(self, key: LayerKey) -> int:
        """Return how many experts a layer has. Raises NotHere and CallError."""
        _, layer = self._layer(key.expert(SHARED))
        return layer.num_experts

    def is_gated(self, key: LayerKey) -> bool:
        """Return whether the up-projection of a layer's experts has gates. Raises NotHere."""
        return bool(self._model(key.model).layers[key.layer].module.has_gate)

    def _model(self, name: str) -> HostedModel:
        with self._lock:
            if name not in self._models:
                raise NotHere(f"model {name!r} is unknown to this host")
            return self._models[name]

    def _layer(self, key: ExpertKey) -> tuple[HostedModel, ExpertsLayer]:
        model = self._model(key.model)
        layer = model.layers.get(key.layer)
        if layer is None:
            raise CallError(f"layer: {key.model!r} has no experts in layer {key.layer}")
        if key.expert != SHARED and not 0 <= key.expert < layer.num_experts:
            raise CallError(
                f"expert: {key.expert} is not in layer {key.layer} of {key.model!r}, which has "
                f"{layer.num_experts} experts"
            )
        return model, layer

    def _keep(self, given: ExpertVersion, weights: ExpertWeights) -> LayerShape:
        key = given.key
        model, layer = self._model(key.model), LayerKey(key.model, key.layer)
        if layer not in self._forms:
            self._forms[layer] = model.form(key.layer)
        model.memory.keep(given, self._forms[layer], weights)
        return model.shape(key.layer)


class ServedWeights:
    """Lets a host's calls use weights that were sent to it or made in training; thread-safe."""

    def __init__(
        self,
        host: str,
        store: ExpertStore,
        residency: Residency,
        hold: Callable[[Mapping[ExpertVersion, LayerShape]], None],
    ) -> None:
        """``host`` is the host's name. ``hold`` admits calls for experts that are in the store."""
        self._host = host
        self._store = store
        self._residency = residency
        self._hold = hold
        # Two puts must not interleave between the check of what is served and the store. A
        # separate lock, so that puts do not wait for loads.
        self._putting = threading.Lock()

    def check(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        """Raise CallError for tensors that do not fit or are not finite, and NotHere."""
        self._store.check(given.key, tensors)
        for name, tensor in tensors.items():
            if not (all_finite(tensor) or tensor.isfinite().all()):
                raise CallError(f"{given}: {name} has values that are not finite")

    def serve(self, given: Iterable[tuple[ExpertVersion, Mapping[str, Tensor]]]) -> None:
        """Keep weights, and admit calls for them, if they are not served already.

        After an error those before it are served. Raises what `ExpertStore.put` raises, and
        Forbidden if other tensors are served under the same name.
        """
        kept: dict[ExpertVersion, LayerShape] = {}
        try:
            for one, tensors in given:
                kept |= self.keep(one, tensors)
        finally:
            if kept:
                self.admit(kept)

    def keep(
        self, given: ExpertVersion, tensors: Mapping[str, Tensor]
    ) -> dict[ExpertVersion, LayerShape]:
        """Keep weights; return what `admit` is to be called with, nothing if they are served.

        Raises what `serve` raises.
        """
        with self._putting:
            if self._residency.serves(given):
                self._check_same(given, tensors)
                return {}
            return {given: self._store.put(given, tensors)}

    def admit(self, kept: Mapping[ExpertVersion, LayerShape]) -> None:
        """Admit calls for what was kept."""
        self._hold(kept)

    def _check_same(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        held = self._store.get(given)
        if held.keys() != tensors.keys() or not all(
            one.dtype == tensors[name].dtype and torch.equal(one.cpu(), tensors[name].cpu())
            for name, one in held.items()
        ):
            raise Forbidden(
                f"{given}: {self._host} serves other tensors under this name "
                "and does not replace them; give the model another name"
            )


def _check(
    key: ExpertKey, layer: ExpertsLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    shapes = expert_shapes(layer)
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != shapes:
        raise CallError(f"{key}: the tensors are {given}, but its model takes {shapes}")
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise CallError(f"{key}: {name} is {tensor.dtype}, but its model has {dtype}")
