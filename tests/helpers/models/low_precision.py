"""Logits of 16-bit models, where a rounding error can change which experts a token gets.

A gate whose two best experts nearly tie may choose the other one in another order of summation, on
another CPU, or in another dtype. Such a token's logits are far off and nobody's defect: plain
transformers differs from itself by as much.

Shape suffixes: B = batch, S = sequence, V = vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

# Largest difference of logits of order 1 that rounding explains when the same experts were chosen.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of all tokens, those that may be routed as neither of the references routes them.
MAX_REROUTED = 0.1


def in_float32(model: Any) -> Any:
    """The same weights, computed in float32: what both 16-bit results approximate."""
    return copy.deepcopy(model).float()


def assert_close_or_rerouted(
    given_BSV: Tensor, plain_BSV: Tensor, truth_BSV: Tensor, dtype: torch.dtype
) -> None:
    """Each token is near plain transformers in ``dtype`` or near the float32 truth, up to a few
    whose routing no reference shares."""
    to_plain, to_truth = (
        (given_BSV.float() - other.float()).abs().amax(-1) for other in (plain_BSV, truth_BSV)
    )
    error_BS = torch.minimum(to_plain, to_truth)
    far = int((error_BS > TOLERANCE[dtype]).sum())
    assert far <= MAX_REROUTED * error_BS.numel(), (
        f"{far} of {error_BS.numel()} tokens are off by more than {TOLERANCE[dtype]}; "
        f"the largest error is {float(error_BS.max()):.3g}"
    )
