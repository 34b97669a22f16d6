"""Quantised checkpoints: every bit of every expert and trunk, of no more bytes than are needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from moesaic.cli.main import main
from moesaic.models.folder import quantised
from moesaic.models.folder.files import SINGLE_FILE, read_tensor
from moesaic.models.source import resolve_model
from moesaic.models.trunk.describe import describe
from moesaic.proto.errors import CheckpointError
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.model_folders import assert_same, checkpoint, merged, trunk_of
from tests.helpers.models.quantising import FORMS, Form, fp8

# ---- every bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str, form: Form) -> None:
    assert_same(*form(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_rounding_to_the_pools_dtype(name: str, dtype: torch.dtype, form: Form) -> None:
    assert_same(*form(name), dtype)


@pytest.mark.parametrize("form_name", ["gpt-oss", "qwen3"])
def test_a_quantised_checkpoint_takes_plain_floats(form_name: str, form: Form) -> None:
    folder, _ = form(form_name)
    found = checkpoint(folder, torch.bfloat16)
    layer = next(iter(found.layers))
    before = found.read(layer, 1).tensors()
    named = found.tensors.on_disk(layer, 1, before)
    assert all(tensor.dtype == torch.bfloat16 for tensor in named.values())
    again = found.tensors.named(named)[layer, 1]
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    codes = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in named.items()}
    with pytest.raises(CheckpointError, match="also those of a quantised model"):
        found.tensors.named(codes)


def test_a_trunk_is_plain_afterwards(form: Form) -> None:
    folder, _ = form("qwen3")
    trunk = trunk_of(folder, torch.bfloat16)
    assert not hasattr(trunk.config, "quantization_config")
    assert trunk.generation_config.eos_token_id == [2, 7]
    assert {p.dtype for p in trunk.parameters()} == {torch.bfloat16}


def test_fused_experts(tmp_path: Path) -> None:
    """Named as in memory, as transformers itself writes an FP8 model. Blocks of 8 rows end where
    the gate's 24 rows do."""
    folder = tmp_path / "m"
    model = fp8(tiny_model("qwen3_moe"), folder, block=(8, 7))
    tensors = merged(folder)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):
            gate, up, down = (
                torch.stack(
                    [tensors.pop(f"{prefix}.{e}.{one}_proj.weight{suffix}") for e in range(8)]
                )
                for one in ("gate", "up", "down")
            )
            tensors[f"{prefix}.gate_up_proj{suffix}"] = torch.cat([gate, up], dim=1)
            tensors[f"{prefix}.down_proj{suffix}"] = down
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
    assert_same(folder, model)


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3", "deepseek-v4"])
def test_only_one_experts_bytes_are_read(
    name: str, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = form(name)
    read: dict[str, int] = {}

    def spy(file: Path, key: str, expert: int | None = None, rows: int = 1) -> Tensor:
        tensor = read_tensor(file, key, expert, rows)
        read[key] = read.get(key, 0) + tensor.nbytes
        return tensor

    monkeypatch.setattr(quantised, "read_tensor", spy)
    found = checkpoint(folder)
    found.form(1)
    assert not read, "opening a checkpoint reads no tensor"
    weights = found.read(1, 3).tensors()
    if name == "gpt-oss":
        elements = weights["up"].numel() + weights["down"].numel()
        biases = weights["up_bias"].numel() + weights["down_bias"].numel()
        assert sum(read.values()) == elements // 2 + elements // 32 + 2 * biases
    else:
        assert len(read) == 6, "three projections and their scales"
        assert all(".1." in key and ".experts.3." in key for key in read)
    read.clear()
    trunk_of(folder)
    assert read
    assert not [key for key in read if re.search(r"(?<!shared_)experts\.", key)]


# ---- transformers' own dequantisation -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt-oss", Mxfp4Config(dequantize=True)),
        # It knows no blocks that are not full, but takes a matrix smaller than one.
        ("small-deepseek-v3", FineGrainedFP8Config(dequantize=True)),
        ("deepseek-v4", FineGrainedFP8Config(dequantize=True)),
    ],
    ids=["gpt-oss", "deepseek-v3", "deepseek-v4"],
)
def test_transformers_reads_the_same(name: str, config: Any, form: Form) -> None:
    folder, _ = form(name)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )
    assert_same(folder, model)


# ---- what is said of them -----------------------------------------------------------------------


def test_sizes_are_those_of_the_pools_dtype(form: Form, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = form("deepseek-v3")
    found = describe(folder, torch.bfloat16)
    plain = describe(folder.with_name("m-plain"), torch.bfloat16)
    assert found.quantised == "fp8, blocks of 128 x 128"
    assert plain.quantised is None
    assert found.experts_bytes == plain.experts_bytes
    assert found.trunk_bytes + found.experts_bytes == 2 * model.num_parameters()
    held = checkpoint(folder, torch.bfloat16).read(1, 0)
    assert found.expert_bytes == held.nbytes
    assert main(["inspect", str(folder)]) == 0
    assert "fp8, blocks of 128 x 128, held as bfloat16" in capsys.readouterr().out
    assert main(["inspect", str(folder.with_name("m-plain"))]) == 0
    assert "checkpoint" not in capsys.readouterr().out


def test_other_forms_beside_a_checkpoint_are_not_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = ["model.safetensors", "original/model.safetensors", "metal/model.bin", "config.json"]

    def download(_: str, **patterns: Any) -> str:
        return "+".join(filter_repo_objects(files, **patterns))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert str(resolve_model("openai/gpt-oss-20b")) == "model.safetensors+config.json"
