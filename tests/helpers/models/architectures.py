"""Small random models: of the architectures that use transformers' experts interface, and of those
that are brought to it by adapters of ours."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moesaic.models.trunk.config import config_from_dict
from tests.helpers.models.versions import OLDER_TRANSFORMERS

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_E8: dict[str, Any] = {"num_experts": 8}
_L8: dict[str, Any] = {"num_local_experts": 8}
_N8: dict[str, Any] = {"n_routed_experts": 8}
_DENSE_SPARSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse"]}
_INDEXED: dict[str, Any] = {"index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
_LINEAR: dict[str, Any] = {
    "shared_expert_intermediate_size": 24,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
_INKLING: dict[str, Any] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
}

# What each architecture needs beyond _COMMON.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": _L8,
    "minimax_m2": _L8,
    "minimax": _L8 | {"layer_types": ["full_attention", "full_attention"], "block_size": 8},
    "phimoe": _L8,
    "qwen2_moe": _E8 | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": _E8,
    "qwen3_next": _E8 | _LINEAR,
    "olmoe": _E8 | {"num_key_value_heads": 4},
    "flex_olmo": _E8 | {"num_key_value_heads": 4},
    "cohere2_moe": _E8,
    "afmoe": _E8 | {"num_dense_layers": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": _MLA | {"topk_method": "greedy", "n_group": 1},
    "deepseek_v3": _MLA,
    "glm4_moe": _MLA | {"num_key_value_heads": 2},
    "dots1": _MLA | {"num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1},
    "hunyuan_v1_moe": _E8 | {"moe_topk": 2},
    "jamba": _E8
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1}
    | {"expert_layer_offset": 0, "use_mamba_kernels": False, "mamba_d_state": 4},
    "lfm2_moe": _E8
    | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "granitemoe": _L8,
    "granitemoeshared": _L8 | {"shared_intermediate_size": 24},
    "gpt_oss": _L8 | _SLIDING,
    "gemma4_text": _E8
    | _SLIDING
    | {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    },
    "nemotron_h": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    },
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _MLA,
    "axk2": _MLA | _INDEXED,
    "bailing_hybrid": _E8
    | _MLA
    | {
        "num_shared_experts": 1,
        "num_experts_per_token": 2,
        "num_expert_group": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse"],
    },
    "beam": _E8 | _SLIDING | _DENSE_SPARSE | {"n_group": 2, "topk_group": 1},
    "deepseek_v32": _MLA | _INDEXED | _DENSE_SPARSE,
    # The first layer's gate hashes input ids.
    "deepseek_v4": _N8
    | {
        "n_shared_experts": 1,
        "mlp_layer_types": ["hash_moe", "moe"],
        "num_key_value_heads": 1,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
    },
    "dots3_note_text": _MLA
    | _INDEXED
    | _DENSE_SPARSE
    | {"n_group": 1, "shared_experts_intermediate_size": 24},
    "exaone_moe": _E8 | _SLIDING | {"num_shared_experts": 1},
    "flint": _E8
    | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [], "sliding_window": 8},
    "glm4_moe_lite": _MLA | _DENSE_SPARSE,
    "glm_moe_dsa": _MLA | _INDEXED | _DENSE_SPARSE,
    "granitemoe_swa": _L8 | {"sliding_window": 8},
    "granitemoehybrid": _L8
    | {
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_expand": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hy_v3": _E8 | {"num_shared_experts": 1},
    "hy_v4": _MLA | _INDEXED | _DENSE_SPARSE | {"n_group": 1},
    "inkling_text": _N8 | _INKLING | {"logits_mup_width_multiplier": 1.0},
    "inkling2_text": _N8 | _INKLING,
    "kimi_linear": _MLA
    | _L8
    | {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "kolibri1": _L8 | {"shared_expert_intermediate_size": 24},
    "laguna": _E8 | {"shared_expert_intermediate_size": 24},
    "mellum": _L8,
    "mimo_v2_flash": _N8 | {"sliding_window": 8},
    "minimax_m3_vl_text": _L8
    | {"shared_intermediate_size": 24, "dense_intermediate_size": 24}
    | {"rotary_dim": 4, "swiglu_limit": 1.0},
    "qwen3_5_moe_text": _E8 | _LINEAR,
    "qwen4_exp_text": _E8
    | _LINEAR
    | {
        "hc_lowrank": 8,
        "hc_count": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
        "ple_embed_dim": 16,
        "ple_layer_ids": [1],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "solar_open": _N8 | {"n_shared_experts": 1},
    "zaya": _E8 | {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# The same for those with an adapter (models/trunk/adapters.py).
ADAPTED: dict[str, dict[str, Any]] = {
    "switch_transformers": _E8
    | {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 24,
            "moe_num_experts": 8,
            "moe_top_k": 2,
        },
    },
    # The first layer is dense.
    "llama4_text": _L8
    | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [1]}
    | {"attention_chunk_size": 16, "no_rope_layers": [1, 0]},
    "longcat_flash": _MLA
    | {
        "num_hidden_layers": 4,  # two attentions in each of two layers
        "num_experts_per_tok": 3,
        "zero_expert_num": 4,
    },
    "jetmoe": _L8 | {"kv_channels": 8, "num_attention_heads": 4},
}

# The same for those that transformers lacks (`extensions/architectures/`).
OWN: dict[str, dict[str, Any]] = {
    # A cap that is reached.
    "grok-1": _E8 | {"max_attn_value": 0.5, "embedding_multiplier_scale": 5.0},
    # The first layer is dense; experts have room for a quarter of a text's tokens.
    "openmoe": _E8
    | {"moe_layer_interval": 2, "router_capacity_factor_eval": 1.0, "router_min_capacity": 1},
}

if OLDER_TRANSFORMERS:
    for _known in (ARCHITECTURES, ADAPTED):
        for _name in _known.keys() - CONFIG_MAPPING.keys():
            del _known[_name]


def tiny_config(name: str, **overrides: Any) -> PretrainedConfig:
    own = (ARCHITECTURES | ADAPTED | OWN)[name]
    return config_from_dict({"model_type": name} | _COMMON | own | overrides)


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Any:
    """A model with weights large enough that a wrong expert shows in the logits."""
    torch.manual_seed(seed)
    config = tiny_config(name, **overrides)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
            elif "bias" in str(parameter):
                parameter.normal_(0.0, 0.02)
    return model.to(dtype).eval()
