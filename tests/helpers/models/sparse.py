"""Checkpoints of published sizes whose headers are right and whose data are holes in the files."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch

from moesaic.models.folder.files import INDEX_FILE
from moesaic.models.trunk.config import config_from_dict
from moesaic.models.trunk.trunk import meta_model

SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def sparse_deepseek(folder: Path, shards: int = 160) -> int:
    """DeepSeek-V3 as it is published, 670 GB: its headers are right, its data are holes in the
    files. Gives the number of tensors."""
    config = config_from_dict({"model_type": "deepseek_v3"})
    config.architectures = ["DeepseekV3ForCausalLM"]
    block = [128, 128]
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": block}
    config.save_pretrained(folder)
    plain: dict[str, tuple[int, ...]] = {}
    for name, tensor in meta_model(config).state_dict().items():
        if re.search(r"mlp\.experts\.(gate_up|down)_proj$", name):
            experts, rows, columns = tensor.shape
            parts = ("gate", "up") if "gate_up" in name else ("down",)
            shape = rows // len(parts), columns
            start = name.rpartition(".")[0]
            for expert in range(experts):
                plain |= {f"{start}.{expert}.{part}_proj.weight": shape for part in parts}
        else:
            plain[name] = tuple(tensor.shape)
    stored: list[tuple[str, str, tuple[int, ...]]] = []
    for name, shape in plain.items():
        if not name.endswith("_proj.weight"):
            stored.append((name, "BF16", shape))
            continue
        scales = tuple(-(-size // 128) for size in shape)
        stored += [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", scales)]
    per_shard = -(-len(stored) // shards)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for name, kind, shape in stored[shard * per_shard : (shard + 1) * per_shard]:
            size = SIZES[kind] * torch.Size(shape).numel()
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
            index[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    return len(stored)
