"""OpenMoE (arXiv 2402.01739), which transformers lacks, built from transformers' parts.

The arithmetic is that of the published implementation (ColossalAI, applications of OpenMoE): a
Llama whose attention logits are not scaled, with a SwiGLU of three up-projections. Every
``moe_layer_interval``-th layer has experts of that form, followed by a dense FFN with a norm of its
own. A token uses the two most probable experts of a softmax over all (not renormalised) that have
capacity left: it is given to all first assignments, then to the second ones, in the tokens' order.

One thing differs: an expert's capacity is counted for each sequence, without its padding. The
published code counts it over a whole batch, so there a text depends on its neighbours; for a batch
of one both are the same.

Names of the configuration and of the tensors on disk are those of the published checkpoints, whose
``model_type`` is llama and whose ``architectures`` name `OpenMoeForCausalLM`.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, E = experts, I =
intermediate size, B = batch, S = sequence, R = rows of one expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from moesaic.models.trunk.architecture import Architecture

from .gate import most_probable

TOP_K = 2


class OpenMoeConfig(LlamaConfig):
    model_type = "openmoe"
    attribute_map = {"num_experts_per_tok": "router_topk"}  # noqa: RUF012

    vocab_size: int = 256_384
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    head_dim: int | None = 128
    hidden_act: str = "swiglu"
    mlp_gated: bool = True
    num_experts: int = 32
    moe_layer_interval: int = 6
    router_topk: int = TOP_K
    router_capacity_factor_eval: float = 2.0
    router_min_capacity: int = 4


def three_part_swiglu(up_R: Tensor) -> Tensor:
    """Compute value * silu(gate) * up, (R, 3I) -> (R, I)."""
    value, gate, up = up_R.chunk(3, dim=-1)
    return value * silu(gate) * up


class OpenMoeMLP(nn.Module):
    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        up = torch.cat([self.gate_proj(x_BSH), self.up_proj(x_BSH)], dim=-1)
        return self.down_proj(three_part_swiglu(up))


@use_experts_implementation(is_transposed=True)
class OpenMoeExperts(nn.Module):
    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        count, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.num_experts = count
        self.gate_up_proj = nn.Parameter(torch.empty(count, hidden, 3 * inner))
        self.down_proj = nn.Parameter(torch.empty(count, inner, hidden))

    def _apply_gate(self, up_R: Tensor) -> Tensor:
        return three_part_swiglu(up_R)

    def forward(self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y_TH = torch.zeros_like(x_TH)
        for expert in range(self.num_experts):
            token_R, assignment_R = torch.where(ids_TK == expert)
            up_R = x_TH[token_R] @ self.gate_up_proj[expert]
            out_RH = self._apply_gate(up_R) @ self.down_proj[expert]
            weighted_RH = out_RH * weights_TK[token_R, assignment_R, None]
            y_TH.index_add_(0, token_R, weighted_RH.to(y_TH.dtype))
        return y_TH


class OpenMoeSparseMLP(nn.Module):
    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.capacity_factor = config.router_capacity_factor_eval
        self.min_capacity = config.router_min_capacity
        self.gate_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = OpenMoeExperts(config)

    def forward(self, x_BSH: Tensor, real_BS: Tensor) -> Tensor:
        weights_BSK, ids_BSK = most_probable(x_BSH, self.gate_weight, TOP_K)
        # transformers' experts have no id for an assignment without an expert, so its weight is 0.
        weights_BSK = weights_BSK * self._with_room(ids_BSK, real_BS)
        y_TH = self.experts(x_BSH.flatten(0, 1), ids_BSK.flatten(0, 1), weights_BSK.flatten(0, 1))
        return y_TH.view_as(x_BSH)

    def _with_room(self, ids_BSK: Tensor, real_BS: Tensor) -> Tensor:
        """Return (B, S, K) bool: the assignments of real tokens for which their expert has room."""
        share_B1 = TOP_K * self.capacity_factor * real_BS.sum(1, keepdim=True) / self.num_experts
        room_B1 = share_B1.floor().long()
        room_B1 = (room_B1 + room_B1 % 2).clamp(min=self.min_capacity)
        taken_B1E = torch.zeros_like(ids_BSK[:, :1, :1])
        kept: list[Tensor] = []
        for ids_BS in ids_BSK.unbind(-1):
            chosen_BSE = one_hot(ids_BS, self.num_experts) * real_BS.unsqueeze(-1)
            before_BSE = chosen_BSE.cumsum(1) - 1 + taken_B1E
            before_BS = before_BSE.gather(-1, ids_BS.unsqueeze(-1)).squeeze(-1)
            kept.append((before_BS < room_B1) & real_BS)
            taken_B1E = taken_B1E + chosen_BSE.sum(1, keepdim=True)
        return torch.stack(kept, dim=-1)


class OpenMoeDecoderLayer(nn.Module):
    def __init__(self, config: OpenMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.self_attn.scaling = 1.0
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_sparse = (layer_idx + 1) % config.moe_layer_interval == 0
        if self.is_sparse:
            self.mlp = OpenMoeSparseMLP(config)
            self.pre_extra_mlp_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.extra_mlp = OpenMoeMLP(config)
        else:
            self.mlp = OpenMoeMLP(config)

    def forward(self, x_BSH: Tensor, *, real_BS: Tensor, **attention: Any) -> Tensor:
        attended_BSH, _ = self.self_attn(self.input_layernorm(x_BSH), **attention)
        x_BSH = x_BSH + attended_BSH
        normed_BSH = self.post_attention_layernorm(x_BSH)
        if not self.is_sparse:
            return x_BSH + self.mlp(normed_BSH)
        x_BSH = x_BSH + self.mlp(normed_BSH, real_BS)
        return x_BSH + self.extra_mlp(self.pre_extra_mlp_layernorm(x_BSH))


class OpenMoePreTrainedModel(LlamaPreTrainedModel):
    config_class = OpenMoeConfig
    _no_split_modules = ["OpenMoeDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OpenMoeDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, OpenMoeSparseMLP | OpenMoeExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class OpenMoeModel(OpenMoePreTrainedModel, LlamaModel):
    def __init__(self, config: OpenMoeConfig) -> None:
        # Skip Llama's own __init__, which would build its layers; only its forward is used.
        super(LlamaModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            OpenMoeDecoderLayer(config, n) for n in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class OpenMoeForCausalLM(OpenMoePreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: OpenMoeConfig) -> None:
        """Build the model. Raises ValueError for values that the published code does not have."""
        for name, wanted in (("hidden_act", "swiglu"), ("mlp_gated", True), ("router_topk", TOP_K)):
            if (given := getattr(config, name)) != wanted:
                raise ValueError(f"{name}: {given!r}; of OpenMoE only {wanted!r} is known here")
        super(LlamaForCausalLM, self).__init__(config)
        self.model = OpenMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S or ``logits_to_keep``, vocabulary).

        ``attention_mask`` is (B, all tokens).
        """
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        shape_BS = given.shape[:2]
        if attention_mask is None:
            real_BS = torch.ones(shape_BS, dtype=torch.bool, device=given.device)
        elif attention_mask.dim() == 2:
            real_BS = attention_mask[:, -shape_BS[1] :].bool()
        else:
            raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}, not (B, S)")
        run: Any = super().forward
        return run(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            real_BS=real_BS,
            **kwargs,
        )


class _JoinUps(ConversionOps):
    """Joins (E, H, 2I) and (E, H, I) side by side."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        gate, up = (_only(input_dict[pattern]) for pattern in source_patterns)
        return {target_patterns[0]: torch.cat([gate, up], dim=-1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _PartUps()


class _PartUps(ConversionOps):
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        (joined,) = map(_only, input_dict.values())
        inner = joined.shape[-1] // 3
        parts = joined.split([2 * inner, inner], dim=-1)
        return {name: p.contiguous() for name, p in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _JoinUps()


def _only(tensors: Any) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


OPENMOE = Architecture(
    config=OpenMoeConfig,
    model=OpenMoeForCausalLM,
    conversions=(
        WeightConverter(
            ["mlp.experts.wi_gate", "mlp.experts.wi_up"], "mlp.experts.gate_up_proj", [_JoinUps()]
        ),
        WeightRenaming("mlp.experts.wo", "mlp.experts.down_proj"),
    ),
)
