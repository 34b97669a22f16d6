"""What a package says of a model architecture that it brings, see `extensions.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming

# Makes the module that takes the place of one of the model's, see `adapters.py`.
Adapter = Callable[[Any], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A causal language model that transformers lacks, in classes of transformers' manner.

    Gates, attention and all else of ``model`` stay in the trunk under the names of its parameters.
    ``conversions`` map names and shapes on disk to those in memory, where they differ, the experts'
    included. Experts are found where their class has transformers' `use_experts_implementation`.
    A class of experts without it has an adapter in ``adapters``, under the class's name.
    """

    config: type[PretrainedConfig]  # its `model_type` is the architecture's
    model: type[PreTrainedModel]
    conversions: Sequence[WeightConverter | WeightRenaming] = ()
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return self.config.model_type
