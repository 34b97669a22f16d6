"""Sparse upcycling: a dense llama or mistral checkpoint becomes a Mixtral one.

The method is that of Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from
Dense Checkpoints", 2022, arXiv 2212.05055: every expert starts as a copy of the dense FFN, a
gate is added, everything else is kept. Mixtral renormalises its top-k weights, so identical experts
give the dense model's output with any gate.

Shape suffixes: E experts, H hidden size.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import MixtralConfig

from ...proto.errors import BadInput, CheckpointError
from .dense import DenseCheckpoint, open_dense
from .text_gates import Progress, Texts, gates_from_texts

GateSource = Literal["kmeans", "random"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 1 << 30
# Mixtral's names for the three matrices of a gated FFN.
FFN_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
SAME_IN_MIXTRAL = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "rope_parameters",
)


def upcycle(
    dense: str | Path,
    out: str | Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.05,
    gate: GateSource = "random",
    texts: Texts | None = None,
    tokens: int = 2048,
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the Mixtral made of ``dense`` to ``out``, a folder that transformers loads.

    ``dense``: a folder with config.json and safetensors (llama or mistral), or a GGUF file.

    ``noise``: each expert's weights get Gaussian noise of this many standard deviations of their
    matrix. So no two experts are alike, and a token that is sent to the wrong one changes the
    result. For a model of 135 M parameters 0.05 costs 2.5 to 5 % of perplexity; 0.2 breaks it.

    ``gate``: ``random`` draws rows like Mixtral's own initialisation. ``kmeans`` makes them from
    ``texts``, corpus name -> texts (a ``str`` is the text, a ``Path`` a file to read), of which at
    most ``tokens`` tokens each are read (see ``text_gates``).

    ``seed``: same inputs and seed, same files, on one machine.

    ``progress``: called with (step, done, total); the steps are load, texts, gates and write.

    ``out`` appears complete or not at all; an ``out`` with files is replaced only if ``overwrite``.
    Besides the dense model, only one shard of the new one (1 GiB) is in memory at a time.
    """
    _check_arguments(experts, top_k, noise, gate, texts, tokens, seed, dtype)
    with open_dense(Path(dense)) as checkpoint:
        out = Path(out).absolute()
        _check_out(out, checkpoint, overwrite)
        report = progress or _silent

        report("load", 0, 1)
        need_tokenizer = gate == "kmeans" or checkpoint.is_gguf
        tokenizer = checkpoint.load_tokenizer() if need_tokenizer else None
        model = checkpoint.load_model()
        report("load", 1, 1)

        config = _mixtral_config(model, experts, top_k, dtype)
        _check_room(out, model, experts, DTYPES[dtype])
        gate_seed, noise_seed = (
            int(state) for state in np.random.SeedSequence(seed).generate_state(2)
        )
        if texts is not None:
            gates = gates_from_texts(
                model,
                tokenizer,
                texts,
                experts=experts,
                tokens=tokens,
                seed=gate_seed,
                progress=report,
            )
        else:
            gates = _random_gates(config, gate_seed)

        try:
            with _published(out, overwrite) as folder:
                config.save_pretrained(folder)
                tensors = _tensors(model, gates, noise, noise_seed, report)
                _write_shards(folder, tensors, DTYPES[dtype])
                checkpoint.copy_side_files(folder, model, tokenizer)
                card = _model_card(checkpoint.path.name, experts, top_k, noise, gate, seed, dtype)
                (folder / "README.md").write_text(card, encoding="utf-8")
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"out: cannot write {out}: {exc}") from exc
        return out


def _silent(_step: str, _done: int, _total: int) -> None:
    pass


def _check_arguments(
    experts: int,
    top_k: int,
    noise: float,
    gate: str,
    texts: Texts | None,
    tokens: int,
    seed: int,
    dtype: str,
) -> None:
    if experts < 2:
        raise BadInput(f"experts: {experts}: a mixture has at least 2")
    if not 1 <= top_k <= experts:
        raise BadInput(f"top_k: {top_k}: must be from 1 to experts={experts}")
    if not (math.isfinite(noise) and noise >= 0):
        raise BadInput(f"noise: {noise}: must be 0 or a positive number, such as 0.05")
    if dtype not in DTYPES:
        raise BadInput(f"dtype: {dtype!r}: must be one of {', '.join(DTYPES)}")
    if seed < 0:
        raise BadInput(f"seed: {seed}: must be 0 or larger")
    if tokens < 2:
        raise BadInput(f"tokens: {tokens}: must be 2 or more for each corpus")
    if gate not in get_args(GateSource):
        raise BadInput(f"gate: {gate!r}: must be one of {', '.join(get_args(GateSource))}")
    if gate == "kmeans" and not texts:
        raise BadInput("texts: gate='kmeans' needs texts, as {corpus name: [texts or paths]}")
    for name, items in (texts or {}).items():
        if isinstance(items, str | Path):
            raise BadInput(f"texts.{name}: {str(items)[:40]!r}: must be a list of texts or paths")
    if gate == "random" and texts:
        raise BadInput("texts: gate='random' reads no texts; leave them out or say gate='kmeans'")


