"""A tiny tokenizer and a tiny random Mixtral, made in memory: no network, milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

# A tiny matmul on two threads waits for the second one; under load that took minutes.
torch.set_num_threads(1)

CORPUS = (
    "the quick brown fox jumps over the lazy dog. Experts come, go and die; no request notices. "
    "Größe, naïve café, Ελλάδα, Москва, 日本語, 🙂🚀 and 0123456789! "
    "The capital of France is Paris."
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML: <|endoftext|> is 0, <|im_end|> (the end of text) is 2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[2], pad_token=SPECIAL[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def tiny_mixtral(
    *,
    seed: int = 0,
    layers: int = 2,
    experts: int = 4,
    max_positions: int = 512,
    eos_token_id: int | None = None,
    experts_implementation: str = "eager",
) -> MixtralForCausalLM:
    """fp32, random weights with a spread that makes greedy texts wander instead of repeating."""
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=max_positions,
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=0,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    config._experts_implementation = experts_implementation
    torch.manual_seed(seed)
    model = MixtralForCausalLM(config).eval()
    model.generation_config.eos_token_id = eos_token_id
    model.generation_config.pad_token_id = 0
    return model


def sentencepiece_like_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's and Mistral's: spaces as a metaspace, unknown characters as byte tokens."""
    words = ["▁", "the", "quick", "fox", "▁the", "▁quick", "▁fox", "▁Größe", *"é.,!abcot"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in (*words, *(f"▁{c}" for c in "abcot"), *"GrößeTquickfox"):
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_text(prompt: str, tokens: int, *, device: str = "cpu") -> str:
    """What transformers alone writes after ``prompt`` with both, greedily, on this device."""
    tokenizer, model = tiny_tokenizer(), tiny_mixtral()
    moved: Any = model.to(device)  # pyright: ignore[reportArgumentType]
    given = tokenizer(prompt, return_tensors="pt").to(device)
    ids = moved.generate(**given, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(ids[0, given.input_ids.shape[1] :], skip_special_tokens=True))
