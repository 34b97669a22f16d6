"""Reading experts and trunks from folders: the right bytes, no others, and damage by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.models.folder import files
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE, list_tensors
from moesaic.models.trunk.experts_layers import is_experts_module
from moesaic.proto.errors import CheckpointError, MoesaicError, UnsupportedModel
from tests.helpers.models.model_folders import (
    Damage,
    assert_same_experts,
    checkpoint,
    config,
    edit,
    read_all,
    remove,
    saved,
    trunk_of,
)
from tests.helpers.models.versions import newest_transformers

# One of each way in which experts lie on disk.
PER_EXPERT = ("mixtral", "qwen3_moe", "nemotron_h", "deepseek_v4", "lfm2_moe")
FUSED = ("gpt_oss", "granitemoe", "gemma4_text", "aria_text")


# ---- the right bytes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_EXPERT + FUSED)
def test_every_expert_of_both_families(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    assert_same_experts(checkpoint(tmp_path), model)


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_several_files_with_an_index(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name, max_shard_size="20KB")
    assert (tmp_path / INDEX_FILE).is_file()
    assert len({header.file for header in list_tensors(tmp_path).headers.values()}) > 3
    assert_same_experts(checkpoint(tmp_path), model)
    torch.testing.assert_close(
        trunk_of(tmp_path).get_input_embeddings().weight, model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_memory", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_kept_or_converted(
    name: str, on_disk: torch.dtype, in_memory: torch.dtype, tmp_path: Path
) -> None:
    model = saved(tmp_path, name, model={"dtype": on_disk})
    assert_same_experts(checkpoint(tmp_path, in_memory), model, in_memory)


def test_an_expert_has_memory_of_its_own(tmp_path: Path) -> None:
    """A view of a fused tensor would keep all experts in memory."""
    saved(tmp_path, "granitemoe")
    for tensor in checkpoint(tmp_path).read(0, 3).tensors().values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# ---- no other bytes -----------------------------------------------------------------------------


class Spy:
    """Counts what is read through `safe_open`: {tensor: bytes}."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}

    def note(self, key: str, tensor: Tensor) -> Tensor:
        self.read[key] = self.read.get(key, 0) + tensor.nbytes
        return tensor

    def open(self, *args: Any, **kwargs: Any) -> _SpiedFile:
        return _SpiedFile(safe_open(*args, **kwargs), self)


class _SpiedFile:
    def __init__(self, file: Any, spy: Spy) -> None:
        self._file, self._spy = file, spy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _SpiedFile:
        self._file.__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        self._file.__exit__(*ended)

    def get_tensor(self, key: str) -> Tensor:
        return self._spy.note(key, self._file.get_tensor(key))

    def get_slice(self, key: str) -> Any:
        return _SpiedSlice(self._file.get_slice(key), key, self._spy)


class _SpiedSlice:
    def __init__(self, piece: Any, key: str, spy: Spy) -> None:
        self._piece, self._key, self._spy = piece, key, spy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._piece, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._spy.note(self._key, self._piece[index])


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found = Spy()
    monkeypatch.setattr(files, "safe_open", found.open)
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", found.open)
    yield found


@pytest.mark.parametrize("name", ["mixtral", "nemotron_h", "granitemoe", "gpt_oss"])
def test_only_one_experts_bytes_are_read(name: str, spy: Spy, tmp_path: Path) -> None:
    saved(tmp_path, name)
    found = checkpoint(tmp_path)
    layer = max(found.layers)
    found.form(layer)
    assert not spy.read, "opening a checkpoint reads no tensor"
    weights = found.read(layer, 3)
    assert sum(spy.read.values()) == weights.nbytes


@pytest.mark.parametrize("name", PER_EXPERT + FUSED)
def test_a_trunk_reads_no_expert(name: str, spy: Spy, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    experts = [m for m in model.modules() if is_experts_module(m)]
    theirs = sum(p.numel() for m in experts for p in m.parameters())
    trunk = trunk_of(tmp_path)
    assert sum(p.numel() for p in trunk.parameters()) == model.num_parameters() - theirs
    assert spy.read, "the spy does not see transformers read"
    routed = re.compile(r"(?<!shared_)experts\.|(input|output)_linear\.")
    assert not [key for key in spy.read if routed.search(key)]
    assert not any(p.is_meta for p in trunk.parameters())


# ---- damage -------------------------------------------------------------------------------------


def config_text(text: str | bytes) -> Damage:
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: _void((folder / "config.json").write_bytes(content))


def cut(keep: float) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / SINGLE_FILE
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return damage


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE_FILE), folder / "pytorch_model.bin")
    (folder / SINGLE_FILE).unlink()


def _void(_: object) -> None:
    return None


