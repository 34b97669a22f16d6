"""What the folder of an exported model will have, before anything is written.

transformers' `revert_weight_conversion` gives the tensors of a model in memory the names and shapes
that `save_pretrained` writes. Here it runs on a whole model of the meta device, which has shapes
and no memory; when the folder is written, it runs on a few tensors at a time. So an architecture
whose tensors cannot be converted back is known before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ...proto.errors import UnsupportedModel, describe_error
from ..folder.files import SINGLE_FILE
from ..folder.quantised import StoredTensor
from ..trunk.adapters import conversions
from ..trunk.config import read_config
from ..trunk.experts_layers import (
    ExpertsLayer,
    expert_parameters,
    experts_layers,
    shared_parameters,
)
from ..trunk.fitting import first_few, fit
from ..trunk.trunk import meta_model

MAX_SHARD_BYTES = 50 * 10**9  # as in transformers
_LAYER = re.compile(r"(.*?\.\d+)\.")
# Transformers' operations raise these for tensors that they cannot convert back.
_NOT_REVERTED = (NotImplementedError, RuntimeError, ValueError, LookupError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """The tensors and files of a model's folder. Tensors are on the meta device."""

    model: PreTrainedModel  # the whole model, experts included
    layers: dict[int, ExpertsLayer]
    dtype: torch.dtype  # of the experts
    trunk: list[list[str]]  # names of the trunk's tensors in the model, in groups of a layer
    files: dict[str, dict[str, Tensor]]  # file -> {name on disk: tensor}
    metadata: dict[str, int]  # of the index
    config: PretrainedConfig
    generation: GenerationConfig | None
    # Tensors of ``files`` that neither trunk nor pool has, because nothing reads them, and where
    # they are; None: nowhere.
    unread: dict[str, StoredTensor | None]

    def on_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model, a layer's experts or one of the trunk's groups, as on disk.

        Raises UnsupportedModel if they cannot be converted back.
        """
        return _reverted(self.model, tensors)


def plan_export(
    trunk: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ExportPlan:
    """Plan the folder of ``trunk`` and its experts, which have ``dtype``, or that of the trunk.

    The trunk has no experts (`strip_experts`). One plan serves any number of folders. It is made
    where no other thread makes tensors, because transformers changes the default dtype of the
    process while it builds a model. Raises UnsupportedModel for a model that cannot be exported.
    """
    name = type(trunk).__name__
    if getattr(trunk, "hf_quantizer", None) or getattr(trunk.config, "quantization_config", None):
        raise UnsupportedModel(
            f"{name}: its weights are quantised, and only plain floats are exported; load it "
            "dequantised, in bfloat16 or float32"
        )
    if getattr(trunk, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(
            f"{name}: it has adapters of PEFT; merge them into its weights first, or save them "
            "alone, with PEFT"
        )
    generation = trunk.generation_config if trunk.can_generate() else None
    if generation is not None:
        _check_generation(name, generation)
    model: Any = meta_model(trunk.config)
    plain: Any = meta_model(trunk.config, adapted=False)
    # Those with which the whole model was loaded, so that tensors get the names that they had.
    known = getattr(trunk, "_weight_conversions", None)
    plain._weight_conversions = known
    own = conversions(model)
    model._weight_conversions = [*(known or ()), *own] if own else known
    layers = {layer.layer: layer for layer in experts_layers(model)}
    experts = {
        f"{layer.name}.{parameter}": layer.name
        for layer in layers.values()
        for parameter, _ in (*expert_parameters(layer), *shared_parameters(layer))
    }
    parameters = model.state_dict()
    _check_names(name, parameters.keys() - experts.keys(), trunk.state_dict().keys())
    dtype = dtype or trunk.dtype
    saved = trunk_tensors(trunk)  # without duplicates of tied weights
    left_out = trunk.state_dict().keys() - saved.keys()

    def like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            target: torch.empty_like(saved[target], device="meta")
            if target in saved
            else torch.empty_like(tensor, dtype=dtype)
            for target, tensor in tensors.items()
            if target not in left_out
        }

    groups: dict[str, dict[str, Tensor]] = {}
    for target, tensor in like(parameters).items():
        numbered = _LAYER.match(target)
        group = experts.get(target) or (f"{numbered[1]}." if numbered else "")
        groups.setdefault(group, {})[target] = tensor
    stored = _reverted(plain, like(plain.state_dict()))
    unread = _unread(trunk, model, layers.values(), groups.values(), stored)
    split = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        # transformers keeps the parts of one tensor together.
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        filename_pattern=SINGLE_FILE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_bytes,
    )
    config = deepcopy(trunk.config)
    config.dtype = str(trunk.dtype).removeprefix("torch.")
    config.architectures = [name]
    in_layers = {layer.name for layer in layers.values()}
    return ExportPlan(
        model=model,
        layers=layers,
        dtype=dtype,
        trunk=[list(group) for part, group in groups.items() if part not in in_layers],
        files={
            file: {name: stored[name] for name in names}
            for file, names in split.filename_to_tensors.items()
        },
        metadata={"total_parameters": plain.num_parameters(), **split.metadata},
        config=config,
        generation=generation,
        unread=unread,
    )


def trunk_tensors(trunk: PreTrainedModel) -> dict[str, Tensor]:
    """Return the trunk's tensors that are saved, each of tied ones once, by names in the model."""
    tensors = trunk.state_dict()
    for ignored in trunk._keys_to_ignore_on_save or ():
        tensors.pop(ignored, None)
    return remove_tied_weights_from_state_dict(tensors, trunk)


