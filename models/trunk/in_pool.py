"""The function that an experts module of a trunk calls: the pool.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from ...proto.errors import UnsupportedModel
from .routing_record import is_recorded, once_in_a_layer

IMPLEMENTATION = "moesaic"

# (x_TH, ids_TK, weights_TK) -> y_TH; an assignment outside [0, experts) is skipped
PoolFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class LearningPool(Protocol):
    """The pool for a layer whose experts are trained."""

    @property
    def dtype(self) -> torch.dtype:
        """That of the experts, in which they take hidden states."""
        ...

    def begin(self) -> object:
        """Return what names a call's gradients, for `backward`."""
        ...

    def forward(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, call: object | None = None
    ) -> Tensor:
        """Return the layer's result, (T, H).

        ``call`` is what `begin` returned, and may keep what is needed until `backward`; None: what
        is kept here would outlive the activations of the layer, or there is no backward half.
        """
        ...

    def backward(
        self, call: object, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, grad_y_TH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the weights; the pool keeps those of the experts."""
        ...


class _InPool(torch.autograd.Function):
    """The pool's answer as a node of the graph, so that a backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, pool: PoolFunction, x_TH: Tensor, ids_TK: Tensor, w_TK: Tensor) -> Tensor:
        return pool(x_TH, ids_TK, w_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedModel(
            "backward through experts in the pool: this model was opened to be served; call it "
            "under torch.no_grad()"
        )


class _Learning(torch.autograd.Function):
    """A layer of the pool as a node of the graph, whose backward pass goes through the pool."""

    @staticmethod
    def forward(
        ctx: Any, pool: LearningPool, anchor: Tensor, x_TH: Tensor, ids_TK: Tensor, w_TK: Tensor
    ) -> Tensor:
        ctx.pool, ctx.call = pool, pool.begin()
        ctx.save_for_backward(x_TH, ids_TK, w_TK)
        if is_recorded():
            return once_in_a_layer(lambda: pool.forward(x_TH, ids_TK, w_TK))
        return pool.forward(x_TH, ids_TK, w_TK, ctx.call)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y_TH: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # With retain_graph a second backward pass comes here, and would be added up as well.
        if ctx.call is None:
            raise UnsupportedModel(
                "a second backward pass through one graph would count its gradients twice; run the "
                "forward pass again"
            )
        call, ctx.call = ctx.call, None
        grad_x_TH, grad_w_TK = ctx.pool.backward(call, *ctx.saved_tensors, grad_y_TH)
        return None, None, grad_x_TH, None, grad_w_TK


def experts_forward(module: nn.Module, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run an experts module's forward in the pool that `connect_experts` gave it."""
    pool = getattr(module, "pool", None)
    if pool is None:
        raise UnsupportedModel(
            f"{type(module).__name__}: experts_implementation is {IMPLEMENTATION!r}, but the model "
            "is not attached to a pool; use Cluster.attach or Cluster.from_pretrained"
        )
    if callable(pool):
        return _InPool.apply(pool, x_TH, ids_TK, weights_TK)  # pyright: ignore[reportReturnType]
    given_dtype, x_TH = x_TH.dtype, x_TH.to(pool.dtype)  # autocast may have narrowed it
    if not torch.is_grad_enabled():
        return once_in_a_layer(lambda: pool.forward(x_TH, ids_TK, weights_TK)).to(given_dtype)
    # Experts learn whatever else does: autograd only visits nodes with an input that needs it.
    anchor = torch.empty(0, requires_grad=True)
    found: Any = _Learning.apply(pool, anchor, x_TH, ids_TK, weights_TK)
    return found.to(given_dtype)


ExpertsInterface.register(IMPLEMENTATION, experts_forward)
