"""Upcycling a tiny dense model: what the MoE model computes, and what its folder holds.

Shape suffixes: B batch, S sequence, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    MixtralForCausalLM,
)

from moesaic.models.upcycling.gguf_parts import join_parts
from moesaic.models.upcycling.text_gates import GATE_MARGIN, kmeans_gate
from moesaic.models.upcycling.upcycle import upcycle
from tests.helpers.models.dense import (
    DIGITS,
    EOS,
    LETTERS,
    SIZES,
    TEMPLATE,
    TOKENS,
    files_of,
    load,
    loads,
    logits,
    make_dense,
    make_gguf,
    make_tokenizer,
)

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
