"""An exported folder is, byte by byte, that of `save_pretrained` of the whole model."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from moesaic.models.export.export import ExpertsOf, export_model
from moesaic.models.export.plan import plan_export
from moesaic.models.export.write_checkpoint import write_checkpoint
from moesaic.models.trunk.experts_layers import expert_tensors, experts_layers
from moesaic.models.trunk.trunk import strip_experts
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import ADAPTED, ARCHITECTURES, OWN
from tests.helpers.models.model_folders import (
    assert_same,
    checkpoint,
    experts_of,
    saved,
    trunk_of,
)
from tests.helpers.models.normed import saved_normed
from tests.helpers.models.tiny import tiny_tokenizer
from tests.helpers.models.versions import newest_transformers

SMALL_SHARDS = 30_000
NAMES = [*ARCHITECTURES, *ADAPTED, *OWN]


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    encodes = "switch" in (folder / "config.json").read_text()
    auto = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_files(found: Path, expected: Path) -> None:
    given, wanted = contents(found), contents(expected)
    assert given.keys() == wanted.keys()
    for name in (n for n in given if n.endswith(".json")):
        assert given[name].decode() == wanted[name].decode()
    assert [name for name in given if given[name] != wanted[name]] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_folder_is_that_of_save_pretrained(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    saved(tmp_path / "source", name, model={"dtype": dtype})
    whole = loaded(tmp_path / "source", dtype)
    shard = SMALL_SHARDS if dtype == torch.float32 else 10**9
    whole.save_pretrained(tmp_path / "expected", max_shard_size=shard)
    trunk = trunk_of(tmp_path / "source", dtype)
    plan = plan_export(trunk, max_shard_bytes=shard)
    experts = experts_of(checkpoint(tmp_path / "source", dtype))
    export_model(tmp_path / "found", plan, trunk, experts)
    assert_same_files(tmp_path / "found", tmp_path / "expected")
    again = loaded(tmp_path / "found", dtype).state_dict()
    assert again.keys() == whole.state_dict().keys()
    for key, tensor in whole.state_dict().items():
        assert torch.equal(again[key], tensor), key
    if name in ARCHITECTURES:
        assert_same(tmp_path / "found", whole, dtype)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("shard", [1, 5_000, 20_000, 100_000])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_tensors_are_in_the_files_that_transformers_would_choose(
    name: str, shard: int, tmp_path: Path
) -> None:
    saved(tmp_path / "source", name)
    whole = loaded(tmp_path / "source", torch.float32)
    whole.save_pretrained(tmp_path / "expected", max_shard_size=shard)
    trunk = trunk_of(tmp_path / "source")
    plan = plan_export(trunk, max_shard_bytes=shard)
    export_model(tmp_path / "found", plan, trunk, experts_of(checkpoint(tmp_path / "source")))
    assert_same_files(tmp_path / "found", tmp_path / "expected")


def in_memory(model: nn.Module) -> ExpertsOf:
    """The experts of a whole model, which then loses them."""
    layers = {layer.layer: layer for layer in experts_layers(model)}
    kept = {
        number: [
            {name: tensor.detach().clone() for name, tensor in expert_tensors(layer, e).items()}
            for e in range(layer.num_experts)
        ]
        for number, layer in layers.items()
    }
    strip_experts(model)
    return lambda layer: enumerate(kept[layer])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h"])
@pytest.mark.parametrize("read", [False, True])
def test_a_model_that_was_whole_in_memory(name: str, read: bool, tmp_path: Path) -> None:
    model: Any = saved(tmp_path / "expected", name)
    if read:
        model = loaded(tmp_path / "expected", torch.float32)
    experts = in_memory(model)
    export_model(tmp_path / "found", plan_export(model), model.requires_grad_(True), experts)
    assert_same_files(tmp_path / "found", tmp_path / "expected")


def test_experts_may_have_another_dtype_than_the_trunk(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    found = checkpoint(tmp_path / "source", torch.bfloat16)
    trunk = trunk_of(tmp_path / "source")
    plan = plan_export(trunk, dtype=torch.bfloat16)
    export_model(tmp_path / "found", plan, trunk, experts_of(found))
    again = checkpoint(tmp_path / "found", torch.bfloat16)
    for name, tensor in found.read(1, 2).tensors().items():
        assert torch.equal(again.read(1, 2).tensors()[name], tensor)
    kinds = {stored.dtype for stored in again._stored.values()}
    assert kinds == {torch.bfloat16, torch.float32}


def test_the_tokenizer_is_copied(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    trunk, experts = trunk_of(tmp_path / "source"), experts_of(checkpoint(tmp_path / "source"))
    export_model(tmp_path / "found", plan_export(trunk), trunk, experts, source=tmp_path / "source")
    assert_same_files(tmp_path / "found", tmp_path / "source")


def test_at_most_one_layer_of_experts_is_in_memory(tmp_path: Path) -> None:
    saved(tmp_path / "source", "qwen3_moe", model={"num_hidden_layers": 6})
    found = checkpoint(tmp_path / "source")
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most_given, most_all = 0, 0
    expert_bytes = found.read(0, 0).nbytes
    layer_bytes = expert_bytes * found.layers[0].num_experts

    def experts(layer: int) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        nonlocal most_given, most_all
        for number, tensors in experts_of(found)(layer):
            alive.update(tensors.values())
            most_given = max(most_given, sum(tensor.nbytes for tensor in alive))
            if number == 0:  # what earlier layers needed would still be there
                most_all = max(most_all, _bytes_of(expert_bytes // 3))
            yield number, tensors
            del tensors

    trunk = trunk_of(tmp_path / "source")
    plan = plan_export(trunk)
    gc.collect()
    before = _bytes_of(expert_bytes // 3)
    export_model(tmp_path / "found", plan, trunk, experts)
    assert most_given <= 2 * expert_bytes  # the one before is freed when the next has been read
    assert most_all - before <= layer_bytes + 2 * expert_bytes


def _bytes_of(least: int) -> int:
    """The bytes of all tensors of memory that are at least so large."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor)
        # Those that other tests may have left packed have no storage.
        and (tensor.device.type, tensor.layout) == ("cpu", torch.strided)
    }
    return sum(size for size in storages.values() if size >= least)


