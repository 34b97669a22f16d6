"""One expert's tensors under the names of its checkpoint: into the pool and back, to the bit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.models.folder.files import list_tensors
from moesaic.models.trunk.config import config_from_dict
from moesaic.models.trunk.expert_tensors import ExpertTensors
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import meta_model
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import ADAPTED, ARCHITECTURES
from tests.helpers.models.model_folders import checkpoint, saved
from tests.helpers.models.normed import NORM, saved_normed
from tests.helpers.models.versions import newest_transformers

Pool = dict[str, Tensor]


def changed(tensors: Pool) -> Pool:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def same(one: Pool, other: Pool) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ADAPTED])
def test_there_and_back_for_every_architecture(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    found = checkpoint(tmp_path)
    on_disk = list_tensors(tmp_path).headers
    for layer in found.layers.values():
        place = layer.layer, layer.num_experts - 1
        before = found.read(*place).tensors()
        named = found.tensors.on_disk(*place, before)
        for tensor_name, tensor in named.items():
            header = on_disk[re.sub(r"\[\d+\]$", "", tensor_name)]
            if header.key == tensor_name:
                assert header.shape == tuple(tensor.shape)
        assert same(found.tensors.named(named)[place], before)
        new = changed(before)
        assert found.tensors.named(found.tensors.on_disk(*place, new)).keys() == {place}
        assert same(found.tensors.named(found.tensors.on_disk(*place, new))[place], new)


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "dbrx"])
def test_a_whole_checkpoint_has_all_experts(name: str, tmp_path: Path) -> None:
    saved(tmp_path, name)
    found = checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = {n: t for n, t in stored.items() if n in found.tensors._places}
    given = found.tensors.named(own)
    assert given.keys() == {
        (layer.layer, e) for layer in found.layers.values() for e in range(layer.num_experts)
    }
    for place, tensors in given.items():
        assert same(tensors, found.read(*place).tensors())


@newest_transformers
def test_what_experts_share_comes_with_each_and_is_updated_with_all(tmp_path: Path) -> None:
    saved_normed(tmp_path)
    found = checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    norm = NORM.format(1)
    expert = found.read(1, 2).tensors()
    assert expert["norm"].equal(stored[norm])
    new = changed(expert)
    named = found.tensors.on_disk(1, 2, new)
    assert named[norm].equal(new["norm"])
    with pytest.raises(CheckpointError, match=r"\[0\] is missing; an update must have"):
        found.tensors.named(named)  # the other experts of the layer would have another norm
    with pytest.raises(CheckpointError, match=r"layers\.1\.\S+norm\.weight is missing"):
        found.tensors.named({key: one for key, one in named.items() if key != norm})
    layer = {key: one + 1 for key, one in stored.items() if ".layers.1.mlp.experts." in key}
    given = found.tensors.named(layer)
    assert given.keys() == {(1, expert) for expert in range(8)}
    assert all(tensors["norm"].equal(new["norm"]) for tensors in given.values())


def test_a_model_in_memory_has_its_parameters_names() -> None:
    config: dict[str, Any] = {"model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 8}
    config |= {"intermediate_size": 12, "num_local_experts": 4, "num_attention_heads": 2}
    model = meta_model(config_from_dict(config))
    layers = {layer.layer: layer for layer in experts_layers(model)}
    tensors = ExpertTensors.in_memory(model, layers, torch.float32)
    pool = {"up": torch.randn(24, 8), "down": torch.randn(8, 12)}
    named = tensors.on_disk(0, 3, pool)
    prefix = "model.layers.0.mlp.experts"
    assert named.keys() == {f"{prefix}.gate_up_proj[3]", f"{prefix}.down_proj[3]"}
    assert same(tensors.named(named)[0, 3], pool)
    whole = {
        f"{prefix}.gate_up_proj": torch.randn(4, 24, 8),
        f"{prefix}.down_proj[2]": pool["down"],
    }
    with pytest.raises(CheckpointError, match=r"down_proj\[0\] is missing"):
        tensors.named(whole)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[ExpertTensors, Pool]:
    saved(tmp_path, "mixtral")
    found = checkpoint(tmp_path).tensors
    return found, found.on_disk(1, 2, checkpoint(tmp_path).read(1, 2).tensors())


def test_a_lacking_tensor_is_named(mixtral: tuple[ExpertTensors, Pool]) -> None:
    tensors, named = mixtral
    lacking = named.popitem()[0]
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(lacking)} is missing; an update must have"
    ):
        tensors.named(named)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "x", "model.layers.1.mlp.experts.2.w1.weight[0]"]
)
def test_other_tensors_are_refused(name: str, mixtral: tuple[ExpertTensors, Pool]) -> None:
    tensors, named = mixtral
    with pytest.raises(CheckpointError, match=r"is not a tensor of an expert .* such as \S+\.0\.w"):
        tensors.named(named | {name: torch.zeros(2)})


def test_shapes_are_compared(mixtral: tuple[ExpertTensors, Pool]) -> None:
    tensors, named = mixtral
    name = next(iter(named))
    with pytest.raises(CheckpointError, match=r"expert 2 of .* shape"):
        tensors.named(named | {name: named[name][:, :-1]})
    with pytest.raises(
        CheckpointError, match=r"is torch\.int64; weights are given as plain floats"
    ):
        tensors.named(named | {name: named[name].long()})


def test_parts_of_fused_tensors_are_checked(tmp_path: Path) -> None:
    saved(tmp_path, "granitemoe")
    found = checkpoint(tmp_path)
    named = found.tensors.on_disk(0, 1, found.read(0, 1).tensors())
    name = next(iter(named))
    whole = name.removesuffix("[1]")
    with pytest.raises(CheckpointError, match=r"\[99\]: layer 0 has 8 experts"):
        found.tensors.named({f"{whole}[99]": named[name]})
    with pytest.raises(CheckpointError, match=r"write \S+\[1\]"):
        found.tensors.named({f"{whole}[01]": named[name]})
    too_many = {n.removesuffix("[1]"): torch.zeros(16, *t.shape) for n, t in named.items()}
    with pytest.raises(CheckpointError, match="its first dimension has 8 rows in this model"):
        found.tensors.named(too_many)
    with pytest.raises(CheckpointError, match=r"has shape \(\)"):
        found.tensors.named(dict.fromkeys(too_many, torch.tensor(1.0)))
    with pytest.raises(CheckpointError, match=f"given twice, once as part of {re.escape(whole)}"):
        found.tensors.named(named | {whole: torch.zeros(8, *named[name].shape)})


def test_rows_of_an_expert_that_lies_below_others_are_counted(tmp_path: Path) -> None:
    saved(tmp_path, "dbrx")
    found = checkpoint(tmp_path)
    named = found.tensors.on_disk(0, 1, found.read(0, 1).tensors())
    name, tensor = next((n, t) for n, t in named.items() if ".w1" in n)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has shape .* has 24 rows"):
        found.tensors.named(named | {name: torch.cat([tensor, tensor])})


def test_an_expert_that_is_not_finite_can_be_read(mixtral: tuple[ExpertTensors, Pool]) -> None:
    tensors, named = mixtral
    name = next(iter(named))
    pool = tensors.named(named | {name: named[name] * float("nan")})[1, 2]
    assert tensors.on_disk(1, 2, pool)[name].isnan().all()


def test_a_conversion_that_cannot_be_reversed_is_said(
    mixtral: tuple[ExpertTensors, Pool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers.core_model_loading import Concatenate

    tensors, _ = mixtral
    pool = checkpoint(tmp_path).read(1, 2).tensors()

    def lossy(self: Any, made: dict[str, Any], **given: Any) -> dict[str, Any]:
        (joined,) = (t[0] if isinstance(t, list) else t for t in made.values())
        parts = (joined * 2).chunk(2, dim=self.dim)
        return dict(zip(given["target_patterns"], parts, strict=True))

    reversed_by = type("Lossy", (), {"convert": lossy, "dim": 1})
    monkeypatch.setattr(Concatenate, "reverse_op", property(lambda self: reversed_by()))
    with pytest.raises(UnsupportedModel, match="cannot be converted into those of its checkpoint"):
        tensors.on_disk(1, 2, pool)
