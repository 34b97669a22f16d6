"""The sizes of a model's experts, computed from its configuration without reading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..folder.quantised import quantisation_of
from .config import read_config
from .experts_layers import ExpertsLayer, expert_bytes, experts_layers
from .trunk import meta_model

# A host's memory besides its experts: Python, torch, transformers.
HOST_BYTES = 400_000_000
# Names of configurations for the number of experts of one token.
_TOP_K = (
    *("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"),
    "moe_top_k",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDescription:
    architecture: str
    dtype: str  # of hosts and trunk; all sizes are in it
    quantised: str | None  # the checkpoint's quantisation; it is dequantised when read
    layers: dict[int, int]  # layer with experts -> number of experts
    top_k: int | None  # None: the configuration has an unknown name for it
    expert_bytes: int  # of the largest expert
    experts_bytes: int  # of all experts, one replica each
    trunk_bytes: int
    hidden_size: int
    cache_token_bytes: int  # of one token's keys and values in all layers; 0: unknown
    attention_token_bytes: int  # of those of one layer, repeated for all its heads; 0: unknown

    def hosts(self, memory_bytes: int, replicas: int = 1) -> int:
        """Return how many hosts with so much memory hold every expert ``replicas`` times.

        Raises ValueError when one expert does not fit.
        """
        room = (memory_bytes - HOST_BYTES) // self.expert_bytes
        if room < 1:
            raise ValueError(
                f"a host with {memory_bytes:,} bytes has no room for an expert of "
                f"{self.expert_bytes:,} bytes beside the {HOST_BYTES:,} bytes that the host's "
                "process takes; give hosts more memory"
            )
        return max(replicas, math.ceil(replicas * sum(self.layers.values()) / room))


def experts_per_token(config: PretrainedConfig, layer: ExpertsLayer) -> int | None:
    """Return how many experts the model's gates choose; None if its name is unknown."""
    text = config.get_text_config()
    # Switch Transformers' adapter itself has 1; DBRX has a separate configuration for the FFN.
    sayers = (layer.module, text, getattr(text, "ffn_config", None))
    named = (getattr(sayer, name, None) for sayer in sayers for name in _TOP_K)
    return next((value for value in named if isinstance(value, int)), None)


def cache_sizes(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return (`cache_token_bytes`, `attention_token_bytes`) of a model, at least.

    Engines may keep more of a token in some layers, and nothing in layers without attention.
    """
    text = config.get_text_config()
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    found = [getattr(text, name, None) for name in names]
    layers, heads, hidden = (one if isinstance(one, int) else 0 for one in found)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if kinds:
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    if not layers * heads * hidden:
        return 0, 0
    head = getattr(text, "head_dim", None) or hidden // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    kept = 2 * key_heads * head if isinstance(key_heads, int) else 0
    if latent := getattr(text, "kv_lora_rank", None):
        kept = latent + getattr(text, "qk_rope_head_dim", 0)
    return layers * kept * dtype.itemsize, 2 * heads * head * dtype.itemsize


def describe(folder: Path, dtype: torch.dtype) -> ModelDescription:
    """Describe the model in ``folder``. Raises CheckpointError and UnsupportedModel."""
    config = read_config(folder)
    return describe_model(folder, config, meta_model(config), dtype)


def describe_model(
    folder: Path, config: PretrainedConfig, model: PreTrainedModel, dtype: torch.dtype
) -> ModelDescription:
    """Describe a model that is already built on the meta device, with its experts."""
    found = experts_layers(model)
    sizes = {layer.layer: expert_bytes(layer, dtype) for layer in found}
    experts = sum(layer.num_experts * sizes[layer.layer] for layer in found)
    whole = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    quantisation = quantisation_of(config, folder)
    cached, read = cache_sizes(config, dtype)
    return ModelDescription(
        architecture=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        quantised=str(quantisation) if quantisation else None,
        layers={layer.layer: layer.num_experts for layer in found},
        top_k=experts_per_token(config, found[0]),
        expert_bytes=max(sizes.values()),
        experts_bytes=experts,
        trunk_bytes=whole - experts,
        hidden_size=found[0].hidden_size,
        cache_token_bytes=cached,
        attention_token_bytes=read,
    )