# ---- what is refused ----------------------------------------------------------------------------


def refused(trunk: Any, match: str) -> None:
    with pytest.raises(UnsupportedModel, match=match):
        plan_export(trunk)


@pytest.mark.parametrize("lacking", [False, True])
def test_weights_that_nothing_reads_are_those_of_the_source(lacking: bool, tmp_path: Path) -> None:
    """LongCat-Flash's zero-compute experts; transformers loads no folder without them."""
    if "longcat_flash" not in ADAPTED:
        pytest.skip("a newer transformers has it")
    source = tmp_path / "source"
    saved(source, "longcat_flash")
    before = load_file(source / "model.safetensors")
    unread = {key for key in before if re.search(r"\.experts\.(8|9|10|11)\.", key)}
    assert len(unread) == 2 * 4 * 2  # in two layers, four experts' gates and up-projections
    if lacking:
        kept = {key: tensor for key, tensor in before.items() if key not in unread}
        save_file(kept, source / "model.safetensors", {"format": "pt"})
    trunk = trunk_of(source)
    plan = plan_export(trunk)
    export_model(tmp_path / "found", plan, trunk, experts_of(checkpoint(source)))
    after = load_file(tmp_path / "found" / "model.safetensors")
    assert after.keys() == before.keys()
    for key in unread:
        assert after[key].equal(torch.zeros_like(before[key]) if lacking else before[key])
    loaded(tmp_path / "found", torch.float32)


@newest_transformers
def test_what_experts_share_is_exported(tmp_path: Path) -> None:
    saved_normed(tmp_path / "source")
    whole = loaded(tmp_path / "source", torch.float32)
    whole.save_pretrained(tmp_path / "expected", max_shard_size=SMALL_SHARDS)
    trunk = trunk_of(tmp_path / "source")
    plan = plan_export(trunk, max_shard_bytes=SMALL_SHARDS)
    export_model(tmp_path / "found", plan, trunk, experts_of(checkpoint(tmp_path / "source")))
    assert_same_files(tmp_path / "found", tmp_path / "expected")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    trunk: Any = trunk_of(tmp_path / "source")
    trunk.config.quantization_config = {"quant_method": "fp8"}
    refused(trunk, "its weights are quantised, and only plain floats")


def test_adapters_of_peft_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    trunk: Any = trunk_of(tmp_path / "source")
    trunk._hf_peft_config_loaded = True
    refused(trunk, "adapters of PEFT; merge them")


