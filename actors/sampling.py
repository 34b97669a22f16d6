"""Choosing tokens by chance.

Shape suffixes: S = rows, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this a temperature is greedy: dividing by it would overflow fp32.
MIN_TEMPERATURE = 1e-5


def sample_top_p(
    logits_SV: Tensor, temperature_S: Tensor, top_p_S: Tensor, generator: torch.Generator
) -> Tensor:
    """One token per row, ``(S,)``: temperature first, then the smallest set that holds top_p."""
    shifted_SV = logits_SV - logits_SV.amax(dim=-1, keepdim=True)
    probs_SV = torch.softmax(shifted_SV / temperature_S[:, None], dim=-1)
    if bool((top_p_S >= 1).all()):
        return torch.multinomial(probs_SV, 1, generator=generator)[:, 0]
    sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    kept_SV = sorted_SV.masked_fill(before_SV >= top_p_S[:, None], 0.0)
    picked_S1 = torch.multinomial(kept_SV, 1, generator=generator)
    return order_SV.gather(1, picked_S1)[:, 0]
