"""Quantised checkpoints that are damaged or not supported: each by its name."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.model_folders import Damage, edit, read_everything, remove
from tests.helpers.models.quantising import Form, replaced


def fill(pattern: str, value: float) -> Damage:
    """Put ``value`` into the last element."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        flat[-1] = torch.tensor(value).to(tensor.dtype)
        return flat.view(tensor.shape)

    return edit(pattern, change)


def quantization(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"] |= values
        file.write_text(json.dumps(config))

    return damage


DAMAGED: list[tuple[str, str, Damage, str]] = [
    # name, form, what is done to it, what the message says
    (
        "no-scales",
        "gpt-oss",
        remove(r"1\..*up_proj_scales"),
        "up_proj_blocks is torch.uint8, and there are no scales",
    ),
    ("no-blocks", "gpt-oss", remove(r"1\..*up_proj_blocks"), "lacks model.layers.1"),
    ("nan", "gpt-oss", fill(r"1\..*down_proj_scales", 255), "down_proj_scales holds a scale"),
    (
        "too-large",
        "gpt-oss",
        fill(r"1\..*down_proj_scales", 254),
        "blocks holds values that are not",
    ),
    ("rows", "gpt-oss", edit(r"1\..*n_proj_scales", lambda t: t[:, 1:]), "needs (8, 64, 3)"),
    (
        "groups",
        "gpt-oss",
        edit(r"1\..*n_proj_scales", lambda t: t[..., 1:]),
        "has shape (8, 64, 2)",
    ),
    ("fewer", "gpt-oss", edit(r"1\..*n_proj_scales", lambda t: t[:7]), "has shape (7, 64, 3)"),
    (
        "flat",
        "gpt-oss",
        edit(r"1\..*n_proj_scales", lambda t: t[0, 0, 0]),
        "down_proj_scales has shape ()",
    ),
    ("floats", "gpt-oss", edit(r"n_proj_scales", lambda t: t.float()), "scales of torch.float32"),
    ("codes", "gpt-oss", edit(r"n_proj_blocks", lambda t: t.to(torch.int8)), "is torch.int8 (8,"),
    (
        "halves",
        "gpt-oss",
        edit(r"n_proj_blocks", lambda t: t[..., :8]),
        "64, 3, 8) instead of uint8",
    ),
    ("smaller", "gpt-oss", edit(r"n_proj_(blo|sca)", lambda t: t[:, 1:]), "has shape (8, 96, 63)"),
    ("no-scale", "qwen3", remove(r"1\..*s\.3\.up.*scale"), "e4m3fn, and there are no scales"),
    (
        "no-weight",
        "qwen3",
        remove(r"1\..*s\.3\.up.*weight$"),
        "lacks model.layers.1.mlp.experts.3.up_proj.weight",
    ),
    ("trunk", "qwen3", remove(r"1\..*q_proj.*scale"), "q_proj.weight is torch.float8_e4m3fn, and"),
    ("trunk-rows", "qwen3", edit(r"1\..*o_proj.*scale", lambda t: t[1:]), "weight needs (2, 1)"),
    ("trunk-nan", "qwen3", fill(r"1\..*o_proj.*scale", math.nan), "weight_scale_inv holds a scale"),
    (
        "endless",
        "qwen3",
        fill(r"1\..*s\.3\.up.*scale", math.inf),
        "3.up_proj.weight_scale_inv holds",
    ),
    (
        "nan-code",
        "qwen3",
        fill(r"1\..*s\.3\.up.*weight$", math.nan),
        "3.up_proj.weight holds values",
    ),
    ("grid", "qwen3", edit(r"1\..*s\.3\.up.*scale", lambda t: t[:, :1]), "weight needs (2, 2)"),
    (
        "vector",
        "qwen3",
        edit(r"1\..*s\.3\.up.*weight$", lambda t: t[0]),
        "instead of a torch.float8",
    ),
    (
        "plain",
        "qwen3",
        edit(r"1\..*s\.3\.up.*weight$", lambda t: t.float()),
        "nothing uses model.layers.1.mlp.experts.3.up_proj.weight_scale_inv",
    ),
    (
        "int-scale",
        "qwen3",
        edit(r"1\..*s\.3\.up.*scale", lambda t: t.int()),
        "scales of torch.int32 instead of floats or E8M0",
    ),
    (
        "e5m2",
        "qwen3",
        edit(r"s\.3\.up.*weight$", lambda t: t.to(torch.float8_e5m2)),
        "is torch.float8_",
    ),
    (
        "v4-nan",
        "deepseek-v4",
        edit(r"1\..*s\.3\.w2.scale", lambda t: t.view(torch.uint8).fill_(255)),
        "w2.scale holds a scale",
    ),
    (
        "v4-floats",
        "deepseek-v4",
        edit(r"1\..*s\.3\.w2.scale", lambda t: t.float()),
        "scales of torch.float32",
    ),
    (
        "v4-odd",
        "deepseek-v4",
        edit(r"1\..*s\.3\.w2.weight", lambda t: t[:, 1:]),
        "w2.weight is torch.int8 (64, 47)",
    ),
    (
        "two-scales",
        "one-scale",
        edit(r"1\..*s\.3\.w2.weight_scale", lambda t: t.repeat(2)),
        "needs (1, 1)",
    ),
    ("awq", "qwen3", quantization(quant_method="awq"), "quant_method: 'awq' is not supported"),
    (
        "compressed",
        "qwen3",
        quantization(quant_method="compressed-tensors"),
        "quantization_config.format: None of compressed-tensors is not",
    ),
    ("no-method", "qwen3", quantization(quant_method=None), "quant_method: None is not supported"),
    (
        "format",
        "qwen3",
        quantization(fmt="e3m4"),
        "quantization_config.fmt: 'e3m4' is not supported",
    ),
    (
        "block",
        "qwen3",
        quantization(weight_block_size=[128]),
        "weight_block_size: [128] is not two",
    ),
    ("zero", "qwen3", quantization(weight_block_size=[0, 128]), "[0, 128] is not two positive"),
    ("text", "qwen3", quantization(weight_block_size="128"), "'128' is not two positive"),
    ("true", "qwen3", quantization(weight_block_size=[True, 1]), "[True, 1] is not two positive"),
    ("other-block", "qwen3", quantization(weight_block_size=[64, 64]), "needs (3, 3)"),
    ("number", "qwen3", replaced(8), "quantization_config: 8 is not a mapping"),
    (
        "silent",
        "qwen3",
        replaced(None),
        "are torch.float8_e4m3fn, which is no dtype of plain weights, and config.json",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [case[1:] for case in DAMAGED],
    ids=[f"{case[1]}-{case[0]}" for case in DAMAGED],
)
def test_damage(name: str, damage: Damage, words: str, form: Form, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(form(name)[0], folder)
    damage(folder)
    with pytest.raises((CheckpointError, UnsupportedModel), match=re.escape(words)) as raised:
        read_everything(folder)
    assert str(folder) in str(raised.value)