def test_modules_that_were_added_or_removed_are_named(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    trunk: Any = trunk_of(tmp_path / "source")
    trunk.model.layers[0].more = nn.Linear(2, 2)
    refused(trunk, r"model\.layers\.0\.more\.bias, .*save the model without")
    del trunk.model.layers[0].more, trunk.model.norm
    refused(trunk, r"neither trunk nor experts have model\.norm\.weight")


def test_a_generation_config_that_transformers_would_not_save(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    trunk: Any = trunk_of(tmp_path / "source")
    trunk.generation_config.do_sample = False
    trunk.generation_config.temperature = 0.5
    refused(trunk, "generation_config: .*temperature.*; transformers does not")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda given: given[:-1], "expert 7 of layer 1 is missing"),
        (lambda given: given[1:], "expert 0 of layer 1 is missing"),
        (lambda given: [*given, given[3]], "expert 3 of layer 1 was given twice"),
        (lambda given: [(8, given[0][1])], "expert 8 of layer 1: the layer has 8 experts"),
        (lambda given: [(-1, given[0][1])], "expert -1 of layer 1: the layer has 8 experts"),
        (
            lambda given: [(0, {n: t.double() for n, t in given[0][1].items()})],
            r"expert 0 of layer 1 has tensors .*float64",
        ),
        (lambda given: [(0, {"up": given[0][1]["up"]})], "expert 0 of layer 1 has tensors"),
    ],
)
def test_experts_that_do_not_make_the_model_leave_nothing(
    change: Any, match: str, tmp_path: Path
) -> None:
    saved(tmp_path / "source")
    found = checkpoint(tmp_path / "source")

    def experts(layer: int) -> Any:
        given = list(experts_of(found)(layer))
        return change(given) if layer == 1 else given

    trunk = trunk_of(tmp_path / "source")
    with pytest.raises(CheckpointError, match=match):
        export_model(tmp_path / "found", plan_export(trunk), trunk, experts)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_plan_has_all_files_and_no_memory(tmp_path: Path) -> None:
    saved(tmp_path / "source", "qwen3_moe", max_shard_size=SMALL_SHARDS)
    plan = plan_export(trunk_of(tmp_path / "source"), max_shard_bytes=SMALL_SHARDS)
    weights = {file.name for file in (tmp_path / "source").glob("*.safetensors")}
    assert plan.files.keys() == weights
    tensors = [tensor for names in plan.files.values() for tensor in names.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_plan_serves_many_folders_with_other_values(tmp_path: Path) -> None:
    whole = saved(tmp_path / "source")
    trunk = trunk_of(tmp_path / "source")
    plan = plan_export(trunk)
    experts = experts_of(checkpoint(tmp_path / "source"))
    export_model(tmp_path / "first", plan, trunk, experts)
    with torch.no_grad():
        for parameter in (*trunk.parameters(), *whole.parameters()):
            parameter.add_(1.0)
    more = experts_of(checkpoint(tmp_path / "source"))

    def trained(layer: int) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        for expert, tensors in more(layer):
            yield expert, {name: tensor + 1.0 for name, tensor in tensors.items()}

    export_model(tmp_path / "first", plan, trunk, trained, overwrite=True)
    whole.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "first", tmp_path / "expected")


def test_other_threads_keep_their_default_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "source", model={"dtype": torch.bfloat16})
    trunk = trunk_of(tmp_path / "source", torch.bfloat16)
    plan = plan_export(trunk)
    experts = experts_of(checkpoint(tmp_path / "source", torch.bfloat16))

    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError("the default dtype belongs to all threads")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    with pytest.raises(CheckpointError, match="belongs to all threads"):
        plan_export(trunk)  # which is therefore made beforehand
    write_checkpoint(tmp_path / "found", plan, trunk, experts, step=1, run={})


def test_a_trunk_that_is_not_that_of_the_plan_leaves_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "source")
    trunk: Any = trunk_of(tmp_path / "source")
    plan = plan_export(trunk)
    experts = experts_of(checkpoint(tmp_path / "source"))
    with pytest.raises(
        CheckpointError, match=r"is torch\.float64 .*, and it should be torch\.floa"
    ):
        export_model(tmp_path / "found", plan, trunk.double(), experts)
    del trunk.lm_head
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: the trunk has changed since"):
        export_model(tmp_path / "found", plan, trunk, experts)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