def _reverted(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return revert_weight_conversion(model, dict(tensors))
    except _NOT_REVERTED as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: transformers cannot convert its tensors in memory into those "
            f"of a checkpoint: {describe_error(error)}"
        ) from error


def _check_names(name: str, wanted: AbstractSet[str], found: AbstractSet[str]) -> None:
    """Check that the trunk has exactly what the whole model has besides its experts' weights."""
    if lacking := sorted(wanted - found):
        raise UnsupportedModel(
            f"{name}: neither trunk nor experts have {first_few(lacking)}, which config.json makes "
            "a part of the model"
        )
    if surplus := sorted(found - wanted):
        raise UnsupportedModel(
            f"{name}: {first_few(surplus)}: config.json makes a model without these tensors; save "
            "the model without what was added to it"
        )


def _unread(
    trunk: PreTrainedModel,
    model: PreTrainedModel,
    layers: Iterable[ExpertsLayer],
    groups: Iterable[Mapping[str, Tensor]],
    stored: Mapping[str, Tensor],
) -> dict[str, StoredTensor | None]:
    """Check that the tensors, converted in small groups, are those of transformers' own model.

    Returns the names of those that only transformers' model has, where it does not read them, and
    where the folder of the trunk has them. Raises UnsupportedModel for other differences.
    """
    found = {
        (key, tensor.dtype, tensor.shape)
        for group in groups
        for key, tensor in _reverted(model, group).items()
    }
    wanted = {(key, tensor.dtype, tensor.shape) for key, tensor in stored.items()}
    own = {key for key, *_ in found}
    roots = tuple(
        f"{one.name}." for one in layers if getattr(one.module, "has_unread_weights", False)
    )
    unread = {key for key in stored.keys() - own if key.startswith(roots)}
    if differ := sorted({key for key, *_ in found ^ wanted} - unread):
        raise UnsupportedModel(
            f"{type(trunk).__name__}: {first_few(differ)}: transformers' own model has other "
            "tensors here than its trunk and the pool have together, so it could not load the "
            "folder"
        )
    folder = Path(trunk.name_or_path) if trunk.name_or_path else None
    if not unread or folder is None or not folder.is_dir():
        return dict.fromkeys(sorted(unread))
    kept = fit(folder, read_config(folder), model).tensors
    return {key: kept.get(key) for key in sorted(unread)}


def _check_generation(name: str, generation: GenerationConfig) -> None:
    try:
        generation.validate(strict=True)
    except ValueError as error:
        words = " ".join(str(error).split())
        raise UnsupportedModel(
            f"{name}: generation_config: {words}; transformers does not save such a configuration, "
            "so correct it first"
        ) from error
