"""Folders of small models: saved, read as hosts and trunks read them, and damaged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.models.export.export import ExpertsOf
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.experts_layers import expert_tensors, experts_layers
from moesaic.models.trunk.trunk import load_trunk
from tests.helpers.models.architectures import tiny_model

Damage = Callable[[Path], None]


def saved(folder: Path, name: str = "mixtral", **options: Any) -> PreTrainedModel:
    model = tiny_model(name, **options.pop("model", {}))
    model.save_pretrained(folder, **options)
    return model


# ---- read ---------------------------------------------------------------------------------------


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return Checkpoint(folder, read_config(folder), dtype=dtype)


def trunk_of(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_trunk(folder, dtype=dtype, device=torch.device("cpu"))


def experts_of(found: Checkpoint) -> ExpertsOf:
    """Its experts, read one by one."""

    def layer(number: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for expert in range(found.layers[number].num_experts):
            yield expert, found.read(number, expert).tensors()

    return layer


def read_all(folder: Path) -> None:
    """Read every expert."""
    found = checkpoint(folder)
    for layer in found.layers.values():
        for expert in range(layer.num_experts):
            found.read(layer.layer, expert)


def read_everything(folder: Path) -> None:
    """Read every expert, and the trunk."""
    read_all(folder)
    trunk_of(folder)


def assert_same_experts(found: Checkpoint, model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Bit by bit what transformers has in memory."""
    for layer in experts_layers(model):
        for expert in range(layer.num_experts):
            expected = expert_tensors(layer, expert)
            given = found.read(layer.layer, expert).tensors()
            assert given.keys() == expected.keys()
            for name, tensor in given.items():
                assert tensor.dtype == dtype
                assert torch.equal(tensor, expected[name].to(dtype)), (layer.layer, expert, name)


def assert_same(folder: Path, model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Experts and trunk bit by bit what ``model`` has."""
    assert_same_experts(checkpoint(folder, dtype), model, dtype)
    expected = dict(model.named_parameters())
    for name, parameter in trunk_of(folder, dtype).named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


# ---- damaged ------------------------------------------------------------------------------------


def merged(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whose files are gone."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        file.unlink()
    (folder / INDEX_FILE).unlink(missing_ok=True)
    return tensors


def edit(pattern: str, change: Callable[[Tensor], Tensor | None]) -> Damage:
    """Change or (None) remove every tensor whose name matches; one file has the others, too."""

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


def remove(pattern: str) -> Damage:
    return edit(pattern, lambda tensor: None)


def config(**values: Any) -> Damage:
    """Set fields of config.json."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage
