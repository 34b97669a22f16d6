"""One scale for each row, or for each expert, as FP8 and compressed-tensors have them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.describe import describe
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.model_folders import (
    assert_same,
    checkpoint,
    edit,
    read_everything,
    trunk_of,
)
from tests.helpers.models.quantising import Stored, fp8, replaced, save_quantised, small_float


def rowwise(tensor: Tensor, kind: torch.dtype, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes, and one scale for all that ``dims`` reach, which keep the size 1."""
    largest = 57344.0 if kind == torch.float8_e5m2 else 448.0
    scales = tensor.float().abs().amax(dims, keepdim=True) / largest
    return (tensor.float() / scales).to(kind), scales


def worth(codes: Tensor, scales: Tensor) -> Tensor:
    """By the format's definition."""
    exponent, mantissa = (5, 2) if codes.dtype == torch.float8_e5m2 else (4, 3)
    table = torch.tensor([small_float(code, exponent, mantissa) for code in range(256)])
    return table[codes.view(torch.uint8).long()] * scales


def save_rowwise(
    folder: Path,
    name: str,
    which: str,
    dims: tuple[int, ...],
    config: dict[str, Any],
    *,
    kind: torch.dtype = torch.float8_e4m3fn,
    shape: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Any:
    def quantise(key: str, tensor: Tensor) -> tuple[Stored, Tensor] | None:
        if not re.search(which, key):
            return None
        codes, scales = rowwise(tensor, kind, dims)
        return {key: codes, f"{key}_scale": shape(scales)}, worth(codes, scales)

    return save_quantised(tiny_model(name), folder, quantise, config)


NATIVE = {"quant_method": "fp8"}
WEIGHTS: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
LINEAR = r"_proj\.weight$"


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS | {"strategy": strategy},
        "input_activations": WEIGHTS | {"strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    } | more


ROWS, ALL = (-1,), (-2, -1)
GRANITE = r"put_linear\.weight$"
LLAMA4 = r"experts\.(gate_up|down)_proj$"
SCALES: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    # architecture, which tensors, what one scale is for, quantization_config, how it is written
    "row": ("qwen3_moe", LINEAR, ROWS, NATIVE, {}),
    "row-vector": ("qwen3_moe", LINEAR, ROWS, NATIVE, {"shape": lambda s: s.flatten()}),
    "row-mixtral": ("mixtral", r"_proj|\.w\d", ROWS, NATIVE, {}),
    "channel": ("qwen3_moe", LINEAR, ROWS, compressed("channel"), {}),
    "tensor": ("qwen3_moe", LINEAR, ALL, compressed("tensor"), {"shape": lambda s: s.flatten()}),
    "naive": ("qwen3_moe", LINEAR, ROWS, compressed("channel", format="naive-quantized"), {}),
    "e5m2": ("qwen3_moe", LINEAR, ROWS, NATIVE | {"fmt": "e5m2"}, {"kind": torch.float8_e5m2}),
    "fused-one": ("granitemoe", GRANITE, (0, 1, 2), NATIVE, {"shape": lambda s: s.reshape(1)}),
    "fused-scalar": ("granitemoe", GRANITE, (0, 1, 2), NATIVE, {"shape": lambda s: s.reshape(())}),
    "fused-expert": ("granitemoe", GRANITE, ALL, NATIVE, {}),
    "fused-expert-vector": ("granitemoe", GRANITE, ALL, NATIVE, {"shape": lambda s: s.flatten()}),
    "fused-row": ("granitemoe", GRANITE, ROWS, NATIVE, {}),
    "fused-row-short": ("granitemoe", GRANITE, ROWS, NATIVE, {"shape": lambda s: s.squeeze(-1)}),
    # Llama 4 holds its experts transposed: its rows are our columns.
    "transposed-row": ("llama4_text", LLAMA4, (-2,), NATIVE, {}),
    "transposed-expert": ("llama4_text", LLAMA4, ALL, NATIVE, {}),
    # DBRX has so many rows of one matrix for each expert.
    "rows-of-experts": ("dbrx", r"experts\.mlp\.", ROWS, NATIVE, {}),
    "one-of-experts": ("dbrx", r"experts\.mlp\.", ALL, NATIVE, {"shape": lambda s: s.flatten()}),
}


@pytest.mark.parametrize(
    ("name", "which", "dims", "config", "written"), SCALES.values(), ids=SCALES.keys()
)
def test_scales_by_their_shape(
    name: str,
    which: str,
    dims: tuple[int, ...],
    config: dict[str, Any],
    written: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "m"
    save_rowwise(folder, name, which, dims, config, **written)
    found = checkpoint(folder)
    codes = [t for t in found._stored.values() if t.scales is not None]
    assert codes, "nothing was quantised"
    assert_same_as(folder, tmp_path / "m-plain")


def assert_same_as(folder: Path, plain: Path) -> None:
    """Experts and trunk bit by bit what the folder of plain floats gives."""
    found, expected = checkpoint(folder), checkpoint(plain)
    for layer in expected.layers.values():
        for expert in range(layer.num_experts):
            given = found.read(layer.layer, expert).tensors()
            wanted = expected.read(layer.layer, expert).tensors()
            assert given.keys() == wanted.keys()
            assert all(torch.equal(given[n], wanted[n]) for n in given), (layer.layer, expert)
    given = dict(trunk_of(folder).named_parameters())
    for name, parameter in trunk_of(plain).named_parameters():
        assert torch.equal(given[name], parameter), name


def test_compressed_blocks(tmp_path: Path) -> None:
    group = {"weights": WEIGHTS | {"strategy": "block", "block_structure": [10, 7]}}
    model = fp8(tiny_model("qwen3_moe"), tmp_path / "m", block=(10, 7), suffix=".weight_scale")
    replaced(compressed("block", config_groups={"group_0": group}))(tmp_path / "m")
    assert_same(tmp_path / "m", model)
    said = describe(tmp_path / "m", torch.float32).quantised
    assert said == "fp8 of compressed-tensors, blocks of 10 x 7"


def test_its_older_name_in_config(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_rowwise(folder, "qwen3_moe", LINEAR, ROWS, compressed("channel"))
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["compression_config"] = values.pop("quantization_config")
    file.write_text(json.dumps(values))
    assert_same_as(folder, tmp_path / "m-plain")


def in_group(**values: Any) -> dict[str, Any]:
    return compressed("channel", config_groups={"group_0": {"weights": WEIGHTS | values}})


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "packed": (compressed("channel", format="pack-quantized"), "'pack-quantized'"),
    "nvfp4": (compressed("channel", format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    "no-format": (compressed("channel", format=None), "group_0.format: None"),
    "four-bits": (in_group(num_bits=4, strategy="channel"), "weights.num_bits: 4"),
    "integers": (in_group(type="int", strategy="channel"), "weights.type: 'int'"),
    "groups": (in_group(strategy="group", group_size=128), "weights.strategy: 'group'"),
    "sparse": (compressed("channel", sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    "rotated": (compressed("channel", transform_config={"R1": {}}), "transform_config"),
    "mixed": (
        compressed(
            "channel",
            config_groups={
                "a": {"weights": WEIGHTS | {"strategy": "channel"}},
                "b": {"weights": WEIGHTS | {"strategy": "block", "block_structure": [8, 8]}},
            },
        ),
        "different strategies or block sizes",
    ),
}


@pytest.mark.parametrize(("config", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_other_forms_of_compressed_tensors(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    replaced(config)(tmp_path)
    with pytest.raises(UnsupportedModel, match=re.escape(words)):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((24,), r"(24,), .* needs (1, 1) or (32, 1)"), ((1, 32), r"(1, 32), .* needs (1, 1)")],
    ids=["other-rows", "columns"],
)
def test_scales_that_fit_no_row(shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_rowwise(folder, "qwen3_moe", LINEAR, ROWS, NATIVE)
    edit(r"0\.self_attn\.q_proj\.weight_scale", lambda _: torch.ones(shape))(folder)
    pattern = re.escape(words).replace(re.escape(" .* "), ".*")
    with pytest.raises(CheckpointError, match=pattern):
        read_everything(folder)
