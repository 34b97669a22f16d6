"""Parameters that stand for the experts' tensors in a trunk that is trained.

A trainer sorts parameters into groups by name, freezes them, clips and drops their gradients. In a
trunk the experts' parameters are gone. A stand-in has the name of one and as many dimensions, but a
single element, and stands for the tensor of all experts of its layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...proto.errors import BadInput, InternalError
from ..trunk.experts_layers import ExpertsLayer, expert_parameters, shared_parameters


@dataclass(frozen=True, slots=True)
class StandIn:
    """One parameter, and what it stands for."""

    layer: int
    name: str  # in the pool: of each expert's tensor, or of one that all experts of a layer share
    target: str  # in the model
    parameter: nn.Parameter


class StandIns:
    """The stand-ins of a trunk; `close` takes them out again.

    ``layers`` are those of the same model with its experts' parameters, which may be on the meta
    device. Stand-ins have ``dtype``, the experts'. They are neither in a state dict nor taken from
    one. Raises BadInput if the trunk has some already.
    """

    def __init__(
        self, trunk: nn.Module, layers: Iterable[ExpertsLayer], dtype: torch.dtype
    ) -> None:
        self.layers: Mapping[int, tuple[StandIn, ...]]
        self._owners: list[tuple[nn.Module, str]] = []
        self._hooks: list[Any] = []
        device = next(trunk.parameters()).device
        wanted = {layer: _names_in_pool(layer) for layer in layers}
        for layer, names in wanted.items():
            for name in names:
                module, leaf = _place(trunk, f"{layer.name}.{name}")
                if module._parameters.get(leaf) is not None:
                    raise BadInput(
                        f"{layer.name}.{name} is in the model: it is open for training already, or "
                        "has its own experts"
                    )
        found: dict[int, tuple[StandIn, ...]] = {}
        for layer, names in wanted.items():
            made = []
            for name, (in_pool, dimensions) in names.items():
                target = f"{layer.name}.{name}"
                parameter = nn.Parameter(torch.zeros((1,) * dimensions, dtype=dtype, device=device))
                self._put(*_place(trunk, target), parameter)
                made.append(StandIn(layer.layer, in_pool, target, parameter))
            found[layer.layer] = tuple(made)
        self.layers = found

    def __iter__(self) -> Iterator[StandIn]:
        return (one for layer in self.layers.values() for one in layer)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, leaf in self._owners:
            module._parameters.pop(leaf, None)
        self._hooks.clear()
        self._owners.clear()

    def _put(self, module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
        module.register_parameter(leaf, parameter)
        self._owners.append((module, leaf))

        def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
            state.pop(f"{prefix}{leaf}", None)

        def take_own(
            _: nn.Module,
            state: dict[str, Any],
            prefix: str,
            __: object,
            ___: bool,
            ____: list[str],
            unexpected: list[str],
            _____: list[str],
        ) -> None:
            if f"{prefix}{leaf}" in state:
                unexpected.append(f"{prefix}{leaf}")
            # It is loaded from itself, and so is not missing.
            state[f"{prefix}{leaf}"] = parameter

        self._hooks += [
            module.register_state_dict_post_hook(leave_out),
            module.register_load_state_dict_pre_hook(take_own),
        ]


def _names_in_pool(layer: ExpertsLayer) -> dict[str, tuple[str, int]]:
    """Return (name in the pool, dimensions) of each parameter of an experts module."""
    found = {
        name: (layer.pool_name(name), one.dim())
        for name, one in (*expert_parameters(layer), *shared_parameters(layer))
    }
    if not found:
        raise InternalError(f"{layer.name}: its parameters are stripped; give the meta model's")
    return found


def _place(trunk: nn.Module, target: str) -> tuple[nn.Module, str]:
    owner, _, leaf = target.rpartition(".")
    return trunk.get_submodule(owner), leaf
