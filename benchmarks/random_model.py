"""A model with random weights, for benchmarks in which only its form matters."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

# Of a tiny one.
HIDDEN, INTERMEDIATE = 32, 32
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 4


def save_random_model(
    folder: Path,
    *,
    layers: int,
    experts: int,
    top_k: int,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    vocabulary: int = 16,
    heads: int = 2,
    seed: int | None = None,
) -> None:
    """Save a Mixtral; with ``seed`` it has the same weights every time."""
    if seed is not None:
        torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
