"""The function that an experts module of a trunk calls: the pool.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from ...proto.errors import UnsupportedModel

IMPLEMENTATION = "moesaic"

# (x_TH, ids_TK, weights_TK) -> y_TH; an assignment outside [0, experts) is skipped
PoolFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class _InPool(torch.autograd.Function):
    """The pool's answer as a node of the graph, so that a backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, pool: PoolFunction, x_TH: Tensor, ids_TK: Tensor, w_TK: Tensor) -> Tensor:
        return pool(x_TH, ids_TK, w_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedModel(
            "backward through experts in the pool: training is not supported in this version; "
            "call the model under torch.no_grad()"
        )


def experts_forward(module: nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run an experts module's forward in the pool that `connect_experts` gave it."""
    pool = getattr(module, "pool", None)
    if pool is None:
        raise UnsupportedModel(
            f"{type(module).__name__}: experts_implementation is {IMPLEMENTATION!r}, but the model "
            "is not attached to a pool; use Cluster.attach or Cluster.from_pretrained"
        )
    return _InPool.apply(pool, x_TH, ids_TK, weights_TK)  # pyright: ignore[reportReturnType]


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
