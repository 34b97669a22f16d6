"""Grok-1 against a plain statement of its published arithmetic, from the tensors on disk.

Shape suffixes: S = sequence, T = tokens, H = hidden size, V = vocabulary, N = heads, D = head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu

from moesaic.models.trunk.config import config_from_dict
from moesaic.models.trunk.describe import describe
from moesaic.models.trunk.experts_layers import experts_layers
from moesaic.models.trunk.trunk import load_trunk, meta_model
from moesaic.proto.errors import CheckpointError
from tests.helpers.models.architectures import tiny_model
from tests.helpers.models.model_folders import Damage, checkpoint, config, edit, read_all, remove

IDS = torch.randint(3, 90, (11,), generator=torch.Generator().manual_seed(1))


def rms(x_SH: Tensor, scale_H: Tensor, eps: float = 1e-5) -> Tensor:
    return x_SH * torch.rsqrt(x_SH.square().mean(-1, keepdim=True) + eps) * scale_H


def rotated(x_SND: Tensor) -> Tensor:
    size = x_SND.shape[-1]
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angles = torch.arange(len(x_SND))[:, None, None] * frequencies
    first, second = x_SND.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(x_SH: Tensor, weights: dict[str, Tensor], of: Any, cap: float) -> Tensor:
    tokens, heads, groups = len(x_SH), of.num_attention_heads, of.num_key_value_heads
    q, k, v = (x_SH @ weights[f"{name}_proj.weight"].T for name in "qkv")
    q_SND, k_SND = rotated(q.view(tokens, heads, -1)), rotated(k.view(tokens, groups, -1))
    v_SND = v.view(tokens, groups, -1)
    out_SND = torch.zeros_like(q_SND)
    for head in range(heads):
        group = head // (heads // groups)
        scores_SS = q_SND[:, head] @ k_SND[:, group].T * of.attn_output_multiplier
        scores_SS = cap * torch.tanh(scores_SS / cap)
        scores_SS = scores_SS.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -1e30)
        out_SND[:, head] = scores_SS.softmax(-1) @ v_SND[:, group]
    return out_SND.flatten(1) @ weights["o_proj.weight"].T


def experts(x_SH: Tensor, weights: dict[str, Tensor], top_k: int) -> Tensor:
    y_SH = torch.zeros_like(x_SH)
    for t, x_H in enumerate(x_SH):
        probabilities = (weights["gate.weight"] @ x_H).softmax(0)
        for expert in probabilities.argsort(descending=True)[:top_k].tolist():
            linear, linear_v, linear_1 = (
                weights[f"experts.{expert}.{name}.weight"]
                for name in ("linear", "linear_v", "linear_1")
            )
            inner = gelu(linear @ x_H, approximate="tanh") * (linear_v @ x_H)
            y_SH[t] += probabilities[expert] * (linear_1 @ inner)
    return y_SH


def reference(on_disk: dict[str, Tensor], of: Any, cap: float | None = None) -> Tensor:
    """(S, V) logits of `IDS`."""

    def below(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in on_disk.items() if k.startswith(prefix)}

    embedding_VH = on_disk["model.embed_tokens.weight"]
    x_SH = embedding_VH[IDS] * of.embedding_multiplier_scale
    for layer in range(of.num_hidden_layers):
        one = below(f"model.layers.{layer}.")
        attended = attention(
            rms(x_SH, one["pre_attn_norm.scale"]),
            below(f"model.layers.{layer}.attn."), of, cap or of.max_attn_value,
        )  # fmt: skip
        x_SH = x_SH + rms(attended, one["post_attn_norm.scale"])
        mixed = experts(
            rms(x_SH, one["pre_moe_norm.scale"]),
            below(f"model.layers.{layer}.moe_block."), of.num_experts_per_tok,
        )  # fmt: skip
        x_SH = x_SH + rms(mixed, one["post_moe_norm.scale"])
    last_SH = rms(x_SH, on_disk["model.norm.scale"])
    return last_SH @ embedding_VH.T * of.output_multiplier_scale


def saved(folder: Path) -> Any:
    model = tiny_model("grok-1")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def test_logits_are_those_of_the_published_arithmetic(tmp_path: Path) -> None:
    model = saved(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    expected = reference(on_disk, model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS[None]).logits[0], expected, atol=1e-5, rtol=1e-5)
        last = model(IDS[None], logits_to_keep=1).logits
    torch.testing.assert_close(last[0], expected[-1:], atol=1e-5, rtol=1e-5)
    # The cap is one that is reached.
    assert float((reference(on_disk, model.config, cap=30.0) - expected).abs().max()) > 1e-2


def test_names_on_disk_are_those_of_the_published_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path)
    names = {
        name.replace("layers.1.", "layers.N.").replace("experts.7.", "experts.N.")
        for name in load_file(tmp_path / "model.safetensors")
    }
    parts = (
        *(f"{when}_{what}_norm.scale" for when in ("pre", "post") for what in ("attn", "moe")),
        *(f"attn.{name}_proj.weight" for name in "qkvo"),
        *(f"moe_block.experts.N.{name}.weight" for name in ("linear", "linear_v", "linear_1")),
        "moe_block.gate.weight",
    )
    assert {f"model.layers.N.{part}" for part in parts} | {
        "model.embed_tokens.weight",
        "model.norm.scale",
    } <= names


def test_the_published_sizes() -> None:
    """314 billion parameters beside the embeddings."""
    model = meta_model(config_from_dict({"model_type": "grok-1"}))
    assert model.num_parameters(exclude_embeddings=True) // 10**9 == 314
    layers = experts_layers(model)
    assert [layer.num_experts for layer in layers] == [8] * 64
    assert {layer.hidden_size for layer in layers} == {6144}


def test_described(tmp_path: Path) -> None:
    saved(tmp_path)
    found = describe(tmp_path, torch.float32)
    assert (found.architecture, found.top_k, found.layers) == ("grok-1", 2, {0: 8, 1: 8})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            remove(r"1\.moe.*experts\.3\.linear_v"),
            r"lacks model\.layers\.1\.moe_block\.experts\.3\.linear_v",
        ),
        (edit(r"experts\.3\.linear_1", lambda t: t[1:]), r"has shape \(31, 48\)"),
        (remove(r"1\.post_moe_norm"), r"lacks model\.layers\.1\.post_moe_norm\.weight"),
        (remove(r"1\.moe_block\.gate"), r"lacks model\.layers\.1\.moe_block\.gate\.weight"),
        (config(num_experts=-8), "model of type 'grok-1'"),
        (config(num_attention_heads=0, head_dim=None), "config.json: .*zero"),
        (config(hidden_act="nosuchact"), "nosuchact"),
    ],
    ids=["half", "rows", "norm", "gate", "negative", "heads", "activation"],
)
def test_damage(damage: Damage, words: str, tmp_path: Path) -> None:
    saved(tmp_path)
    checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        read_all(tmp_path)
        load_trunk(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
