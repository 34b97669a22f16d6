"""OpenMoE against a plain statement of its published arithmetic, from the tensors on disk.

Shape suffixes: S = sequence, H = hidden size, V = vocabulary, N = heads, D = head size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.models.trunk.config import config_from_dict
from moesaic.models.trunk.describe import describe
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import load_trunk, meta_model
from moesaic.proto.errors import CheckpointError, UnsupportedModel
from tests.helpers.models.architectures import tiny_model
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
from tests.unit.models.test_grok1 import rms, rotated

EPS = 1e-6
IDS = torch.randint(3, 90, (23,), generator=torch.Generator().manual_seed(1))


def attention(x_SH: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """As many heads of keys and values as of queries are asked for; logits are not scaled."""
    tokens = len(x_SH)
    size = weights["q_proj.weight"].shape[0] // heads
    q, k, v = (x_SH @ weights[f"{name}_proj.weight"].T for name in "qkv")
    q_SND, k_SND = rotated(q.view(tokens, -1, size)), rotated(k.view(tokens, -1, size))
    v_SND = v.view(tokens, -1, size)
    out_SND = torch.zeros_like(q_SND)
    each = heads // k_SND.shape[1]
    for head in range(heads):
        scores_SS = q_SND[:, head] @ k_SND[:, head // each].T
        scores_SS = scores_SS.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -1e30)
        out_SND[:, head] = scores_SS.softmax(-1) @ v_SND[:, head // each]
    return out_SND.flatten(1) @ weights["o_proj.weight"].T


def ffn(x: Tensor, wi_gate: Tensor, wi_up: Tensor, wo: Tensor) -> Tensor:
    """All three as (in, out)."""
    value, gate = (x @ wi_gate).chunk(2, dim=-1)
    return (value * gate * torch.sigmoid(gate) * (x @ wi_up)) @ wo


def dense(x_SH: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return ffn(x_SH, *(weights[f"{name}_proj.weight"].T for name in ("gate", "up", "down")))


def experts(x_SH: Tensor, weights: dict[str, Tensor], room: int) -> tuple[Tensor, int]:
    """The sum for each token, and how many choices found no room."""
    probabilities = (x_SH @ weights["gate_weight"].T).softmax(-1)
    ranked = probabilities.argsort(dim=-1, descending=True)
    y_SH, taken, dropped = torch.zeros_like(x_SH), [0] * probabilities.shape[1], 0
    for choice in range(2):
        for t in range(len(x_SH)):
            expert = int(ranked[t, choice])
            taken[expert] += 1
            if taken[expert] > room:
                dropped += 1
                continue
            wi_gate, wi_up, wo = (
                weights[f"experts.{name}"][expert] for name in ("wi_gate", "wi_up", "wo")
            )
            y_SH[t] += probabilities[t, expert] * ffn(x_SH[t], wi_gate, wi_up, wo)
    return y_SH, dropped


def reference(on_disk: dict[str, Tensor], of: Any, ids: Tensor) -> tuple[Tensor, int]:
    """(S, V) logits, and how many choices of experts found no room."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in on_disk.items() if k.startswith(prefix)}

    room = math.floor(2 * of.router_capacity_factor_eval * len(ids) / of.num_experts)
    room = max(room + room % 2, of.router_min_capacity)
    x_SH, dropped = on_disk["model.embed_tokens.weight"][ids], 0
    for layer in range(of.num_hidden_layers):
        one = below(f"model.layers.{layer}.")
        normed = rms(x_SH, one["input_layernorm.weight"], EPS)
        attended = attention(
            normed, below(f"model.layers.{layer}.self_attn."), of.num_attention_heads
        )
        x_SH = x_SH + attended
        normed, inner = (
            rms(x_SH, one["post_attention_layernorm.weight"], EPS),
            below(f"model.layers.{layer}.mlp."),
        )
        if (layer + 1) % of.moe_layer_interval:
            x_SH = x_SH + dense(normed, inner)
            continue
        mixed, lost = experts(normed, inner, room)
        x_SH, dropped = x_SH + mixed, dropped + lost
        normed = rms(x_SH, one["pre_extra_mlp_layernorm.weight"], EPS)
        x_SH = x_SH + dense(normed, below(f"model.layers.{layer}.extra_mlp."))
    last_SH = rms(x_SH, on_disk["model.norm.weight"], EPS)
    return last_SH @ on_disk["lm_head.weight"].T, dropped


