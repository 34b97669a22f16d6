"""Grok-1, which transformers lacks, built from transformers' parts.

The arithmetic is that of the published implementation (github.com/xai-org/grok-1, model.py): an
RMSNorm before and after attention and experts, attention logits capped by a tanh, scaled
embeddings and logits, and eight experts with a GELU gate. A token uses the two most probable
experts of a softmax over all (not renormalised). Names of the configuration and of the tensors on
disk are those of the checkpoints in safetensors (hpcai-tech/grok-1).

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token, B = batch, S = sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, MixtralConfig
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.mixtral.modeling_mixtral import (
    MixtralExperts,
    MixtralModel,
    MixtralPreTrainedModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
)

from moesaic.models.trunk.architecture import Architecture

from .gate import most_probable


class Grok1Config(MixtralConfig):
    model_type = "grok-1"
    default_theta = 10_000.0
    attribute_map = {"num_local_experts": "num_experts", "attn_logit_softcapping": "max_attn_value"}  # noqa: RUF012

    vocab_size: int = 131_072
    hidden_size: int = 6144
    intermediate_size: int = 32_768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    num_experts: int = 8
    max_position_embeddings: int = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def query_pre_attn_scalar(self) -> float:
        """The value whose inverse root scales attention logits, under Gemma's name."""
        return self.attn_output_multiplier**-2


class Grok1Embedding(nn.Embedding):
    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.multiplier = config.embedding_multiplier_scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.multiplier


class Grok1MoE(nn.Module):
    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = MixtralExperts(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        weights_TK, ids_TK = most_probable(x_TH, self.gate.weight, self.top_k)
        return self.experts(x_TH, ids_TK, weights_TK).view_as(x_BSH)


class Grok1DecoderLayer(nn.Module):
    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()

        def norm() -> MixtralRMSNorm:
            return MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.attn = Gemma2Attention(config, layer_idx)  # pyright: ignore[reportArgumentType]
        self.moe_block = Grok1MoE(config)
        self.pre_attn_norm, self.post_attn_norm = norm(), norm()
        self.pre_moe_norm, self.post_moe_norm = norm(), norm()

    def forward(self, x_BSH: Tensor, **attention: Any) -> Tensor:
        attended_BSH, *_ = self.attn(self.pre_attn_norm(x_BSH), **attention)
        x_BSH = x_BSH + self.post_attn_norm(attended_BSH)
        return x_BSH + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x_BSH)))


class Grok1PreTrainedModel(MixtralPreTrainedModel):
    config_class = Grok1Config
    _no_split_modules = ["Grok1DecoderLayer"]  # noqa: RUF012
    # These implementations silently ignore the cap of attention logits.
    _supports_sdpa = False
    _supports_flash_attn = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": Grok1DecoderLayer,
        "attentions": Gemma2Attention,
    }


class Grok1Model(Grok1PreTrainedModel, MixtralModel):
    def __init__(self, config: Grok1Config) -> None:
        # Skip Mixtral's own __init__, which would build its layers; only its forward is used.
        super(MixtralModel, self).__init__(config)
        self.embed_tokens = Grok1Embedding(config)
        self.layers = nn.ModuleList(
            Grok1DecoderLayer(config, n) for n in range(config.num_hidden_layers)
        )
        self.norm = MixtralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MixtralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class Grok1ModelForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.model = Grok1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.multiplier = config.output_multiplier_scale
        self.post_init()

    def forward(
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
        """Compute logits (B, S or ``logits_to_keep``, vocabulary)."""
        kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, last])
        return CausalLMOutputWithPast(
            logits=logits * self.multiplier,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


GROK1 = Architecture(
    config=Grok1Config,
    model=Grok1ModelForCausalLM,
    conversions=(
        *(
            WeightRenaming(f"{name}_norm.scale", f"{name}_norm.weight")
            for name in ("pre_attn", "post_attn", "pre_moe", "post_moe")
        ),
        WeightRenaming("model.norm.scale", "model.norm.weight"),
        WeightConverter(
            ["moe_block.experts.*.linear.weight", "moe_block.experts.*.linear_v.weight"],
            "moe_block.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            "moe_block.experts.*.linear_1.weight",
            "moe_block.experts.down_proj",
            [MergeModulelist(dim=0)],
        ),
    ),
)
