"""Reading single experts out of safetensors checkpoints.

There is no table of where each architecture has its experts on disk. transformers knows, for every
architecture, how names on disk map to names in memory, and which operations (stack, concatenate,
transpose, ...) are between them; we run the same operations on one expert's tensors. Adapted
architectures have their own (`adapters.py`). There are two families: one tensor for each expert
and projection, and fused tensors whose first dimension is the expert, or a number of rows for each
expert.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ...kernels.ffn import ExpertForm, ExpertWeights
from ...proto.errors import CheckpointError
from .experts_layers import ExpertsLayer, expert_parameters, experts_layers
from .fitting import Source, convert, fit
from .trunk import meta_model

# Any other dtype is quantised, and means something only together with its scales.
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Checkpoint:
    """The experts of one model, in a folder of safetensors files.

    ``model`` is on the meta device, and ``config`` is its configuration. Raises CheckpointError
    when the folder's tensors do not make the model, trunk and experts.
    """

    def __init__(self, path: Path, config: PretrainedConfig, *, dtype: torch.dtype) -> None:
        self.path = path
        self.config = config
        self.dtype = dtype
        self.model: PreTrainedModel = meta_model(config)
        self.layers: dict[int, ExpertsLayer] = {
            layer.layer: layer for layer in experts_layers(self.model)
        }
        fitting = fit(path, config, self.model)
        fitting.check()
        self._tensors, self._sources = fitting.tensors, fitting.sources

    def form(self, layer: int) -> ExpertForm:
        """Return the layer's form, after reading the tensors that all its experts share."""
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
        """Read one expert into its own memory, (2I or I, H) and (H, I) or as the form says.

        Raises CheckpointError when it is missing, truncated, or has other shapes than the
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
                    f"the configuration gives {tuple(parameter.shape[1:])}; config.json or the "
                    "tensors belong to another model"
                )
            tensors[name] = tensor.to(self.dtype, copy=True).contiguous()
        up = experts.up_name
        return ExpertWeights(
            up=tensors[up],
            down=tensors["down_proj"],
            up_bias=tensors.get(f"{up}_bias"),
            down_bias=tensors.get("down_proj_bias"),
        )

    def _read(self, source: Source, expert: int | None, target: str) -> Tensor:
        """Read one parameter: the part of ``expert``, or all of it if that is None."""
        collected: dict[str, list[Tensor]] = {}
        for pattern in source.patterns:
            if source.per_expert:
                key = source.keys.get((pattern, expert))
                if key is None:
                    raise CheckpointError(
                        f"{self.path}: the checkpoint has no tensor of expert {expert} for {target}"
                    )
                collected[pattern] = [self._tensor(key, None)]
            else:
                key = source.keys[pattern, None]
                collected[pattern] = [self._tensor(key, expert, source.rows)]
        shapes = {pattern: tuple(found[0].shape) for pattern, found in collected.items()}
        if source.converter is None:
            ((tensor,),) = collected.values()
        else:
            try:
                (tensor,) = convert(source.converter, collected, target, self.model).values()
            except (RuntimeError, ValueError, LookupError) as error:
                raise CheckpointError(
                    f"{self.path}: expert {expert} of {target}: the tensors on disk, of shapes "
                    f"{shapes}, do not make this expert: {error}"
                ) from error
        return tensor if expert is None else tensor[0]

    def _tensor(self, key: str, expert: int | None, rows: int = 1) -> Tensor:
        """Read a tensor, dequantised; of a fused one only the expert's ``rows``."""
        stored = self._tensors[key]
        tensor = stored.read(expert, rows)
        if tensor.dtype not in _PLAIN_DTYPES:
            raise CheckpointError(
                f"{stored.file}: {key} is {tensor.dtype}; quantised weights can only be read if "
                "quantization_config in config.json says how they were quantised"
            )
        return tensor
