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
from .expert_tensors import PLAIN_DTYPES, ExpertTensors
from .experts_layers import (
    ExpertsLayer,
    expert_parameters,
    experts_layers,
    shared_parameters,
)
from .fitting import fit
from .trunk import meta_model


class Checkpoint:
    """The experts of one model, in a folder of safetensors files.

    ``model`` is on the meta device, and made of ``config`` if it is not given. Raises
    CheckpointError when the folder's tensors do not make the model, trunk and experts.
    """

    def __init__(
        self,
        path: Path,
        config: PretrainedConfig,
        *,
        dtype: torch.dtype,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.dtype = dtype
        self.model: PreTrainedModel = meta_model(config) if model is None else model
        self.layers: dict[int, ExpertsLayer] = {
            layer.layer: layer for layer in experts_layers(self.model)
        }
        fitting = fit(path, config, self.model)
        fitting.check()
        self._stored = fitting.tensors
        self.tensors = ExpertTensors(self.model, self.layers, fitting.sources, dtype, str(path))

    def form(self, layer: int) -> ExpertForm:
        return self.layers[layer].form()

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Read one expert into its own memory, (2I or I, H) and (H, I) or as the form says.

        Raises CheckpointError when it is missing, truncated, or has other shapes than the
        configuration gives.
        """
        return ExpertWeights.of(self.tensors.read(layer, expert, self._tensor))

    def files(self, layer: int, expert: int) -> list[Path]:
        """Return the files that have tensors of one expert."""
        found: set[Path] = set()
        experts = self.layers[layer]
        for name, _ in (*expert_parameters(experts), *shared_parameters(experts)):
            source = self.tensors.sources[f"{experts.name}.{name}"]
            found |= {
                self._stored[key].file
                for (_, only), key in source.keys.items()
                if only == expert or not source.per_expert
            }
        return sorted(found)

    def _tensor(self, key: str, expert: int | None, rows: int = 1) -> Tensor:
        """Read a tensor, dequantised; of a fused one only the expert's ``rows``."""
        stored = self._stored[key]
        tensor = stored.read(expert, rows)
        if tensor.dtype not in PLAIN_DTYPES:
            raise CheckpointError(
                f"{stored.file}: {key} is {tensor.dtype}; quantised weights can only be read if "
                "quantization_config in config.json says how they were quantised"
            )
        return tensor
