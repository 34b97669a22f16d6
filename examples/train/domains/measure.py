"""What a model makes of held-out text: its perplexity, and which experts its gates choose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Tensor names: B sequences, S tokens of each, V words, T = B S, E experts, K chosen of a token.
SEQUENCES, SEQUENCE_LENGTH, BATCH = 24, 512, 4


class Measured(NamedTuple):
    """One domain."""

    perplexity: float
    shares: list[list[float]]  # by layer: the part of the choices that each expert gets


def measure(folder: str | Path, held_out: dict[str, str]) -> dict[str, Measured]:
    """Measure a model in a folder on the held-out text of each domain, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {domain: _measure(model, tokenizer, text) for domain, text in held_out.items()}


@torch.inference_mode()
def _measure(model: torch.nn.Module, tokenizer: object, text: str) -> Measured:
    ids_T = torch.tensor(tokenizer(text)["input_ids"])  # pyright: ignore[reportCallIssue]
    count = min(SEQUENCES, len(ids_T) // SEQUENCE_LENGTH)
    loss, chosen = 0.0, 0
    for ids_BS in ids_T[: count * SEQUENCE_LENGTH].view(count, SEQUENCE_LENGTH).split(BATCH):
        found = model(input_ids=ids_BS, output_router_logits=True, use_cache=False)
        logits_TV = found.logits[:, :-1].float().flatten(0, 1)
        loss += float(
            torch.nn.functional.cross_entropy(logits_TV, ids_BS[:, 1:].flatten(), reduction="sum")
        )
        # [layers, E]
        chosen = chosen + torch.stack(
            [
                layer_TE.topk(model.config.num_experts_per_tok)
                .indices.flatten()  # pyright: ignore[reportAttributeAccessIssue]
                .bincount(minlength=layer_TE.shape[-1])
                for layer_TE in found.router_logits
            ]
        )
    shares = chosen / chosen.sum(-1, keepdim=True)
    return Measured(math.exp(loss / (count * (SEQUENCE_LENGTH - 1))), shares.tolist())
