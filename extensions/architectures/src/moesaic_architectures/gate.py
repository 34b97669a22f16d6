"""The gate of both architectures: the most probable experts of a softmax over all.

Shape suffixes: H = hidden size, K = assignments of a token, E = experts, ... = tokens in any shape.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear


def most_probable(x_H: Tensor, weight_EH: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return (weights, ids), both (..., K), for ``x_H`` of (..., H); the sums are not 1.

    The softmax is computed in float32, whatever the model's dtype.
    """
    probabilities_E = linear(x_H.float(), weight_EH.float()).softmax(dim=-1)
    weights_K, ids_K = probabilities_E.topk(top_k, dim=-1)
    return weights_K, ids_K
