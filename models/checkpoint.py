"""Reading experts out of safetensors checkpoints: one expert at a time, and nothing else.

Where an expert lies on disk is not written down here for each architecture. transformers knows,
for every architecture, how the names on disk map to the names in memory and which operations
(stack, concatenate, transpose, ...) lie between; we run those very operations on one expert's
tensors. Adapted architectures bring theirs (`adapters.py`). Two families cover the field: a tensor
for each expert and projection, and fused tensors whose first dimension is the expert, or has so
many rows for each.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from ..kernels.ffn import ExpertForm, ExpertWeights
from ..proto.errors import CheckpointError
from .adapters import SplitRows, conversions
from .quantised import stored_tensors
from .trunk import ExpertsLayer, expert_parameters, experts_layers, meta_model

# Anything else is quantised, and means something only together with its scales.
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class _Source:
    """One parameter of one experts module: the tensors on disk and the way into memory."""

    # (source pattern, expert or None if all are in one tensor) -> tensor name on disk
    keys: dict[tuple[str, int | None], str] = field(default_factory=dict)
    converter: WeightConverter | None = None

    @property
    def per_expert(self) -> bool:
        return self.converter is not None and any(
            isinstance(op, MergeModulelist) for op in self.converter.operations
        )

    @property
    def rows(self) -> int:
        """Of one expert in a fused tensor's first dimension."""
        operations = self.converter.operations if self.converter is not None else ()
        return next((op.rows for op in operations if isinstance(op, SplitRows)), 1)


class Checkpoint:
    """The experts of one model, in a folder of safetensors files.

    ``model`` is on the meta device; ``config`` its configuration.
    """

    def __init__(self, path: Path, config: PretrainedConfig, *, dtype: torch.dtype) -> None:
        self.path = path
        self.config = config
        self.dtype = dtype
        self.model: PreTrainedModel = meta_model(config)
        self.layers: dict[int, ExpertsLayer] = {
            layer.layer: layer for layer in experts_layers(self.model)
        }
        self._tensors = stored_tensors(path, config)
        self._sources = self._find_sources()

    def _find_sources(self) -> dict[str, _Source]:
        transforms = [*get_model_conversion_mapping(self.model), *conversions(self.model)]
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        parameters = self.model.state_dict()
        wanted = {
            f"{layer.name}.{name}"
            for layer in self.layers.values()
            for name, _ in layer.module.named_parameters()
        }
        converter_of: dict[str, WeightConverter | None] = {}
        keys: dict[str, dict[tuple[str, int | None], str]] = defaultdict(dict)
        for key in self._tensors:
            target, pattern = rename_source_key(
                key, renamings, converters, self.model.base_model_prefix, parameters
            )
            if target not in wanted:
                continue
            converter = by_pattern.get(pattern) if pattern else None
            converter_of[target] = converter
            number = re.search(r"experts?[._](\d+)\.", key)
            keys[target][pattern or "", int(number[1]) if number else None] = key
        missing = sorted(wanted - keys.keys())
        if missing:
            raise CheckpointError(
                f"{self.path}: no tensors for {missing[0]}"
                + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + "; the checkpoint does not belong to its config.json, or is quantised"
            )
        return {target: _Source(found, converter_of[target]) for target, found in keys.items()}

    def form(self, layer: int) -> ExpertForm:
        """The layer's form, with the tensors that all its experts share read from disk."""
        experts = self.layers[layer]
        own = {name for name, _ in expert_parameters(experts)}
        for name, parameter in list(experts.module.named_parameters()):
            if name in own or parameter.device.type != "meta":
                continue
            owner, _, leaf = name.rpartition(".")
            source = self._sources[f"{experts.name}.{name}"]
            tensor = self._read(source, None, leaf).to(self.dtype)
            experts.module.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(
                tensor, requires_grad=False
            )
        return experts.form()

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """One expert in its own memory, (2I or I, H) and (H, I) or as the form says.

        Raises CheckpointError when it is missing, truncated or has other shapes than the
        configuration gives.
        """
        experts = self.layers[layer]
        tensors: dict[str, Tensor] = {}
        for name, parameter in expert_parameters(experts):
            target = f"{experts.name}.{name}"
            tensor = self._read(self._sources[target], expert, target)
            if tensor.shape != parameter.shape[1:]:
                raise CheckpointError(
                    f"{self.path}: expert {expert} of {target} has shape {tuple(tensor.shape)}, "
                    f"the configuration gives {tuple(parameter.shape[1:])}"
                )
            tensors[name] = tensor.to(self.dtype, copy=True).contiguous()
        up = experts.up_name
        return ExpertWeights(
            up=tensors[up],
            down=tensors["down_proj"],
            up_bias=tensors.get(f"{up}_bias"),
            down_bias=tensors.get("down_proj_bias"),
        )

    def _read(self, source: _Source, expert: int | None, target: str) -> Tensor:
        """One parameter: of ``expert``, or as a whole if it is None."""
        patterns = list(dict.fromkeys(pattern for pattern, _ in source.keys))
        if source.converter is not None:
            # The order of concatenation is the converter's, not the file's.
            patterns = [p for p in source.converter.source_patterns if p in patterns]
        collected: dict[str, Any] = {}
        for pattern in patterns:
            if source.per_expert:
                key = source.keys.get((pattern, expert))
                if key is None:
                    raise CheckpointError(f"{self.path}: no tensor of expert {expert} for {target}")
                collected[pattern] = [self._tensor(key, None)]
            else:
                key = source.keys[pattern, None]
                collected[pattern] = [self._tensor(key, expert, source.rows)]
        shapes = {pattern: tuple(found[0].shape) for pattern, found in collected.items()}
        if source.converter is None:
            (tensor,) = collected[patterns[0]]
        else:
            try:
                tensor = self._convert(source.converter, collected, target)
            except (RuntimeError, ValueError, LookupError) as error:
                raise CheckpointError(
                    f"{self.path}: expert {expert} of {target}: the tensors on disk do not make "
                    f"it: {shapes}: {error}"
                ) from error
        return tensor if expert is None else tensor[0]

    def _convert(self, converter: WeightConverter, collected: dict[str, Any], target: str) -> Any:
        """Run transformers' own operations on what was read."""
        for operation in converter.operations:
            collected = operation.convert(
                collected,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=target,
                model=self.model,
                config=self.config,
                missing_keys=None,
            )
        (tensor,) = collected.values()
        if isinstance(tensor, list):
            (tensor,) = tensor
        return tensor

    def _tensor(self, key: str, expert: int | None, rows: int = 1) -> Tensor:
        """A tensor on disk, dequantised; of a fused one the expert's ``rows``."""
        stored = self._tensors[key]
        tensor = stored.read(expert, rows)
        if tensor.dtype not in _PLAIN_DTYPES:
            raise CheckpointError(
                f"{stored.file}: {key} is {tensor.dtype}; quantised weights are read where "
                "quantization_config in config.json says how they were quantised"
            )
        return tensor
