"""The weights that a host holds: read from a checkpoint, or sent by a peer or a trunk."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...cluster.expert_keys import FIRST_VERSION, SHARED, ExpertKey, ExpertVersion, LayerKey
from ...cluster.host.residency import LayerShape
from ...cluster.placement import ModelRef
from ...cluster.update_folder import UpdateFolder
from ...kernels import onednn
from ...kernels.ffn import ExpertForm, ExpertWeights, can_pack, pack, unpack
from ...kernels.slabs.layout import COPIES, LayerLayout, SlabLayout
from ...kernels.slabs.slab import Slab, layer_layout
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
from ...proto.errors import Busy, CallError, CheckpointError, NotHere

# Upper bound for a safetensors header: per tensor (besides its name), and for the rest of it.
_HEADER_BYTES = 256


class _Model:
    """The experts layers of one model, its checkpoint if it has one, and its experts' memory."""

    def __init__(self, ref: ModelRef) -> None:
        self.ref = ref
        self.slab: Slab | None = None  # on CPUs, from the first expert on
        self.checkpoint: Checkpoint | None = None
        if ref.path is not None:
            path = Path(ref.path)
            self.checkpoint = Checkpoint(path, read_config(path), dtype=torch_dtype(ref.dtype))
            self.layers = self.checkpoint.layers
        else:
            # Keeps the layers' modules alive, which the model owns.
            self._owner = meta_model(config_from_dict(dict(ref.config)))
            self.layers = {layer.layer: layer for layer in experts_layers(self._owner)}

    def close(self) -> None:
        """Let the memory go with the last expert that still lies in it."""
        if self.slab is not None:
            self.slab.close()
            self.slab = None

    def read_update(self, wanted: ExpertVersion, layer: ExpertsLayer) -> ExpertWeights:
        """Read one expert from the file of the update that brought this version of it."""
        if self.ref.updates is None:
            raise NotHere(f"{wanted} is not in the checkpoint, which has version {FIRST_VERSION}")
        key, version = wanted
        file = UpdateFolder(self.ref.updates, key.model).weights(version)
        dtype = torch_dtype(self.ref.dtype)
        tensors = {n: t.to(dtype) for n, t in read_expert(file, key.layer, key.expert).items()}
        try:
            _check(key, layer, tensors, dtype)
        except CallError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return ExpertWeights.of(tensors)

    def shape(self, layer: int) -> LayerShape:
        experts = self.layers[layer]
        return LayerShape(
            num_experts=experts.num_experts,
            hidden_size=experts.hidden_size,
            dtype=self.ref.dtype,
        )


