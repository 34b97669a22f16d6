"""Gates without training, which give each expert one cluster of the dense FFNs' inputs.

Shape suffixes: N rows (token positions), H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.vq import ClusterError, kmeans2

from ...proto.errors import BadInput, CheckpointError

# Texts are read in windows that are long enough for context and short enough for cheap attention.
WINDOW_TOKENS = 256
# No common tokenizer makes longer tokens than this on average, so this much text is enough.
CHARS_PER_TOKEN = 12
# The median distance, in logits, between a token's first and second choice. It does not change
# which experts are chosen, only their weights: 1.0 gives a median of 0.73 and 0.27 for top-2, so
# both choices matter and neither is lost in rounding.
GATE_MARGIN = 1.0
KMEANS_ITERATIONS = 20
KMEANS_ATTEMPTS = 5
# With fewer rows per expert a centroid is not meaningful.
MIN_ROWS_PER_EXPERT = 16

Texts = Mapping[str, Sequence[str | Path]]
Progress = Callable[[str, int, int], None]


def gates_from_texts(
    model: Any,
    tokenizer: Any,
    texts: Texts,
    *,
    experts: int,
    tokens: int,
    seed: int,
    progress: Progress,
) -> list[torch.Tensor]:
    """Make a gate weight ``(E, H)`` in fp32 for each layer of ``model``, a dense llama or mistral.

    ``texts`` maps a corpus to its texts (a ``str`` is the text itself, a ``Path`` a file to read).
    At most ``tokens`` tokens of each corpus are read, and all corpora have the same weight.
    """
    windows = {
        name: list(_windows(name, items, tokenizer, tokens, model.config))
        for name, items in texts.items()
    }
    layer_rows_NH = _ffn_inputs(model, windows, progress)
    rows = len(layer_rows_NH[0])
    if rows < experts * MIN_ROWS_PER_EXPERT:
        raise BadInput(
            f"texts: {rows} tokens in {len(texts)} corpora are too few for experts={experts}; "
            f"give at least {experts * MIN_ROWS_PER_EXPERT}"
        )
    rng = np.random.default_rng(seed)
    gates = []
    for layer, x_NH in enumerate(layer_rows_NH):
        progress("gates", layer, len(layer_rows_NH))
        gate_EH = kmeans_gate(x_NH.astype(np.float32), experts, rng)
        if gate_EH is None:
            raise BadInput(
                f"texts: layer {layer} sees fewer than experts={experts} kinds of tokens; "
                "give longer or more varied texts, fewer experts, or gate='random'"
            )
        gates.append(torch.from_numpy(gate_EH))
    progress("gates", len(layer_rows_NH), len(layer_rows_NH))
    return gates


def kmeans_gate(x_NH: np.ndarray, experts: int, rng: np.random.Generator) -> np.ndarray | None:
    """Make the gate ``(E, H)`` whose largest logit is a row's cluster; None if rows are too alike.

    The rows are unit-normalised, projected to remove the direction that all of them share, and
    clustered by k-means; a gate row is a centroid's direction. Removing the shared direction (a
    gate has no bias that could do this) makes the loads of mixed traffic far more even: on the demo
    model the hottest expert takes 1.5 times the mean instead of 1.8, the coldest 0.5 instead of
    0.3. Then one factor scales all rows so that the median distance between the two largest logits
    is ``GATE_MARGIN``.
    """
    unit_NH = _unit(x_NH)
    shared_H = _unit(unit_NH.mean(axis=0))
    free_NH = unit_NH - np.outer(unit_NH @ shared_H, shared_H)
    # Rows that differ only by rounding would give clusters of noise.
    if float(free_NH.std(axis=0).max()) < 1e-4:
        return None
    centroids_EH = _centroids(free_NH, experts, rng)
    if centroids_EH is None:
        return None
    gate_EH = _unit(centroids_EH)
    logits_NE = np.partition(x_NH @ gate_EH.T, experts - 2, axis=1)
    margin = float(np.median(logits_NE[:, -1] - logits_NE[:, -2]))
    if not margin > 0:
        return None
    return (gate_EH * (GATE_MARGIN / margin)).astype(np.float32)


def _centroids(x_NH: np.ndarray, experts: int, rng: np.random.Generator) -> np.ndarray | None:
    for _ in range(KMEANS_ATTEMPTS):
        try:
            centroids_EH, _labels_N = kmeans2(
                x_NH, experts, iter=KMEANS_ITERATIONS, minit="++", missing="raise", rng=rng
            )
        except ClusterError:  # a cluster became empty; another random start may not
            continue
        return centroids_EH
    return None


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.maximum(norm, np.finfo(x.dtype).tiny)


def _windows(
    name: str, items: Sequence[str | Path], tokenizer: Any, tokens: int, config: Any
) -> Iterator[list[int]]:
    """Yield token ids of one corpus, at most ``tokens``, divided evenly among its texts."""
    window = min(WINDOW_TOKENS, config.max_position_embeddings)
    left = tokens
    for i, item in enumerate(items):
        share = -(-left // (len(items) - i))
        text = _text(name, item, share * CHARS_PER_TOKEN)
        if share < 1 or not text:
            continue
        ids = tokenizer(text, truncation=True, max_length=share)["input_ids"]
        if ids and max(ids) >= config.vocab_size:
            raise CheckpointError(
                f"vocab_size: the tokenizer gives token {max(ids)}, the model has "
                f"{config.vocab_size}; the tokenizer belongs to another model"
            )
        left -= len(ids)
        yield from (ids[at : at + window] for at in range(0, len(ids), window))


def _text(name: str, item: str | Path, chars: int) -> str:
    if isinstance(item, str):
        return item[:chars]
    try:
        with item.open(encoding="utf-8", errors="replace") as file:
            return file.read(chars)
    except OSError as exc:
        raise BadInput(f"texts.{name}: cannot read {item}: {exc.strerror}") from exc


@torch.inference_mode()
def _ffn_inputs(
    model: Any, windows: Mapping[str, list[list[int]]], progress: Progress
) -> list[np.ndarray]:
    """Return each layer's FFN inputs, ``(N, H)`` in fp16, with as many rows of each corpus.

    A window's first position is left out: it is the attention's sink, far from all other rows, and
    would get a centroid of its own.
    """
    layers = model.model.layers
    parts: list[list[torch.Tensor]] = [[] for _ in layers]
    corpus_rows: list[int] = []

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, x_1NH: torch.Tensor) -> None:
            parts[layer].append(x_1NH[0, 1:].to(torch.float16))

        return hook

    hooks = [
        layer.post_attention_layernorm.register_forward_hook(keep(i))
        for i, layer in enumerate(layers)
    ]
    done, total = 0, sum(len(ids) for corpus in windows.values() for ids in corpus)
    try:
        for name, corpus in windows.items():
            corpus_rows.append(sum(len(ids) - 1 for ids in corpus))
            if not corpus_rows[-1]:
                raise BadInput(f"texts.{name}: no text; give at least two tokens, or leave it out")
            for ids in corpus:
                progress("texts", done, total)
                model.model(input_ids=torch.tensor([ids]), use_cache=False)
                done += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    progress("texts", done, total)
    # Short corpora are repeated; in k-means a repeated row is a row with more weight.
    most, starts = max(corpus_rows), np.cumsum([0, *corpus_rows])
    pick_N = np.concatenate(
        [start + np.arange(most) % rows for start, rows in zip(starts, corpus_rows, strict=False)]
    )
    rows_NH = []
    for part in parts:
        rows_NH.append(torch.cat(part).numpy()[pick_N])
        part.clear()  # otherwise all rows would be in memory twice
    return rows_NH
