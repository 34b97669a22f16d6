"""A small model with post-expert norms: Mixtral with Muse Spark's experts.

Muse Spark's own norm computes in float32. This one computes in the model's type, so that float64
shows whether gradients are exact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import use_experts_implementation

from moesaic.models.trunk.config import config_from_dict
from tests.helpers.models.architectures import tiny_config

NORM = "model.layers.{}.mlp.experts.post_expert_norm.weight"


class NormedConfig(MixtralConfig):
    model_type = "normed"


@use_experts_implementation(has_post_expert_norm=True)
class NormedExperts(nn.Module):
    """As transformers' MuseSparkExperts."""

    def __init__(self, config: NormedConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        hidden, wide = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * wide, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, wide))
        self.act_fn = nn.SiLU()
        self.post_expert_norm = nn.RMSNorm(hidden, eps=1e-6)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        sums = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert])
            gate, value = up.chunk(2, dim=-1)
            found = nn.functional.linear(self.act_fn(gate) * value, self.down_proj[expert])
            found = self.post_expert_norm(found) * top_k_weights[token, place, None]
            sums.index_add_(0, token, found.to(sums.dtype))
        return sums


class NormedForCausalLM(MixtralForCausalLM):
    config_class = NormedConfig

    def __init__(self, config: NormedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.experts = NormedExperts(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()


AutoConfig.register("normed", NormedConfig, exist_ok=True)
AutoModelForCausalLM.register(NormedConfig, NormedForCausalLM, exist_ok=True)


def normed_model(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    values = tiny_config("mixtral").to_dict() | {"model_type": "normed", "architectures": None}
    model: Any = AutoModelForCausalLM.from_config(config_from_dict(values))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "post_expert_norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def saved_normed(folder: Path) -> Path:
    normed_model().save_pretrained(folder)
    return folder