class ExpertStore:
    """The experts of one host. Thread-safe: control threads add and remove, the loop reads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # slots are written by one thread at a time
        self._models: dict[str, _Model] = {}
        self._forms: dict[LayerKey, ExpertForm] = {}
        # {layer: {version: {expert: its weights}}}
        self._experts: dict[LayerKey, dict[int, dict[int, ExpertWeights]]] = {}

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(
                weights.nbytes
                for versions in self._experts.values()
                for experts in versions.values()
                for weights in experts.values()
            )

    def add_model(self, ref: ModelRef) -> None:
        """Register a model, so that its experts can be loaded or put.

        Raises CheckpointError and UnsupportedModel.
        """
        with self._lock:
            known = self._models.get(ref.name)
        if known is None or known.ref != ref:
            model = _Model(ref)
            with self._writing, self._lock:
                before = self._models.get(ref.name)
                self._models[ref.name] = model
                if before is not None:
                    before.close()

    def load(self, wanted: ExpertVersion) -> LayerShape:
        """Read one expert from its model's checkpoint, or a later version from its updates.

        Raises CheckpointError, NotHere, and CallError for an expert that its model lacks.
        """
        key = wanted.key
        model, layer = self._layer(key)
        if model.checkpoint is None:
            raise NotHere(
                f"model {key.model!r} has no checkpoint; only a peer or a trunk has its experts"
            )
        if wanted.version == FIRST_VERSION:
            weights = model.checkpoint.read(key.layer, key.expert)
        else:
            weights = model.read_update(wanted, layer)
        layer_key = LayerKey(key.model, key.layer)
        if layer_key not in self._forms:
            self._forms[layer_key] = model.checkpoint.form(key.layer)
            if layer.has_post_norm:
                layer.module.to(self.device)
        return self._keep(wanted, weights)

    def most_bytes(self, key: ExpertKey) -> int:
        """Return the largest size of a safetensors file that `put` would accept for ``key``.

        Raises NotHere and CallError.
        """
        model, layer = self._layer(key)
        if key.expert == SHARED:
            shared = shared_parameters(layer)
            sizes = {name: p.numel() * max(4, p.element_size()) for name, p in shared.items()}
        else:
            shapes = expert_shapes(layer)
            item = torch_dtype(model.ref.dtype).itemsize
            sizes = {name: math.prod(shape) * item for name, shape in shapes.items()}
        # The file's JSON header has each tensor's name, dtype, shape and offsets.
        return sum(sizes.values()) + sum(map(len, sizes)) + _HEADER_BYTES * (1 + len(sizes))

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> LayerShape:
        """Keep an expert that was sent to this host.

        Raises CallError for tensors that misfit, and Busy while there is no room for a version.
        """
        key = given.key
        model, layer = self._layer(key)
        layer_key = LayerKey(key.model, key.layer)
        self.check(key, tensors)
        if key.expert == SHARED:
            _set_shared(layer, tensors, self.device)
            return model.shape(key.layer)
        weights = ExpertWeights.of(tensors)
        self._forms.setdefault(layer_key, layer.form())
        return self._keep(given, weights)

    def check(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """Check whether `put` would accept ``tensors`` as ``key``.

        Raises NotHere for an unknown model, and CallError for an expert or tensors that misfit.
        """
        model, layer = self._layer(key)
        if key.expert == SHARED:
            _check_shared(layer, tensors)
        else:
            _check(key, layer, tensors, torch_dtype(model.ref.dtype))

    def get(self, wanted: ExpertVersion) -> dict[str, Tensor]:
        """Return the tensors of an expert, as `put` accepts them. Raises NotHere and CallError."""
        key, version = wanted
        _, layer = self._layer(key)
        if key.expert == SHARED:
            return {name: parameter.data for name, parameter in shared_parameters(layer).items()}
        layer_key = LayerKey(key.model, key.layer)
        with self._lock:
            weights = self._experts.get(layer_key, {}).get(version, {}).get(key.expert)
            slab = self._models[key.model].slab
            copy = slab.copy_of(key.layer, key.expert, version) if slab is not None else None
            place = key.layer, key.expert, copy or 0
            generation = slab.generation(*place) if slab is not None else 0
        if weights is None or (slab is not None and copy is None):
            raise NotHere(f"{wanted} is not on this host")
        tensors = unpack(self._forms[layer_key], weights).tensors()
        if slab is None:
            return tensors
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        # The expert may be dropped while it is copied, and its memory then reads as zeros.
        if slab.generation(*place) != generation:
            raise NotHere(f"{wanted} left this host while it was read")
        return copies

    def lacks_shared(self, key: LayerKey) -> bool:
        """Return whether tensors that the experts of a layer have in common are still missing."""
        _, layer = self._layer(key.expert(SHARED))
        return any(p.device.type == "meta" for p in shared_parameters(layer).values())

    def drop(self, gone: ExpertVersion) -> None:
        """Forget an expert and free its memory; call it when the loop has released the expert."""
        key, version = gone
        with self._writing, self._lock:
            versions = self._experts.get(LayerKey(key.model, key.layer), {})
            dropped = versions.get(version, {}).pop(key.expert, None)
            model = self._models.get(key.model)
            if dropped is None or model is None or model.slab is None:
                return
            copy = model.slab.copy_of(key.layer, key.expert, version)
            if copy is not None:
                model.slab.free(key.layer, key.expert, copy)

    def close(self) -> None:
        """Free all experts."""
        with self._lock:
            self._experts.clear()
            for model in self._models.values():
                model.close()

    def layer(
        self, key: LayerKey, version: int, others: Mapping[int, int]
    ) -> tuple[ExpertForm, Mapping[int, ExpertWeights]]:
        """Return the arithmetic of a layer, and those of its experts of ``version`` that are held.

        ``others`` has the experts of another version, which is used for them.
        """
        versions = self._experts[key]
        experts = versions.get(version, {})
        if others:
            found = {e: versions.get(v, {}).get(e) for e, v in others.items()}
            experts = {**experts, **{e: w for e, w in found.items() if w is not None}}
        return self._forms[key], experts

    def _model(self, name: str) -> _Model:
        with self._lock:
            if name not in self._models:
                raise NotHere(f"model {name!r} is unknown to this host")
            return self._models[name]

    def _layer(self, key: ExpertKey) -> tuple[_Model, ExpertsLayer]:
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
        key, version = given
        layer_key = LayerKey(key.model, key.layer)
        model = self._model(key.model)
        if self.device.type == "cpu":
            packed = _in_layout(self._forms[layer_key], weights)
            with self._writing:
                kept = self._write(self._slab(model), given, packed)
        else:
            kept = ExpertWeights.of({n: t.to(self.device) for n, t in weights.tensors().items()})
        with self._lock:
            versions = self._experts.setdefault(layer_key, {})
            versions.setdefault(version, {})[key.expert] = kept
        return model.shape(key.layer)

    def _write(self, slab: Slab, given: ExpertVersion, weights: ExpertWeights) -> ExpertWeights:
        key, version = given
        place = key.layer, key.expert
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
            there = " and ".join(str(slab.version(*place, one)) for one in range(COPIES))
            raise Busy(
                f"{given}: this host has versions {there} of it and no room for a third; send it "
                "again when no router uses the older one any more"
            )
        return slab.write(*place, weights, version=version, copy=copy)

    def _slab(self, model: _Model) -> Slab:
        if model.slab is None:
            model.slab = Slab(model.ref.name, SlabLayout(_layouts(model)))
        return model.slab


def _in_layout(form: ExpertForm, weights: ExpertWeights) -> ExpertWeights:
    """Return an expert in the layout of the kernel that will compute it on this CPU."""
    if can_pack(torch.device("cpu"), weights.up.dtype) and onednn.available():
        return pack(form, weights)
    return weights


def _layouts(model: _Model) -> dict[int, LayerLayout]:
    """Return how the experts of each layer lie in memory.

    Layers whose experts have the same shapes and arithmetic share the result of one trial.
    """
    dtype = torch_dtype(model.ref.dtype)
    known: dict[object, LayerLayout] = {}
    found = {}
    for number, layer in model.layers.items():
        form, shapes = layer.form(), expert_shapes(layer)
        alike = (layer.num_experts, tuple(shapes.items()), form.transposed, type(layer.module))
        if alike not in known:
            blank = ExpertWeights.of({n: torch.zeros(s, dtype=dtype) for n, s in shapes.items()})
            known[alike] = layer_layout(layer.num_experts, _in_layout(form, blank))
        found[number] = known[alike]
    return found


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