@pytest.mark.parametrize("length", [1, 2, 7, 23])
def test_logits_are_those_of_the_published_arithmetic(length: int, tmp_path: Path) -> None:
    model: Any = saved(tmp_path, "openmoe")
    expected, dropped = reference(
        load_file(tmp_path / "model.safetensors"), model.config, IDS[:length]
    )
    with torch.no_grad():
        found = model(IDS[None, :length]).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (dropped > 0) == (length > 1)


def test_a_text_does_not_depend_on_its_neighbours_or_padding() -> None:
    model: Any = tiny_model("openmoe")
    batch, mask = torch.zeros(2, 23, dtype=torch.long), torch.zeros(2, 23, dtype=torch.long)
    batch[0], mask[0] = IDS, 1
    batch[1, -9:], mask[1, -9:] = IDS[:9], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(batch, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(both[0], model(IDS[None]).logits[0], atol=1e-5, rtol=1e-5)
        alone = model(IDS[None, :9]).logits[0]
    torch.testing.assert_close(both[1, -9:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"attention_mask: shape \(2, 1, 23, 23\)"):
        model(batch, attention_mask=torch.ones(2, 1, 23, 23))


def test_as_it_is_published(tmp_path: Path) -> None:
    """A Llama by its model_type, with code of its own that is not run."""
    model: Any = saved(tmp_path, "openmoe")
    config(
        model_type="llama",
        architectures=["OpenMoeForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM"},
    )(tmp_path)
    (tmp_path / "modeling_openmoe.py").write_text("raise SystemExit('the model ran its own code')")
    assert type(trunk_of(tmp_path)).__name__ == "OpenMoeForCausalLM"
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {f"model.layers.1.mlp.experts.{name}" for name in ("wi_gate", "wi_up", "wo")} <= names
    assert {"model.layers.1.mlp.gate_weight", "model.layers.1.extra_mlp.gate_proj.weight"} <= names
    found = checkpoint(tmp_path).read(1, 5)
    experts = model.model.layers[1].mlp.experts
    assert torch.equal(found.up, experts.gate_up_proj[5])
    assert torch.equal(found.down, experts.down_proj[5])
    described = describe(tmp_path, torch.float32)
    assert (described.architecture, described.top_k, described.layers) == ("openmoe", 2, {1: 8})


def test_the_published_sizes() -> None:
    layers = experts_layers(meta_model(config_from_dict({"model_type": "openmoe"})))
    assert {layer.layer: layer.num_experts for layer in layers} == dict.fromkeys(
        (5, 11, 17, 23), 32
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            remove(r"experts\.wi_up"),
            r"lacks model\.layers\.1\.mlp\.experts\.gate_up_proj \(of .*wi_up",
        ),
        (edit(r"experts\.wi_gate", lambda t: t[:7]), r"wi_gate has shape \(7, 32, 96\)"),
        (edit(r"experts\.wo", lambda t: t[:, 1:]), r"has shape \(8, 47, 32\)"),
        (remove(r"gate_weight"), r"lacks model\.layers\.1\.mlp\.gate_weight"),
        (remove(r"extra_mlp\.up"), r"lacks model\.layers\.1\.extra_mlp\.up_proj"),
        (config(router_topk=1), "router_topk: 1"),
        (config(hidden_act="gelu"), "hidden_act: 'gelu'"),
        (config(moe_layer_interval=0), "model of type 'openmoe'"),
    ],
    ids=["half", "fewer", "rows", "gate", "extra", "top-1", "activation", "interval"],
)
def test_damage(damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path, "openmoe")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read_all(tmp_path)
        load_trunk(tmp_path, dtype=torch.float32, device=torch.device("cpu"))


def test_an_architecture_that_is_ours_by_its_name_alone(tmp_path: Path) -> None:
    """Any other Llama stays one."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM: no experts module"):
        trunk_of(tmp_path)
