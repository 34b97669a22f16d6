"""The interface to vLLM: routed experts that are computed in the pool. A `vllm.general_plugins`.

vLLM builds each MoE layer around a `RoutedExperts`, which may be replaced from outside. In a
process that is a trunk (`in_pool`) each of them holds no weights and calls the pool; in other
processes the plug-in does nothing. All of vLLM's names that are relied on are in this folder, and
`tests/with_vllm` checks that they behave as expected.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

# vLLM is optional.
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ....proto.errors import UnsupportedModel

# Returns the function that computes the experts of a decoder layer, from the layer's index.
LayerOf = Callable[[int], Callable[[Tensor, Tensor, Tensor], Tensor]]

_layer_of: LayerOf | None = None
# The layers' functions of the model that was built in this process, by layer.
_layers: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}


# A compiler does not look inside an operator; otherwise it would keep the answer of the traced
# call. Operators made by `torch.library.custom_op` cost more in each call.
_operators = torch.library.Library("moesaic", "FRAGMENT")
_operators.define("experts(Tensor x_TH, Tensor ids_TK, Tensor weights_TK, int layer) -> Tensor")


@torch.library.impl(_operators, "experts", "CompositeExplicitAutograd")
def _(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Tensor:
    return _layers[layer](x_TH, ids_TK, weights_TK)


@torch.library.register_fake("moesaic::experts", lib=_operators)
def _(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, layer: int) -> Tensor:
    return torch.empty_like(x_TH)


@contextmanager
def in_pool(layer_of: LayerOf) -> Iterator[None]:
    """Give the models that vLLM builds in this context their experts in the pool."""
    global _layer_of
    assert _layer_of is None, "one model at a time"
    _layer_of = layer_of
    _layers.clear()
    try:
        register()
        yield
    finally:
        _layer_of = None


def register() -> None:
    """Replace vLLM's routed experts.

    vLLM calls this in each of its processes, maybe several times.
    """
    if _layer_of is None:
        return
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for base in (RoutedExperts, *_below(RoutedExperts)):
        if base.__name__ not in op_registry_oot:
            PluggableLayer.register_oot(_pooled(base), name=base.__name__)


def _below(base: type) -> Iterator[type]:
    """Yield all subclasses: architectures have their own, which load weights in different ways."""
    for one in base.__subclasses__():
        yield one
        yield from _below(one)


def _pooled(base: Any) -> type:
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    class PoolMethod(FusedMoEMethodBase):
        """Calls the pool; there are no weights to create, load or quantise."""

        def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
            pass

        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def maybe_roundup_sizes(self, hidden: int, intermediate: int, *_: Any) -> tuple[int, int]:
            return hidden, intermediate

        @property
        def is_monolithic(self) -> bool:
            return False

        def apply(
            self,
            layer: Any,
            x: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            shared_experts: Any = None,
            shared_experts_input: Tensor | None = None,
        ) -> Tensor:
            if layer.apply_router_weight_on_input:
                x, topk_weights = (
                    x * topk_weights.to(x.dtype),
                    topk_weights.new_ones(topk_weights.shape),
                )
            return torch.ops.moesaic.experts(x, topk_ids, topk_weights, layer.number)

    class PoolExperts(base):
        """Routed experts without weights."""

        def __init__(self, layer_name: str, *arguments: Any, **named: Any) -> None:
            super().__init__(layer_name, *arguments, **named)
            if _layer_of is None:
                raise UnsupportedModel(f"{layer_name}: this process has no pool for the experts")
            self.number = layer_number(layer_name)
            _layers[self.number] = _layer_of(self.number)

        def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
            return PoolMethod(moe_config)

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
            """Skip the weights: hosts read them from the checkpoint."""
            for name, _ in weights:
                yield name

    PoolExperts.__name__ = f"Pool{base.__name__}"
    return PoolExperts


def layer_number(layer_name: str) -> int:
    """Return a layer's number: 3 for ``model.layers.3.mlp.experts``. Raises UnsupportedModel."""
    numbers = re.findall(r"\.(\d+)(?=\.)", f"{layer_name}.")
    if not numbers:
        raise UnsupportedModel(f"{layer_name}: this name of a layer contains no number")
    return int(numbers[-1])