def _check_out(out: Path, checkpoint: DenseCheckpoint, overwrite: bool) -> None:
    source = checkpoint.path.resolve()
    if source.is_relative_to(out.resolve()):
        raise BadInput(f"out: {out} holds the dense checkpoint {source}; name another folder")
    if out.exists() and not out.is_dir():
        raise BadInput(f"out: {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise BadInput(f"out: {out} is not empty; name another folder or pass overwrite=True")


def _check_room(out: Path, model: Any, experts: int, dtype: torch.dtype) -> None:
    ffn = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    total = sum(p.numel() for p in model.parameters())
    needed = (total + ffn * (experts - 1)) * dtype.itemsize
    place = next(parent for parent in out.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise BadInput(
            f"out: {out} needs {needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free; "
            "choose another disk, fewer experts or dtype='bfloat16'"
        )


def _mixtral_config(model: Any, experts: int, top_k: int, dtype: str) -> MixtralConfig:
    same = {name: getattr(model.config, name) for name in SAME_IN_MIXTRAL}
    config = MixtralConfig(
        **same,
        sliding_window=getattr(model.config, "sliding_window", None),
        # The loaded tensors count: a checkpoint may say "tied" and still have another lm_head.
        tie_word_embeddings=_is_tied(model),
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.dtype = DTYPES[dtype]
    return config


def _is_tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def _random_gates(config: MixtralConfig, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.num_local_experts, config.hidden_size)
    return [
        torch.randn(shape, generator=generator) * config.initializer_range
        for _ in range(config.num_hidden_layers)
    ]


def _tensors(
    model: Any, gates: list[torch.Tensor], noise: float, seed: int, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Mixtral's tensors in order, under the names that its save_pretrained writes."""
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    yield "model.embed_tokens.weight", model.model.embed_tokens.weight
    for i, (layer, gate_EH) in enumerate(zip(layers, gates, strict=True)):
        progress("write", i, len(layers))
        for name, tensor in layer.state_dict().items():
            if not name.startswith("mlp."):
                yield f"model.layers.{i}.{name}", tensor
        moe = f"model.layers.{i}.block_sparse_moe"
        yield f"{moe}.gate.weight", gate_EH
        for mixtral_name, dense_name in FFN_NAMES.items():
            weight = layer.mlp.get_submodule(dense_name).weight.detach().float()
            scale = noise * float(weight.std())
            for expert in range(len(gate_EH)):
                name = f"{moe}.experts.{expert}.{mixtral_name}.weight"
                yield name, weight + scale * torch.randn(weight.shape, generator=generator)
    yield "model.norm.weight", model.model.norm.weight
    if not _is_tied(model):
        yield "lm_head.weight", model.lm_head.weight
    progress("write", len(layers), len(layers))


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """Write safetensors of about ``SHARD_BYTES`` each, named and indexed as by transformers."""
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        path = folder / f"shard-{len(shards)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        # safetensors makes its files readable only for their owner, and ignores the umask.
        shutil.copymode(folder / "config.json", path)
        shards.append((path, list(shard)))
        shard.clear()

    for name, tensor in tensors:
        # copy=True: safetensors refuses tensors that share memory.
        shard[name] = tensor.detach().to(dtype, copy=True).contiguous()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
            size = 0
    if shard:
        flush()

    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, (path, names) in enumerate(shards, start=1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def _published(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a sibling folder to write to, which becomes ``out`` in one step if nothing is raised."""
    tag = uuid.uuid4().hex[:8]
    partial, old = (out.parent / f".{out.name}.{tag}.{kind}" for kind in ("partial", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if overwrite and out.exists():
            out.rename(old)
        # This fails, as it should, if another process has filled the folder in the meantime.
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _model_card(
    name: str, experts: int, top_k: int, noise: float, gate: str, seed: int, dtype: str
) -> str:
    return (
        f"# {name}, upcycled\n\n"
        f"A Mixtral made by Moesaic from the dense model `{name}`; the weights were changed.\n"
        "Sparse upcycling, arXiv 2212.05055: each expert is a copy of the dense FFN plus noise.\n\n"
        f"| experts | top_k | noise | gate | seed | dtype |\n|---|---|---|---|---|---|\n"
        f"| {experts} | {top_k} | {noise} | {gate} | {seed} | {dtype} |\n"
    )
