"""Choosing tokens by chance.

Shape suffixes: S = rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engine import Sampling

# Below this a temperature is greedy: dividing by it would overflow fp32.
MIN_TEMPERATURE = 1e-5


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def sample(logits_SV: Tensor, samplings: Sequence[Sampling], generator: torch.Generator) -> Tensor:
    """One token per row, ``(S,)``: temperature first, then the smallest set that holds top_p."""
    temperature_S, top_p_S = torch.tensor(
        [(one.temperature, one.top_p) for one in samplings],
        dtype=torch.float32,
        device=logits_SV.device,
    ).unbind(dim=1)
    shifted_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    probs_SV = torch.softmax(shifted_SV / temperature_S[:, None], dim=-1)
    if all(one.top_p >= 1 for one in samplings):  # spares the sort
        return torch.multinomial(probs_SV, 1, generator=generator)[:, 0]
    sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    kept_SV = sorted_SV.masked_fill(before_SV >= top_p_S[:, None], 0.0)
    picked_S1 = torch.multinomial(kept_SV, 1, generator=generator)
    return order_SV.gather(1, picked_S1)[:, 0]