EXPERTS_DAMAGED: list[tuple[str, str, Damage, str]] = [
    # name, architecture, what is done to it, what the message says
    ("cut-in-half", "mixtral", cut(0.5), "model.safetensors: damaged or truncated"),
    ("cut-a-little", "mixtral", cut(0.999), "model.safetensors: damaged or truncated"),
    ("empty", "mixtral", cut(0), "model.safetensors: damaged or truncated"),
    ("pickle", "mixtral", pickled, "only safetensors are read"),
    (
        "expert-missing",
        "mixtral",
        remove(r"1\..*experts\.3\."),
        "lacks model.layers.1.block_sparse_moe.experts.3.w1",
    ),
    (
        "half-an-expert",
        "mixtral",
        remove(r"1\..*experts\.3\.w3"),
        "1.block_sparse_moe.experts.3.w3.weight",
    ),
    (
        "projection-missing",
        "mixtral",
        remove(r"1\..*experts\..*w3"),
        "lacks model.layers.1.mlp.experts.gate",
    ),
    ("layer-missing", "mixtral", remove(r"layers\.1.*experts"), "lacks model.layers.1"),
    ("fused-missing", "granitemoe", remove(r"1\..*input_linear"), "lacks model.layers.1"),
    ("bias-missing", "gpt_oss", remove(r"1\..*down_proj_bias"), "lacks model.layers.1"),
    ("rows", "mixtral", edit(r"1\..*s\.3\.w2", lambda t: t[1:]), "has shape (31, 48)"),
    ("columns", "mixtral", edit(r"1\..*s\.3\.w2", lambda t: t[:, 1:]), "has shape (32, 47)"),
    (
        "halves",
        "mixtral",
        edit(r"1\..*s\.3\.w1", lambda t: t[:, 1:]),
        "1.block_sparse_moe.experts.3.w1.weight has shape",
    ),
    (
        "vector",
        "mixtral",
        edit(r"1\..*s\.3\.w1", lambda t: t[0]),
        "1.block_sparse_moe.experts.3.w1.weight has shape",
    ),
    (
        "fused-rows",
        "granitemoe",
        edit(r"1\..*input_linear", lambda t: t[:, 1:]),
        "has shape (8, 95, 32)",
    ),
    (
        "fused-fewer",
        "granitemoe",
        edit(r"1\..*input_linear", lambda t: t[:7]),
        "has shape (7, 96, 32)",
    ),
    (
        "fused-flat",
        "granitemoe",
        edit(r"1\..*input_linear", lambda t: t[:, 0]),
        "has shape (8, 32)",
    ),
    (
        "int8",
        "mixtral",
        edit(r"experts\.5\.w2", lambda t: t.to(torch.int8)),
        "torch.int8, which is no",
    ),
    ("fp8", "gpt_oss", edit(r"experts", lambda t: t.to(torch.float8_e4m3fn)), "quantised"),
    ("quantised", "mixtral", config(quantization_config={"quant_method": "gptq"}), "'gptq' is not"),
]


@pytest.mark.parametrize(
    ("architecture", "damage", "words"),
    [case[1:] for case in EXPERTS_DAMAGED],
    ids=[case[0] for case in EXPERTS_DAMAGED],
)
def test_damaged_experts(architecture: str, damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path, architecture)
    read_all(tmp_path)
    damage(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedModel), match=re.escape(words)) as raised:
        read_all(tmp_path)
    assert str(tmp_path) in str(raised.value)


TRUNK_DAMAGED: list[tuple[str, Damage, str]] = [
    ("cut-in-half", cut(0.5), "model.safetensors: damaged or truncated"),
    ("empty", cut(0), "model.safetensors: damaged or truncated"),
    ("pickle", pickled, "only safetensors are read"),
    ("no-norm", remove(r"1\.input_layernorm"), "lacks model.layers.1.input_layernorm.weight"),
    ("no-gate", remove(r"1\..*moe\.gate"), "lacks model.layers.1.mlp.gate.weight"),
    ("no-embedding", remove(r"embed_tokens"), "lacks model.embed_tokens.weight"),
    ("no-head", remove(r"lm_head"), "lacks lm_head.weight"),
    (
        "shape",
        edit(r"1\..*q_proj", lambda t: t[1:]),
        "1.self_attn.q_proj.weight has shape (31, 32)",
    ),
    ("fewer-experts", config(num_local_experts=4), "gate.weight has shape (8, 32)"),
    ("more-experts", config(num_local_experts=9), "gate.weight has shape (8, 32)"),
    ("quantised", config(quantization_config={"quant_method": "awq"}), "'awq' is not supported"),
]


