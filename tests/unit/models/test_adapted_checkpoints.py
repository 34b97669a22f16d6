"""Checkpoints of architectures with an adapter: the right bytes, no others, damage by its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, NllbMoeConfig

from moesaic.actors.engine.trunk_config import TrunkConfig
from moesaic.actors.engine.vllm_backend.engine import VllmEngine
from moesaic.actors.trunk.attach import attach_model
from moesaic.cluster.placement import ModelRef
from moesaic.models.trunk.config import read_config
from moesaic.models.trunk.describe import describe
from moesaic.models.trunk.experts_layers import experts_layers, is_experts_module
from moesaic.models.trunk.trunk import BROKEN, is_unmodified, meta_model
from moesaic.proto.errors import CheckpointError, MoesaicError, UnsupportedModel
from tests.helpers.models.architectures import ADAPTED, tiny_model
from tests.helpers.models.model_folders import (
    Damage,
    checkpoint,
    config,
    edit,
    read_all,
    remove,
    saved,
    trunk_of,
)
from tests.unit.models.test_checkpoint import Spy, spy

__all__ = ["spy"]  # a fixture

NAMES = sorted(ADAPTED)
E = 8
# Of the experts' module, as transformers has it in memory: what expert e is in the pool.
Slices = Callable[[Any, int], tuple[Tensor, Tensor]]


def _switch(model: Any, e: int) -> tuple[Tensor, Tensor]:
    expert = model.decoder.block[1].layer[2].mlp.experts[f"expert_{e}"]
    return expert.wi.weight, expert.wo.weight


def _dbrx(model: Any, e: int) -> tuple[Tensor, Tensor]:
    glu = model.transformer.blocks[1].ffn.experts.mlp
    gate, up, down = (matrix.view(E, 24, 32)[e] for matrix in (glu.w1, glu.v1, glu.w2))
    return torch.cat([gate, up]), down.t()


def _fused(model: Any, e: int) -> tuple[Tensor, Tensor]:
    layer = model.model.layers[1]
    experts = (layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp).experts
    return experts.gate_up_proj[e], experts.down_proj[e]


def _jetmoe(model: Any, e: int) -> tuple[Tensor, Tensor]:
    block = model.model.layers[1].mlp
    return block.input_linear.weight[e], block.output_linear.weight[e]


SLICES: dict[str, Slices] = {
    "switch_transformers": _switch,
    "dbrx": _dbrx,
    "llama4_text": _fused,
    "longcat_flash": _fused,
    "jetmoe": _jetmoe,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_of_the_last_layer(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    found = checkpoint(tmp_path)
    last = max(found.layers)
    assert found.layers[last].num_experts == E
    for expert in range(E):
        up, down = SLICES[name](model, expert)
        weights = found.read(last, expert)
        assert torch.equal(weights.up, up)
        assert torch.equal(weights.down, down)
        assert weights.tensors().keys() == {"up", "down"}
        for tensor in weights.tensors().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_only_the_bytes_that_are_wanted_are_read(name: str, spy: Spy, tmp_path: Path) -> None:
    model = saved(tmp_path, name)
    found = checkpoint(tmp_path)
    last = max(found.layers)
    assert not spy.read, "opening a checkpoint reads no tensor"
    weights = found.read(last, 3)
    assert sum(spy.read.values()) == weights.nbytes
    theirs = set(spy.read)
    spy.read.clear()
    trunk = trunk_of(tmp_path)
    assert spy.read, "the spy does not see transformers read"
    assert not theirs & spy.read.keys()
    assert not any(parameter.is_meta for parameter in trunk.parameters())
    routed = sum(layer.num_experts for layer in found.layers.values()) * weights.nbytes // 4
    if name == "longcat_flash":  # transformers' zero-compute experts have weights that nobody reads
        routed += len(found.layers) * model.config.zero_expert_num * 2 * 24 * 32
    assert sum(p.numel() for p in trunk.parameters()) == model.num_parameters() - routed


@pytest.mark.parametrize(("name", "top_k", "sparse"), [
    ("switch_transformers", 1, 2), ("dbrx", 2, 2), ("llama4_text", 1, 1), ("longcat_flash", 3, 2),
    ("jetmoe", 2, 2),
])  # fmt: skip
def test_described(name: str, top_k: int, sparse: int, tmp_path: Path) -> None:
    saved(tmp_path, name)
    found = describe(tmp_path, torch.bfloat16)
    assert (found.architecture, found.top_k) == (name, top_k)
    assert list(found.layers.values()) == [E] * sparse
    assert found.experts_bytes == sparse * E * found.expert_bytes
    trunk = trunk_of(tmp_path)
    assert found.trunk_bytes == 2 * sum(parameter.numel() for parameter in trunk.parameters())


def nested(outer: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        whole = json.loads(file.read_text())
        whole[outer] |= values
        file.write_text(json.dumps(whole))

    return damage


DAMAGED: list[tuple[str, str, Damage, str]] = [
    # name, architecture, what is done to it, what the message says
    ("one", "switch_transformers", remove(r"expert_3\.wi"), "experts.expert_3.wi.weight"),
    ("rows", "switch_transformers", edit(r"expert_3\.wo", lambda t: t[1:]), "shape (31, 48)"),
    ("all", "switch_transformers", remove(r"expert_\d\.wo"), "lacks decoder.block.1"),
    ("gate", "dbrx", remove(r"1\.ffn.*v1"), "makes (8, 24, 32)"),
    ("fewer", "dbrx", edit(r"1\.ffn.*w2", lambda t: t[:-24]), "makes (7, 32, 24)"),
    ("torn", "dbrx", edit(r"1\.ffn.*w1", lambda t: t[:-1]), "do not make"),
    ("columns", "dbrx", edit(r"1\.ffn.*w2", lambda t: t[:, 1:]), "shape (192, 31)"),
    ("none", "dbrx", nested("ffn_config", moe_num_experts=-1), "model of type 'dbrx'"),
    ("halves", "llama4_text", edit(r"1\..*gate_up", lambda t: t[..., 1:]), "shape (8, 32, 95)"),
    ("gone", "llama4_text", remove(r"1\..*experts.down"), "lacks model.layers.1.feed"),
    (
        "one",
        "longcat_flash",
        remove(r"1\..*experts\.3\.down"),
        "lacks model.layers.1.mlp.experts.3.d",
    ),
    ("zero", "longcat_flash", config(n_routed_experts=0), "model of type 'longcat_flash'"),
    ("fewer", "jetmoe", edit(r"1\.mlp\.input_linear", lambda t: t[:7]), "has shape (7, 96, 32)"),
    ("int8", "jetmoe", edit(r"1\.mlp\.output", lambda t: t.to(torch.int8)), "quantised"),
]


@pytest.mark.parametrize(
    ("architecture", "damage", "words"),
    [case[1:] for case in DAMAGED],
    ids=[f"{case[1]}-{case[0]}" for case in DAMAGED],
)
def test_damaged_experts(architecture: str, damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path, architecture)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_all(tmp_path)


TRUNKS_DAMAGED: list[tuple[str, Damage, str]] = [
    (
        "switch_transformers",
        remove(r"router\.classifier"),
        "lacks decoder.block.1.layer.2.mlp.rout",
    ),
    ("dbrx", remove(r"1\.ffn\.router"), "lacks transformer.blocks.1.ffn.router.layer.weight"),
    ("llama4_text", remove(r"shared_expert\.up"), "lacks model.layers.1.feed_forward.shared_exp"),
    ("longcat_flash", remove(r"1\.mlps\.1\.up"), "lacks model.layers.1.mlps.1.up_proj.weight"),
    ("jetmoe", remove(r"1\.mlp\.bias"), "lacks model.layers.1.mlp.bias"),
    ("jetmoe", remove(r"1\.self.*experts\.input"), "lacks model.layers.1.self_attention.experts"),
]


@pytest.mark.parametrize(("architecture", "damage", "words"), TRUNKS_DAMAGED)
def test_damaged_trunks(architecture: str, damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path, architecture)
    damage(tmp_path)
    with pytest.raises(MoesaicError, match=re.escape(words)):
        trunk_of(tmp_path)


def test_nllb_moe_is_refused_for_as_long_as_transformers_computes_it_wrongly(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForSeq2SeqLM.from_config(
        NllbMoeConfig(
            vocab_size=96, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, num_experts=4,
            encoder_layers=1, decoder_layers=1, encoder_sparse_step=1, decoder_sparse_step=1,
            encoder_attention_heads=4, decoder_attention_heads=4, expert_capacity=64,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(3, 67)[None]
    asked: list[str] = []
    for name, expert in model.model.encoder.layers[0].ffn.experts.items():
        expert.register_forward_hook(lambda *_, name=name: asked.append(name))
    model(input_ids=ids, decoder_input_ids=ids)
    # Once this fails, transformers is right again and an adapter can be written.
    assert set(asked) <= {"expert_0", "expert_1"}
    model.save_pretrained(tmp_path)
    for read in (read_all, trunk_of, lambda folder: describe(folder, torch.float32)):
        with pytest.raises(UnsupportedModel, match=r"'nllb-moe': .*only experts 0 and 1"):
            read(tmp_path)
    assert list(BROKEN) == ["nllb-moe"]


def test_a_model_in_memory_is_told_to_come_from_a_folder() -> None:
    with pytest.raises(UnsupportedModel, match=r"Dbrx.*save_pretrained.*Cluster\.from_pretrained"):
        attach_model(
            tiny_model("dbrx"), namespace="", name="m", replicas=1, exact=False, train=False,
            make_config=lambda ref: pytest.fail("nothing was to be opened"),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["llama4_text", "grok-1"])
def test_vllm_is_not_asked_for_them(name: str, tmp_path: Path) -> None:
    """Its layers may call their experts in other ways; nobody has compared them."""
    saved(tmp_path, name)
    ref = ModelRef(name="m", dtype="float32", path=str(tmp_path))
    engine = VllmEngine(TrunkConfig(namespace="", name="t", model=ref))
    words = f"engine: vllm does not serve models of type '{name}'; use transformers"
    with pytest.raises(UnsupportedModel, match=words):
        engine.start()


def test_a_model_that_is_left_alone() -> None:
    """Those that dispatch through the interface have no adapter."""
    plain = meta_model(tiny_model("mixtral").config)
    experts = [module for module in plain.modules() if is_experts_module(module)]
    assert {type(module).__module__.partition(".")[0] for module in experts} == {"transformers"}
    assert len(experts_layers(plain)) == 2
    assert is_unmodified(plain)


def test_zero_compute_experts_have_no_tensors_as_published(tmp_path: Path) -> None:
    saved(tmp_path, "longcat_flash")
    remove(r"mlp\.experts\.(8|9|10|11)\.")(tmp_path)
    read_all(tmp_path)
    trunk_of(tmp_path)


def test_the_text_of_a_llama_4_of_text_and_images(tmp_path: Path) -> None:
    """As its checkpoints are published; those of the text alone have other names."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = tiny_model("llama4_text").config.to_dict()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision = sizes | dict.fromkeys(
        ("intermediate_size", "vision_output_dim", "projector_input_dim", "projector_output_dim"),
        16,
    )
    torch.manual_seed(0)
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision))
    whole.save_pretrained(tmp_path)
    assert read_config(tmp_path).model_type == "llama4"
    model: Any = whole.language_model
    for expert in range(E):
        assert torch.equal(checkpoint(tmp_path).read(1, expert).up, _fused(model, expert)[0])
    gate = "model.layers.1.feed_forward.router.weight"
    assert torch.equal(trunk_of(tmp_path).get_parameter(gate), model.get_parameter(gate))
