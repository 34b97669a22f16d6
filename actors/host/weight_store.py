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
    expert_parameters,
    expert_shapes,
    experts_layers,
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
        self._device = device
        dtype = torch_dtype(ref.dtype)
        self.memory: ExpertMemory = (
            SlabMemory(ref.name, layers, dtype, about, learns=ref.learns)
            if device.type == "cpu"
            else SlotMemory(ref.name, layers, dtype, device, about, budget=budget)
        )

    def form(self, layer: int) -> ExpertForm | None:
        """Return a layer's form; None if tensors that its experts share are yet to be put."""
        experts = self.layers[layer]
        return None if _lacks_shared(experts) else experts.form()

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

    def form(self, layer: int) -> ExpertForm:
        form, experts = self._checkpoint.form(layer), self.layers[layer]
        if experts.has_post_norm:
            experts.module.to(self._device)
        return form

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

    def adopt(
        self, ref: ModelRef, about: Mapping[str, Any], left: LeftMemory
    ) -> dict[ExpertVersion, LayerShape]:
        """Register a model with the memory that an earlier process has left of it.

        Returns the experts that are there. Raises ValueError and RuntimeError for memory that this
        process cannot use, and CheckpointError and UnsupportedModel.
        """
        model = self._open_model(ref, self.device, about)
        try:
            forms = {n: form for n in model.layers if (form := model.form(n)) is not None}
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
        _, layer = self._layer(key)
        if key.expert == SHARED:
            shared = shared_parameters(layer)
            sizes = {name: p.numel() * max(4, p.element_size()) for name, p in shared.items()}
        else:
            shapes, dtype = self.expert_forms(key)
            sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        # The file's JSON header has each tensor's name, dtype, shape and offsets.
        return sum(sizes.values()) + sum(map(len, sizes)) + _HEADER_BYTES * (1 + len(sizes))

    def expert_forms(self, key: ExpertKey) -> tuple[dict[str, tuple[int, ...]], torch.dtype]:
        """Return the shapes of an expert's tensors by name, and their type.

        Raises NotHere and CallError.
        """
        model, layer = self._layer(key)
        return expert_shapes(layer), torch_dtype(model.ref.dtype)

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> LayerShape:
        """Keep an expert that was sent to this host.

        Raises CallError for tensors that misfit, and Busy while there is no room for a version.
        """
        key = given.key
        model, layer = self._layer(key)
        self.check(key, tensors)
        if key.expert == SHARED:
            _set_shared(layer, tensors, self.device)
            return model.shape(key.layer)
        return self._keep(given, ExpertWeights.of(tensors))

    def check(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """Check whether `put` would accept ``tensors`` as ``key``.

        Raises NotHere for an unknown model, and CallError for an expert or tensors that misfit.
        """
        model, layer = self._layer(key)
        if key.expert == SHARED:
            _check_shared(layer, tensors)
        else:
            _check(key, layer, tensors, torch_dtype(model.ref.dtype))

    @contextmanager
    def reading(self, wanted: ExpertVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give the tensors of an expert, as `put` accepts them, inside of the block alone.

        Meanwhile none is kept or dropped. Raises NotHere and CallError.
        """
        key = wanted.key
        model, layer = self._layer(key)
        if key.expert == SHARED:
            yield {name: parameter.data for name, parameter in shared_parameters(layer).items()}
            return
        with model.memory.reading(wanted) as tensors:
            yield tensors

    def get(self, wanted: ExpertVersion) -> dict[str, Tensor]:
        """Return copies of what `reading` gives."""
        with self.reading(wanted) as tensors:
            return {name: tensor.clone() for name, tensor in tensors.items()}

    def lacks_shared(self, key: LayerKey) -> bool:
        """Return whether tensors that the experts of a layer have in common are still missing."""
        _, layer = self._layer(key.expert(SHARED))
        return _lacks_shared(layer)

    def drop(self, gone: ExpertVersion) -> None:
        """Forget an expert and free its memory; call it when the loop has released the expert."""
        with self._lock:
            model = self._models.get(gone.key.model)
        if model is not None:
            model.memory.drop(gone)

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

    def check_trainable(self, model: str) -> None:
        """Raise CallError for a model whose experts have no backward pass where they lie."""
        with self._lock:
            found = self._models.get(model)
        if found is None or not isinstance(found.memory, SlotMemory):
            return
        if torch_dtype(found.ref.dtype) == torch.float64:
            raise CallError(
                f"dtype of {model!r}: hosts on GPUs train no float64 experts; use float32, or "
                "hosts with device: cpu"
            )

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
            form = model.form(key.layer)
            if form is None:
                raise NotHere(f"layer {key.layer} of {key.model}: its shared tensors come first")
            self._forms[layer] = form
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
            if self._is_served(given):
                self._check_same(given, tensors)
                return {}
            shape = self._store.put(given, tensors)
            return {} if given.key.expert == SHARED else {given: shape}

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

    def _is_served(self, given: ExpertVersion) -> bool:
        key = given.key
        if key.expert == SHARED:
            layer = LayerKey(key.model, key.layer)
            return self._residency.serves_layer(layer) and not self._store.lacks_shared(layer)
        return self._residency.serves(given)


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


def shared_parameters(layer: ExpertsLayer) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that all experts of a layer share, e.g. of a norm after them."""
    own = {name for name, _ in expert_parameters(layer)}
    return {n: p for n, p in layer.module.named_parameters() if n not in own}


def _lacks_shared(layer: ExpertsLayer) -> bool:
    return any(p.device.type == "meta" for p in shared_parameters(layer).values())


def _check_shared(layer: ExpertsLayer, tensors: Mapping[str, Tensor]) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in shared_parameters(layer).items()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if given != wanted:
        raise CallError(
            f"layer {layer.layer}: the shared tensors are {given}, but its model takes {wanted}"
        )


def _set_shared(layer: ExpertsLayer, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        layer.module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(
            tensor.to(device), requires_grad=False
        )
