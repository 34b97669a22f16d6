"""The experts modules of a model, and what a host must know about each."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...kernels.ffn import ExpertForm, PostNorm
from ...proto.errors import UnsupportedModel
from .adapters import adapters_of
from .config import short

# Names of configurations for the number of experts, and for which layers have experts.
_COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "moe_num_primary_experts"),
)


_DENSE = (
    *("first_k_dense_replace", "num_dense_layers", "dense_layers", "mlp_only_layers"),
    *("decoder_sparse_step", "sparse_step", "encoder_sparse_step", "mlp_layer_types"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_layer_freq"),
    *("moe_layers", "interleave_moe_layer_step", "expert_layer_period", "expert_layer_offset"),
    *("layers_block_type", "enable_moe_block", "num_sparse_encoder_layers"),
    "num_sparse_decoder_layers",
)


_POOL_NAMES = {
    "up_proj": "up",
    "down_proj": "down",
    "up_proj_bias": "up_bias",
    "down_proj_bias": "down_bias",
    # Shared by all experts of a layer (`SHARED_NAMES`).
    "post_expert_norm.weight": "norm",
    "post_expert_norm.bias": "norm_bias",
}


@dataclass(frozen=True, slots=True)
class ExpertsLayer:
    """One experts module of a model, and what a host must know about it."""

    layer: int
    name: str
    module: nn.Module
    num_experts: int
    hidden_size: int

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    def pool_name(self, parameter: str) -> str:
        """Return how the pool calls an expert's part of a parameter, or one that experts share."""
        return _POOL_NAMES[parameter.removeprefix("gate_")]

    @property
    def has_post_norm(self) -> bool:
        """Whether experts have a norm after them; older transformers have none."""
        return getattr(self.module, "has_post_expert_norm", False)

    def form(self) -> ExpertForm:
        module: Any = self.module
        return ExpertForm(
            transposed=module.is_transposed,
            activate=module._apply_gate if module.has_gate else module.act_fn,
            post_norm=_norm_of(module.post_expert_norm) if self.has_post_norm else None,
        )


def _norm_of(module: nn.Module) -> PostNorm:
    """Return a norm as a function of its parameters, which come with each expert."""
    names = {"norm": "weight", "norm_bias": "bias"}

    def post_norm(y_RH: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        parameters = {names[name]: tensor for name, tensor in shared.items()}
        return functional_call(module, parameters, (y_RH,))

    return post_norm


def forms_anywhere(layers: Iterable[ExpertsLayer]) -> dict[int, ExpertForm]:
    """Return the arithmetic of the layers that a process without their weights can compute.

    What experts have in common must be a function of tensors that come with each expert.
    """
    return {layer.layer: layer.form() for layer in layers if not list(layer.module.buffers())}


def is_experts_module(module: nn.Module) -> bool:
    """Return whether it has transformers' `use_experts_implementation`, or is an adapter's."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")


def _layer_numbers(names: list[str]) -> list[int]:
    """Return each layer's index among the decoder layers, or a running number if not unique."""
    numbers = [[int(n) for n in re.findall(r"\.(\d+)(?=\.|$)", name)] for name in names]
    last = [found[-1] if found else -1 for found in numbers]
    unique = len(set(last)) == len(last) and min(last, default=-1) >= 0
    return last if unique else list(range(len(names)))


def _sizes(module: Any) -> tuple[int, int]:
    """Return (number of experts, hidden size).

    They come from the parameters' shapes, because configurations have many names for them.
    """
    down = module.down_proj
    hidden = down.shape[2] if module.is_transposed else down.shape[1]
    return down.shape[0], hidden


def _why_no_experts(model: nn.Module) -> str:
    """Return why a model has no experts module: by its architecture, or by its configuration."""
    here = vars(sys.modules[type(model).__module__])
    has_some = "use_experts_implementation" in here or "PoolExperts" in here
    if not has_some and not adapters_of(model).keys() & here.keys():
        return (
            "no experts module of this architecture dispatches through transformers' experts "
            "interface, and it has no adapter, so its experts cannot be served from a pool; models "
            "of the Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss ... families can"
        )
    config: Any = model.config
    text = config.get_text_config()
    values = text.to_dict()
    values |= {f"ffn_config.{n}": v for n, v in (values.get("ffn_config") or {}).items()}
    none = next((n for n in values if n.rpartition(".")[2] in _COUNTS and values[n] == 0), None)
    if none is not None:
        return (
            f"config.{none} is {values[none]}: the model has no experts, so there is nothing to "
            "serve from a pool; serve it with transformers or vLLM alone"
        )
    layers = getattr(text, "num_hidden_layers", "all")
    said = [f"{n}={short(values[n])}" for n in _DENSE if values.get(n) is not None]
    return (
        f"{', '.join(said) or 'config.json'} of {layers} layers: no sparse layer, so there are no "
        "experts to serve from a pool; serve it with transformers or vLLM alone"
    )


def experts_layers(model: nn.Module) -> list[ExpertsLayer]:
    """Find the experts modules of a model that still has its (possibly meta) expert parameters.

    Raises UnsupportedModel if there are none.
    """
    found = [(name, m) for name, m in model.named_modules() if is_experts_module(m)]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__}: {_why_no_experts(model)}")
    numbers = _layer_numbers([name for name, _ in found])
    layers = [
        ExpertsLayer(number, name, module, *_sizes(module))
        for number, (name, module) in zip(numbers, found, strict=True)
    ]
    if not all(layer.num_experts for layer in layers):
        raise UnsupportedModel(f"{type(model).__name__}: {_why_no_experts(model)}")
    for layer in layers:
        for name, _ in shared_parameters(layer):
            if name not in _POOL_NAMES:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {layer.name}.{name}: in a pool the experts of a "
                    "layer can share a post-expert norm, and no other parameters"
                )
    return layers


def expert_parameters(layer: ExpertsLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of an experts module that have one slice for each expert."""
    for name in (layer.up_name, "down_proj", f"{layer.up_name}_bias", "down_proj_bias"):
        parameter = layer.module._parameters.get(name)
        if parameter is not None:
            yield name, parameter


def shared_parameters(layer: ExpertsLayer) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a post-expert norm, which all experts of a layer share.

    In the pool each expert has a copy.
    """
    own = {name for name, _ in expert_parameters(layer)}
    return ((name, one) for name, one in layer.module.named_parameters() if name not in own)


def expert_tensors(layer: ExpertsLayer, expert: int) -> dict[str, Tensor]:
    """Return one expert of a model in memory as the pool has it, on the CPU."""
    own = {name: one.data[expert] for name, one in expert_parameters(layer)}
    own |= {name: one.data for name, one in shared_parameters(layer)}
    return {layer.pool_name(name): tensor.cpu().contiguous() for name, tensor in own.items()}


def expert_shapes(layer: ExpertsLayer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one expert's tensors, by their names in the pool."""
    own = {layer.pool_name(n): tuple(p.shape[1:]) for n, p in expert_parameters(layer)}
    return own | shared_shapes(layer)


def shared_shapes(layer: ExpertsLayer) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what all experts of a layer share, by the names in the pool."""
    return {layer.pool_name(n): tuple(p.shape) for n, p in shared_parameters(layer)}


def expert_bytes(layer: ExpertsLayer, dtype: torch.dtype) -> int:
    """Return the bytes of one expert of a layer."""
    return sum(math.prod(shape) for shape in expert_shapes(layer).values()) * dtype.itemsize
