"""A safetensors file with some experts of a model, in the form that the pool has them.

The tensor ``up`` of expert 3 of layer 1 is named ``1.3.up``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...proto.errors import CheckpointError
from .files import open_weights

Place = tuple[int, int]  # layer, expert


def write_experts(file: Path, experts: Mapping[Place, Mapping[str, Tensor]]) -> None:
    """Write experts to ``file``. Raises OSError."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for (layer, expert), tensors in experts.items():
        for name, tensor in tensors.items():
            memory = tensor.untyped_storage().data_ptr()
            # Safetensors refuses tensors that share memory.
            named[f"{layer}.{expert}.{name}"] = (
                tensor.clone(memory_format=torch.contiguous_format)
                if memory in seen
                else tensor.contiguous()
            )
            seen.add(memory)
    try:
        save_file(named, file)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_expert(file: Path, layer: int, expert: int) -> dict[str, Tensor]:
    """Read one expert. Raises CheckpointError if the file is damaged or does not have it."""
    prefix = f"{layer}.{expert}."
    with open_weights(file) as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
        try:
            found = {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: expert {expert} of layer {layer}: {error}") from error
    if not found:
        raise CheckpointError(f"{file}: the file does not contain expert {expert} of layer {layer}")
    return found


def shapes_of_experts(file: Path) -> dict[Place, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of each expert in ``file``. Raises CheckpointError."""
    found: dict[Place, dict[str, tuple[int, ...]]] = {}
    with open_weights(file) as opened:
        for key in opened.keys():  # noqa: SIM118
            layer, _, rest = key.partition(".")
            expert, _, name = rest.partition(".")
            if not (layer.isdecimal() and expert.isdecimal() and name):
                raise CheckpointError(
                    f"{file}: {key} does not name a tensor of an expert, such as 0.3.up"
                )
            shape = tuple(opened.get_slice(key).get_shape())
            found.setdefault((int(layer), int(expert)), {})[name] = shape
    return found
