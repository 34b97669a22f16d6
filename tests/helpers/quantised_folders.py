"""What is read of quantised checkpoints, and how their folders are changed or damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.actors.trunk.attach import expert_tensors
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import load_trunk
from tests.helpers.quantising import Stored

Form = Callable[[str], tuple[Path, Any]]
Damage = Callable[[Path], None]


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(folder, read_config(folder), dtype=dtype)


def trunk_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_trunk(folder, dtype=dtype, device=torch.device("cpu"))


def read_everything(folder: Path) -> None:
    found = checkpoint(folder)
    for layer in found.layers.values():
        for expert in range(layer.num_experts):
            found.read(layer.layer, expert)
    trunk_of(folder)


def assert_same(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Experts and trunk bit by bit what ``model`` has."""
    found = checkpoint(folder, dtype)
    for layer in experts_layers(model):
        for expert in range(layer.num_experts):
            expected = expert_tensors(layer, expert)
            given = found.read(layer.layer, expert).tensors()
            assert given.keys() == expected.keys()
            for name, tensor in given.items():
                assert tensor.dtype == dtype
                assert torch.equal(tensor, expected[name].to(dtype)), (layer.layer, expert, name)
    expected = dict(model.named_parameters())
    for name, parameter in trunk_of(folder, dtype).named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def merged(folder: Path) -> Stored:
    """All tensors of a folder, whose files are gone."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        file.unlink()
    (folder / INDEX_FILE).unlink()
    return tensors


def edit(pattern: str, change: Callable[[Tensor], Tensor | None]) -> Damage:
    """Change or (None) remove every tensor whose name matches."""

    def damage(folder: Path) -> None:
        tensors = merged(folder)
        hit = [name for name in tensors if re.search(pattern, name)]
        assert hit, pattern
        for name in hit:
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed.contiguous()
        save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})

    return damage


def replaced(value: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": value}))

    return damage