@pytest.mark.parametrize(
    ("damage", "words"),
    [case[1:] for case in TRUNK_DAMAGED],
    ids=[case[0] for case in TRUNK_DAMAGED],
)
def test_damaged_trunks(damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    trunk_of(tmp_path)
    damage(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedModel), match=re.escape(words)) as raised:
        trunk_of(tmp_path)
    assert str(tmp_path) in str(raised.value)


def index(**weight_map: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


BAD_INDICES: list[tuple[str, str | bytes, str]] = [
    ("up", index(a="../x.safetensors"), "names '../x.safetensors'"),
    ("absolute", index(a="/etc/x.safetensors"), "names '/etc/x.safetensors'"),
    ("below", index(a="sub/x.safetensors"), "names 'sub/x.safetensors'"),
    ("dot", index(a="./x.safetensors"), "names './x.safetensors'"),
    ("pickle", index(a="pytorch_model.bin"), "names 'pytorch_model.bin'"),
    ("passwords", index(a="/etc/passwd"), "names '/etc/passwd'"),
    ("zero", index(a="x\0.safetensors"), "weight_map names"),
    ("null", index(a=None), "names 'None'"),
    ("number", index(a=3), "names '3'"),
    ("gone", index(a="gone.safetensors"), "names 1 tensor that gone.safetensors does not have"),
    ("lies", index(a="whole.safetensors"), "names 1 tensor that whole.safetensors does not have"),
    ("cut", index(t="short.safetensors"), "short.safetensors: damaged or truncated"),
    ("nothing", index(), "lacks"),
    ("no-json", "{", "not an index"),
    ("no-text", b"\xff\xfe", "not an index"),
    ("list", "[]", "not an index"),
    ("no-map", "{}", "not an index"),
    ("map-is-a-number", '{"weight_map": 3}', "not an index"),
]


@pytest.mark.parametrize(
    ("content", "words"), [case[1:] for case in BAD_INDICES], ids=[case[0] for case in BAD_INDICES]
)
def test_bad_indices(content: str | bytes, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(folder)
    (folder / SINGLE_FILE).unlink()
    outside = tmp_path / "x.safetensors"
    for file in (outside, folder / "whole.safetensors", folder / "short.safetensors"):
        save_file({"t": torch.zeros(4)}, file)
    short = folder / "short.safetensors"
    short.write_bytes(short.read_bytes()[:-4])
    (folder / INDEX_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (read_all, trunk_of):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            read(folder)


BAD_CONFIGS: list[tuple[str, Damage, type[MoesaicError], str]] = [
    ("gone", lambda folder: (folder / "config.json").unlink(), CheckpointError, "no config.json"),
    ("no-json", config_text("{"), CheckpointError, "not a valid JSON"),
    ("no-text", config_text(b"\xff"), CheckpointError, "not a valid JSON"),
    ("list", config_text("[]"), CheckpointError, "model_type"),
    ("no-type", config_text('{"hidden_size": 32}'), CheckpointError, "model_type"),
    ("unknown", config(model_type="nosuchmoe"), CheckpointError, "nosuchmoe"),
    ("type-is-a-number", config(model_type=3), CheckpointError, "model type `3`"),
    ("size-is-text", config(hidden_size="x"), CheckpointError, "hidden_size"),
    ("negative", config(num_local_experts=-1), CheckpointError, "negative dimension"),
    ("activation", config(hidden_act="nosuchact"), CheckpointError, "nosuchact"),
    (
        "code",
        config(model_type="ours", auto_map={"AutoConfig": "evil.Config"}),
        CheckpointError,
        "custom code",
    ),
]


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [case[1:] for case in BAD_CONFIGS],
    ids=[case[0] for case in BAD_CONFIGS],
)
def test_bad_configurations(
    damage: Damage, error: type[MoesaicError], words: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('the model ran its own code')")
    damage(tmp_path)
    for read in (read_all, trunk_of):
        with pytest.raises(error, match=re.escape(words)):
            read(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_architectures_without_experts(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for read in (read_all, trunk_of):
        with pytest.raises(UnsupportedModel, match="experts interface"):
            read(tmp_path)


@pytest.mark.parametrize(
    "model_type",
    ["nllb-moe", pytest.param("muse_spark", marks=newest_transformers), "step3p7", "vit"],
)
def test_architectures_that_are_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for read in (read_all, trunk_of):
        with pytest.raises(UnsupportedModel, match=f"model_type: '{model_type}'"):
            read(tmp_path)


@pytest.mark.parametrize(
    "model_type", ["qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "minimax_m3_vl", "aria"]
)
def test_models_of_images_and_text_without_a_text_class(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for read in (read_all, trunk_of):
        with pytest.raises(UnsupportedModel, match=f"'{model_type}' is a model of images and text"):
            read(tmp_path)
