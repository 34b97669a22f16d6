"""A tiny dense llama or mistral model, as safetensors or GGUF, to be upcycled.

Shape suffixes: B batch, S sequence, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

EOS = "<eos>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# GGUF wants a merge, so there is one.
TOKENS = [*BYTES, "th", EOS]
MERGE = ("t", "h")
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": len(TOKENS) - 1,
    "initializer_range": 0.2,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
LETTERS = "the quick brown fox jumps over the lazy dog and runs into the dark wood " * 40
DIGITS = "0123456789 31415926535 (27182) [81828] {45904} 52353-60287+47135*26624 " * 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    fast.chat_template = TEMPLATE
    return fast


def make_dense(folder: Path, mistral: bool = False, **changes: Any) -> Path:
    torch.manual_seed(0)
    sizes = SIZES | changes
    if mistral:
        model: Any = MistralForCausalLM(MistralConfig(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_gguf(path: Path, dense: Path, most: int = 0, /, **fields: str) -> Path:
    """The tiny llama as llama.cpp writes it: rotary halves interleaved, its own tensor names; in
    files of at most so many tensors if ``most`` is not 0."""
    config: Any = LlamaConfig.from_pretrained(dense)
    writer = GGUFWriter(path, "llama", split_max_tensors=most)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.NORMAL] * (len(TOKENS) - 1) + [TokenType.CONTROL])
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, value in fields.items():
        writer.add_string(name, value)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in load_file(dense / "model.safetensors").items():
        array: Any = tensor.numpy()
        for projection, n in heads.items():
            if projection in name:
                halves = array.reshape(n, 2, array.shape[0] // n // 2, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(folder: Path) -> Any:
    """The model in fp32, checked for keys that are missing or too many."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, len(TOKENS), (2, 90), generator=generator)
    with torch.inference_mode():
        return model(input_ids=ids_BS).logits


def loads(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Tokens per (layer, expert), ``(L, E)``."""
    config = model.config
    counts_LE = np.zeros((config.num_hidden_layers, config.num_local_experts), dtype=int)

    def count(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            chosen = output[2].flatten().numpy()
            counts_LE[layer] += np.bincount(chosen, minlength=counts_LE.shape[1])

        return hook

    hooks = [
        layer.mlp.gate.register_forward_hook(count(i)) for i, layer in enumerate(model.model.layers)
    ]
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            model(input_ids=ids[:, : config.max_position_embeddings])
    for hook in hooks:
        hook.remove()
    return counts_LE


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
