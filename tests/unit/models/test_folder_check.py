"""What is said of a model folder before anything starts, from headers alone."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.models.folder import files
from moesaic.models.folder.files import INDEX_FILE, SINGLE_FILE
from moesaic.models.trunk import fitting
from moesaic.models.trunk.checkpoint import Checkpoint
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.folder_check import Inventory, check_folder
from moesaic.models.trunk.trunk import load_trunk
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import ARCHITECTURES, tiny_config, tiny_model
from tests.helpers.models.quantising import FORMS
from tests.helpers.models.sparse import sparse_deepseek

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


def saved(folder: Path, name: str = "mixtral", **more: Any) -> Tensors:
    tiny_model(name, **more).save_pretrained(folder)
    return load_file(folder / SINGLE_FILE)


def rewrite(folder: Path, tensors: Tensors) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / SINGLE_FILE, metadata={"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def check(folder: Path) -> Inventory:
    return check_folder(folder, dtype=torch.float32)


def load_everything(folder: Path) -> None:
    """As hosts and trunk do."""
    found = Checkpoint(folder, read_config(folder), dtype=torch.float32)
    for layer in found.layers.values():
        for expert in range(layer.num_experts):
            found.read(layer.layer, expert)
    load_trunk(folder, dtype=torch.float32, device=CPU)


def refused(folder: Path, words: str) -> None:
    """By the check, by hosts and by trunks, in the same words."""
    readers: list[Callable[[], object]] = [
        lambda: check(folder),
        lambda: Checkpoint(folder, read_config(folder), dtype=torch.float32),
        lambda: load_trunk(folder, dtype=torch.float32, device=CPU),
    ]
    said = set()
    for read in readers:
        with pytest.raises(CheckpointError, match=words) as raised:
            read()
        said.add(str(raised.value))
    assert len(said) == 1
    assert str(folder) in said.pop()


# ---- nothing to say -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_as_transformers_writes_it(name: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, name)
    found = check(tmp_path)
    assert (found.surplus, found.warnings) == ((), ())
    assert found.tensors == len(tensors)
    assert found.stored_bytes == (tmp_path / SINGLE_FILE).stat().st_size
    assert found.described.layers


@pytest.mark.parametrize("name", FORMS)
def test_every_quantised_form(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / "m")
    found = check(tmp_path / "m")
    assert found.described.quantised
    assert (found.surplus, found.warnings) == ((), ())


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    monkeypatch.setattr(files, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    check(tmp_path)


# ---- a model of any size ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("deepseek")
    yield folder, sparse_deepseek(folder)


def test_160_files_of_90_000_tensors(
    deepseek: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each header is read once, no data at all, and nearly all experts share one conversion."""
    folder, tensors = deepseek
    assert tensors > 90_000
    opened: Counter[Path] = Counter()
    conversions = 0
    open_weights, convert = files.open_weights, fitting.convert

    def open_counted(file: Path) -> Any:
        opened[file] += 1
        return open_weights(file)

    def convert_counted(*args: Any) -> Any:
        nonlocal conversions
        conversions += 1
        return convert(*args)

    monkeypatch.setattr(files, "open_weights", open_counted)
    monkeypatch.setattr(files, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    monkeypatch.setattr(fitting, "convert", convert_counted)
    found = check_folder(folder, dtype=torch.bfloat16)
    assert set(opened.values()) == {1}
    assert len(opened) == 160
    assert conversions == 2, "gate and up, and down"
    assert found.tensors == tensors
    assert found.stored_bytes > 670e9
    assert found.described.layers == dict.fromkeys(range(3, 61), 256)
    assert (found.surplus, found.warnings) == ((), ())


def test_one_wrong_header_among_160(deepseek: tuple[Path, int]) -> None:
    folder, _ = deepseek
    last = folder / "model-00160-of-00160.safetensors"
    with last.open("rb") as opened:
        start = opened.read(8)
        content = start + opened.read(struct.unpack("<Q", start)[0])
    size = last.stat().st_size
    name = re.search(rb'"(model\.layers\.60\.mlp\.experts\.\d+\.down_proj\.weight)"', content)
    assert name is not None
    other = name[1].replace(b"down", b"dawn")
    try:
        last.write_bytes(content.replace(name[1] + b'"', other + b'"'))
        with last.open("r+b") as opened:
            opened.truncate(size)
        with pytest.raises(
            CheckpointError, match=f"lacks {re.escape(name[1].decode())};.* names 1"
        ):
            check_folder(folder, dtype=torch.bfloat16)
    finally:
        last.write_bytes(content)
        with last.open("r+b") as opened:
            opened.truncate(size)


# ---- missing ------------------------------------------------------------------------------------


def test_many_missing_tensors_fit_a_line(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    rewrite(tmp_path, {n: t for n, t in tensors.items() if "self_attn" not in n})
    refused(
        tmp_path, r"lacks model\.layers\.0\.self_attn.*1\.self_attn\.k_proj\.weight and 3 more$"
    )


@pytest.mark.parametrize("gone", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_tensors_one_is_enough(gone: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    rewrite(tmp_path, {name: tensor for name, tensor in both.items() if name != gone})
    check(tmp_path)
    load_everything(tmp_path)
    rewrite(tmp_path, {n: t for n, t in tensors.items() if "embed" not in n and "lm_" not in n})
    refused(tmp_path, r"lacks model\.embed_tokens\.weight$")


# ---- shapes and dtypes --------------------------------------------------------------------------


def test_a_shape_names_what_was_found_and_what_is_expected(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    rewrite(tmp_path, tensors | {name: tensors[name][1:]})
    refused(tmp_path, rf"{re.escape(name)} has shape \(31, 48\).* gives \(32, 48\)")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_floats_interchange(dtype: torch.dtype, tmp_path: Path) -> None:
    rewrite(tmp_path, {n: t.to(dtype) for n, t in saved(tmp_path).items()})
    assert check(tmp_path).warnings == ()
    load_everything(tmp_path)


@pytest.mark.parametrize(
    "dtype", [FP8, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.int64], ids=str
)
@pytest.mark.parametrize("of", [r"self_attn\.q_proj", r"experts\.3\.w2", "norm", "embed"])
def test_no_other_dtype_is_a_weight(dtype: torch.dtype, of: str, tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    rewrite(tmp_path, {n: t.to(dtype) if re.search(of, n) else t for n, t in tensors.items()})
    refused(tmp_path, rf"(is|are) {dtype}, which is no dtype of plain weights.*quantization_config")


# ---- quantised in another way than config.json says ---------------------------------------------


def codes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    scale = tensor.abs().max() / 448
    return (tensor / scale).to(FP8), scale.reshape(1)


def modelopt(tensors: Tensors) -> Tensors:
    """FP8 of the attention alone, one scale each."""
    out = dict(tensors)
    for name, tensor in tensors.items():
        if "self_attn" in name and name.endswith("_proj.weight"):
            out[name], out[f"{name}_scale"] = codes(tensor)
            out[name.replace("weight", "input_scale")] = torch.ones(1)
    return out


def test_only_another_file_says_that_weights_are_quantised(tmp_path: Path) -> None:
    rewrite(tmp_path, modelopt(saved(tmp_path)))
    refused(tmp_path, "config.json does not say that the weights are quantised")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(said))
    refused(tmp_path, r"q_proj.*float8_e4m3fn.* only hf_quant_config\.json, which is not read")


ATTENTION = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.3.w1"
LEFT: dict[str, Tensors] = {
    "scale": {f"{ATTENTION}.weight_scale": torch.ones(1)},
    "scale-inv": {f"{EXPERT}.weight_scale_inv": torch.ones(1, 1)},
    "nvfp4": {f"{EXPERT}.weight_scale_2": torch.ones(1)},
    "activation": {f"{ATTENTION}.input_scale": torch.ones(1)},
    "smooth": {f"{ATTENTION}.smooth_scale": torch.ones(32)},
    "hqq": {f"{EXPERT}.scale": torch.ones(4, 32)},
    "hqq-zero": {f"{EXPERT}.zero": torch.ones(4, 32)},
    "cache": {f"{ATTENTION[:-7]}.k_proj.k_scale": torch.ones(1)},
    "awq": {f"{EXPERT}.qzeros": torch.ones(1, 4, dtype=torch.int32)},
    "gptq": {f"{EXPERT}.g_idx": torch.ones(32, dtype=torch.int32)},
    "gptq-codes": {f"{ATTENTION}.qweight": torch.ones(4, 32, dtype=torch.int32)},
    "groups": {f"{EXPERT}.scales": torch.ones(4, 32)},
    "bitsandbytes-8": {f"{ATTENTION}.SCB": torch.ones(32)},
    "bitsandbytes-4": {f"{ATTENTION}.weight.absmax": torch.ones(32)},
    "bitsandbytes-map": {f"{ATTENTION}.weight.nested_quant_map": torch.ones(16)},
    "bitsandbytes-state": {
        f"{ATTENTION}.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)
    },
    "packed": {f"{EXPERT}.weight_packed": torch.ones(4, 4, dtype=torch.int32)},
    "packed-shape": {f"{EXPERT}.weight_shape": torch.ones(2, dtype=torch.int64)},
    "zero-point": {f"{EXPERT}.weight_zero_point": torch.ones(4, 1, dtype=torch.int8)},
    "codes-of-what": {"model.layers.0.what.weight": torch.ones(4, 4).to(FP8)},
    "bytes-of-what": {"model.layers.0.what": torch.ones(4, 4, dtype=torch.uint8)},
}


def test_integers_with_scales_of_floats_are_no_pairs_of_fp4(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    name = f"{ATTENTION}.weight"
    rewrite(tmp_path, tensors | {name: tensors[name].char(), f"{name}_scale": torch.ones(32, 1)})
    configure(tmp_path, quantization_config={"quant_method": "fp8"})
    refused(tmp_path, r"is torch\.int8 \(32, 32\) instead of a torch\.float8_e4m3fn matrix")


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT.keys())
def test_codes_and_scales_that_nothing_uses(left: Tensors, tmp_path: Path) -> None:
    rewrite(tmp_path, saved(tmp_path) | left)
    refused(tmp_path, f"nothing uses {re.escape(next(iter(left)))} ")


def test_scales_of_activations_and_caches_belong_to_declared_fp8(tmp_path: Path) -> None:
    tensors = modelopt(saved(tmp_path))
    start = "model.layers.0.self_attn"
    for name in ("k_proj.k_scale", "v_proj.v_scale", "attn.k_scale", "k_proj.output_scale"):
        tensors[f"{start}.{name}"] = torch.ones(1)
    rewrite(tmp_path, tensors)
    configure(
        tmp_path,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "static",
            "modules_to_not_convert": ["lm_head", "model.layers.0.block_sparse_moe"],
        },
    )
    assert check(tmp_path).surplus == ()
    load_everything(tmp_path)


FLOATS = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "config.json: quantization: 4 bits"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX quantises, is not supported"),
        ({"compression_config": {"quant_method": "awq"}}, "compression_config.quant_method: 'awq'"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "'modelopt' is not supported"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": ["e4m3"]}}, "fmt: ['e4m3']"),
        ({"quantization_config": FLOATS | {"transform_config": [1]}}, "transform_config: [1]"),
        ({"quantization_config": FLOATS | {"sparsity_config": "x"}}, "sparsity_config: 'x'"),
    ],
    ids=["mlx", "mlx-twice", "old-name", "modelopt", "list", "transforms", "sparsity"],
)
def test_other_ways_are_refused_by_name(values: Any, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    configure(tmp_path, **values)
    with pytest.raises(UnsupportedModel, match=re.escape(words)):
        check(tmp_path)


# ---- surplus ------------------------------------------------------------------------------------

SURPLUS: dict[str, tuple[str, str]] = {
    # architecture, name of a tensor that the model has no use for
    "mtp-layer": ("glm4_moe", "model.layers.2.eh_proj.weight"),
    "mtp": ("qwen3_next", "mtp.fc.weight"),
    "mtp-experts": ("mixtral", "mtp.layers.0.block_sparse_moe.experts.0.w1.weight"),
    "vision": ("mixtral", "vision_tower.blocks.0.attn.qkv.weight"),
    "rotary": ("mixtral", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "logit-scale": ("mixtral", "vision_tower.logit_scale"),
    "expert-too-many": ("mixtral", "model.layers.1.block_sparse_moe.experts.8.w1.weight"),
}


@pytest.mark.parametrize(("name", "extra"), SURPLUS.values(), ids=SURPLUS.keys())
def test_other_surplus_is_a_warning_with_its_name(name: str, extra: str, tmp_path: Path) -> None:
    rewrite(tmp_path, saved(tmp_path, name) | {extra: torch.zeros(48, 32)})
    found = check(tmp_path)
    assert found.surplus == (extra,)
    (warning,) = found.warnings
    assert extra in warning
    assert "1 tensor" in warning
    load_everything(tmp_path)


# ---- files and index ----------------------------------------------------------------------------


def shard(folder: Path, more: dict[str, str], parts: int = 1) -> None:
    """Under numbered names, with an index that names ``more``, too."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    names = sorted(tensors)
    index = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index | more}))


FIRST = "model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    "more",
    [
        {"lm_head.weight": FIRST},
        {"lm_head.weight": "model-00002-of-00002.safetensors"},
        {"model.gone.weight": "model-00002-of-00002.safetensors"},
        {"model.gone.weight": FIRST},
    ],
    ids=["tied", "tied-in-a-lost-file", "lost-file", "lost-tensor"],
)
def test_an_index_that_names_what_nobody_needs(more: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    shard(tmp_path, more)
    assert check(tmp_path).warnings == ()
    load_everything(tmp_path)


def test_an_index_that_names_what_is_needed_and_lost(tmp_path: Path) -> None:
    saved(tmp_path)
    shard(tmp_path, {}, parts=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, r"lacks .*names \d+ tensors that model-00002-of-00002\.safetensors does not")


def test_numbered_files_without_an_index(tmp_path: Path) -> None:
    saved(tmp_path)
    shard(tmp_path, {}, parts=3)
    (tmp_path / INDEX_FILE).unlink()
    check(tmp_path)
    load_everything(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, rf"no {INDEX_FILE}, .* no complete set: part 2 is missing")


def test_a_name_may_claim_any_number_of_parts(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SINGLE_FILE).rename(tmp_path / "model-00001-of-999999999999.safetensors")
    with pytest.raises(CheckpointError, match="part 2 is missing"):
        check(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\x1b[31m", "a\nb"], ids=["long", "escape", "line"])
def test_names_in_an_index_that_no_terminal_should_print(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    index = {"weight_map": {"lm_head.weight": f"{name}.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map names") as raised:
        check(tmp_path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400


def test_the_single_file_goes_before_a_stale_index(tmp_path: Path) -> None:
    """As in transformers."""
    saved(tmp_path)
    gone = {"model.gone.weight": "model-00001-of-00002.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": gone}))
    check(tmp_path)
    load_everything(tmp_path)


# ---- folders that hold something else -----------------------------------------------------------


def test_what_a_folder_holds_instead(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    for read in (check, load_everything):
        with pytest.raises(CheckpointError, match=r"an adapter \(adapter_config\.json\)"):
            read(tmp_path)
    tiny_config("mixtral").save_pretrained(tmp_path)
    refused(tmp_path, r"an adapter \(adapter_model\.safetensors\) instead of a model")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "consolidated.safetensors")
    refused(tmp_path, r"under these names; there is consolidated\.safetensors")
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"pytorch_model\.bin is pickled; .*save_pretrained")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "x.gguf")
    refused(tmp_path, "x.gguf is a GGUF file, which only `moesaic upcycle` reads")
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; x\.gguf is a GGUF file"):
        check(tmp_path)


# ---- no experts ---------------------------------------------------------------------------------

NO_EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "none": ("granitemoehybrid", {"num_local_experts": 0}, "config.num_local_experts is 0: "),
    "no-module": ("qwen2_moe", {"num_experts": 0}, "config.num_experts is 0: the model has no"),
    "empty-modules": ("deepseek_v3", {"n_routed_experts": 0}, "config.n_routed_experts is 0: "),
    "first": ("deepseek_v2", {"first_k_dense_replace": 2}, "first_k_dense_replace=2 of 2 layers: "),
    "named": ("qwen2_moe", {"mlp_only_layers": [0, 1]}, "mlp_only_layers=[0, 1]"),
    "step": ("qwen3_next", {"decoder_sparse_step": 3}, "decoder_sparse_step=3 of 2 layers: no"),
    "switched-off": ("gemma4_text", {"enable_moe_block": False}, "enable_moe_block=False of 2"),
}


@pytest.mark.parametrize(("name", "more", "words"), NO_EXPERTS.values(), ids=NO_EXPERTS.keys())
def test_no_experts_and_no_sparse_layer(
    name: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    tiny_config(name, **more).save_pretrained(tmp_path)
    for read in (check, load_everything):
        with pytest.raises(UnsupportedModel, match=re.escape(words)):
            read(tmp_path)
