"""Quantised checkpoints: every bit of every expert and trunk, and damage by its name."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from moesaic.actors.trunk.attach import expert_tensors
from moesaic.cli.main import main
from moesaic.models.folder import quantised
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE, list_tensors, read_tensor
from moesaic.models.source import resolve_model
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.describe import describe
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import load_trunk
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.architectures import tiny_model
from tests.helpers.quantising import (
    FORMS,
    FP4,
    Stored,
    fp8,
    from_fp4,
    save_quantised,
    small_float,
    to_fp4,
)

Form = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """Name -> a folder that nobody may write to, and what plain transformers holds of it."""

    @cache
    def make(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp("form") / "m"
        return folder, FORMS[name](folder)

    return make


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


# ---- every bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_form(name: str, form: Form) -> None:
    assert_same(*form(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt-oss", "qwen3"])
def test_rounding_to_the_pools_dtype(name: str, dtype: torch.dtype, form: Form) -> None:
    assert_same(*form(name), dtype)


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


# ---- one scale for each row, or for each expert -------------------------------------------------


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
    codes = [t for t in found._tensors.values() if t.scales is not None]
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


# ---- the tables ---------------------------------------------------------------------------------


def test_fp4_by_hand() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert FP4.tolist() == positive + [-value for value in positive]
    assert small_float(0x7E, 4, 3) == 448.0


def read_mxfp4(folder: Path, pairs: Tensor, scales: Tensor) -> Tensor:
    """One matrix (R, G, 16) as it is read."""
    save_file({"x_blocks": pairs, "x_scales": scales}, folder / SINGLE_FILE)
    config = MixtralConfig.from_dict({"quantization_config": {"quant_method": "mxfp4"}})
    quantisation = quantised.quantisation_of(config, folder)
    return quantised.stored_tensors(list_tensors(folder).headers, quantisation)["x"].read()


EVERY_BYTE = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)


@settings(max_examples=60, deadline=None)
@given(scales=st.lists(st.integers(0, 252), min_size=16, max_size=16))
def test_every_byte_with_any_scale(
    tmp_path_factory: pytest.TempPathFactory, scales: list[int]
) -> None:
    """Above 252 the largest element leaves float32."""
    folder = tmp_path_factory.mktemp("m")
    stored = torch.tensor([scales], dtype=torch.uint8)
    found = read_mxfp4(folder, EVERY_BYTE, stored)
    expected = [
        math.ldexp(small_float(code, 2, 1), scales[byte // 16] - 127)
        for byte in range(256)
        for code in (byte & 15, byte >> 4)
    ]
    assert found.shape == (512, 1)
    assert found.flatten().tolist() == expected
    assert found.signbit().flatten().tolist() == [math.copysign(1, v) < 0 for v in expected]
    assert torch.equal(from_fp4(*to_fp4(found.T)), found.T)


@given(scale=st.integers(253, 255))
def test_scales_that_leave_float32(tmp_path_factory: pytest.TempPathFactory, scale: int) -> None:
    folder = tmp_path_factory.mktemp("m")
    words = "x_scales holds a scale" if scale == 255 else "x_blocks holds values"
    with pytest.raises(CheckpointError, match=f"{words}.* not .*finite"):
        read_mxfp4(folder, EVERY_BYTE, torch.full((1, 16), scale, dtype=torch.uint8))


# ---- what is not read ---------------------------------------------------------------------------

Damage = Callable[[Path], None]


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


def remove(pattern: str) -> Damage:
    return edit(pattern, lambda tensor: None)


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


def replaced(value: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": value}))

    return damage


E8M0 = torch.float8_e8m0fnu
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
