"""Loads of the demo model whose traffic shifts between domains, recorded from its routers.

    python -m benchmarks.planning.recorded [--json PATH] [--trace PATH]

Five domains of text (Python code, C++ headers, a manual, licences, readmes) that no gate was made
of, one after the other, twice, with other texts the second time. A forward pass counts what the
routers choose. At each shift all ways see the domain's first windows; they are rated on those, and
on the later ones, which nobody has seen. `--trace` writes what `moesaic simulate` replays.

The model has 8 experts a layer. Two pools: 5 hosts with 2 slots for each layer (1.25 slots an
expert), where a hot expert has more than one host's fair part, and then two or three of the ten
slots are needed for it; and 4 hosts with 5 slots (2.5 slots an expert), as a pool has that keeps
every expert through the loss of a host (`redundancy: 1`). `bound` says how far slots suffice at
all.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.planning.placing import (
    BUDGET,
    LAVISH,
    MODEL,
    THRIFTY,
    Pool,
    Shift,
    bound,
    deepseek,
    ours,
    rated,
    static,
)
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.trace import Trace
from moesaic.models.upcycling.demo import demo_model, demo_texts
from moesaic.traces import write_trace

ROW_TOKENS = 256  # a window has rows of several texts
ROWS = 2
CHARS = 8192  # of each text
VISITS, WINDOWS, SEEN = 2, 4, 2  # windows of each visit to a domain; how many of them are seen
POOLS = ((5, 2, 0), (4, 5, 1))  # (hosts, slots of each layer on each, redundancy)
Row = dict[str, Any]


def record(folder: Path, texts: Mapping[str, Sequence[str | Path]]) -> tuple[Trace, list[str]]:
    """The trace of all visits, and the domain of each. CPU, about a minute."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {name: _rows(tokenizer, found) for name, found in texts.items()}
    # Of the ways to compute experts in process the plain one is the fastest on a CPU by far.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    counts: list[np.ndarray] = []  # (L, E) of each window
    visits = [name for _ in range(VISITS) for name in rows]
    with torch.inference_mode(), _Counter(model) as counter:
        for name in track(visits, "recording", console=Console(stderr=True)):
            for _ in range(WINDOWS):
                window = list(itertools.islice(rows[name], ROWS))
                if len(window) < ROWS:
                    raise ValueError(f"texts: {name} has too few for {VISITS} visits")
                model.model(input_ids=torch.tensor(window), use_cache=False)
                counts.append(counter.take())
    count_WLE = np.stack(counts)
    no_hosts = np.zeros((len(counts), 0))
    trace = Trace(
        window_s=1.0,
        counts={LayerKey(MODEL, layer): count_WLE[:, layer] for layer in range(count_WLE.shape[1])},
        hosts=(),
        assignments_WH=no_hosts.astype(np.int64),
        busy_s_WH=no_hosts,
        queued_s_WH=no_hosts,
    )
    return trace, visits


class _Counter:
    """Counts what the gates of a Mixtral choose."""

    def __init__(self, model: Any) -> None:
        self._gates = [layer.mlp.gate for layer in model.model.layers]
        self._count_LE = np.zeros(
            (len(self._gates), model.config.num_local_experts), dtype=np.int64
        )
        self._hooks: list[Any] = []

    def __enter__(self) -> _Counter:
        for layer, gate in enumerate(self._gates):
            self._hooks.append(gate.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int) -> Any:
        def count(_module: Any, _args: Any, found: Any) -> None:
            ids_TK = found[2]
            experts = self._count_LE.shape[1]
            self._count_LE[layer] += np.bincount(ids_TK.reshape(-1).numpy(), minlength=experts)

        return count

    def take(self) -> np.ndarray:
        count_LE, self._count_LE = self._count_LE, np.zeros_like(self._count_LE)
        return count_LE


def _rows(tokenizer: Any, texts: Sequence[str | Path]) -> Iterator[list[int]]:
    """Whole rows of tokens, the first of every text, then the second of every text, and so on."""
    cut = []
    for text in texts:
        words = text if isinstance(text, str) else text.read_text("utf-8", errors="replace")
        ids = tokenizer(words[:CHARS])["input_ids"]
        cut.append([ids[at : at + ROW_TOKENS] for at in range(0, len(ids), ROW_TOKENS)])
    for nth in itertools.zip_longest(*cut):
        yield from (row for row in nth if row is not None and len(row) == ROW_TOKENS)


def shifts_of(trace: Trace, windows: int, seen: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(L, E) loads of each visit's first windows and of the others."""
    count_WLE = np.stack([trace.counts[key] for key in sorted(trace.counts)], axis=1)
    count_VWLE = count_WLE.reshape(-1, windows, *count_WLE.shape[1:]).astype(float)
    return list(count_VWLE[:, :seen].sum(axis=1)), list(count_VWLE[:, seen:].sum(axis=1))


def compare(
    pool: Pool, redundancy: int, seen: list[np.ndarray], later: list[np.ndarray]
) -> list[Row]:
    thrifty, lavish = (replace(policy, redundancy=redundancy) for policy in (THRIFTY, LAVISH))
    ways: dict[str, list[Shift]] = {
        "nothing moves": static(pool, seen, split=False),
        "DeepSeek's rule": deepseek(pool, seen),
        "ours, 5 % at most": ours(pool, seen, thrifty, BUDGET),
        "ours, any number": ours(pool, seen, lavish),
    }
    rows = []
    for way, found in ways.items():
        unseen = rated(pool, found, later[1:])
        rated_seen = rated(pool, found, seen[1:])
        rows.append({
            "strategy": way, **rated_seen,
            "later_mean": unseen["mean"], "later_worst": unseen["worst"],
            "shifts": [rated(pool, [s], [load]) for s, load in zip(found, seen[1:], strict=True)],
        })  # fmt: skip
    limit, later_limit = bound(pool, seen[1:]), bound(pool, later[1:])
    return [
        *rows,
        {
            "strategy": "bound", **limit,
            "later_mean": later_limit["mean"], "later_worst": later_limit["worst"],
            "shifts": [bound(pool, [load]) for load in seen[1:]],
        },
    ]  # fmt: skip


def show(title: str, rows: list[Row], visits: list[str], console: Console) -> None:
    columns = ("strategy", "mean", "worst layer", "moved per shift", "later: mean", "worst layer")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            row["strategy"],
            f"{row['mean']:.3f}",
            f"{row['worst']:.3f}",
            f"{row['moved']:.2%}" if "moved" in row else "",
            f"{row['later_mean']:.3f}",
            f"{row['later_worst']:.3f}",
        )
    console.print(table)
    each = Table("shift to", *(row["strategy"] for row in rows), title="mean / worst layer / moved")
    for number, name in enumerate(visits[1:]):
        cells = [row["shifts"][number] for row in rows]
        each.add_row(name, *(
            f"{cell['mean']:.3f} / {cell['worst']:.3f}"
            + (f" / {cell['moved']:.0%}" if "moved" in cell else "")
            for cell in cells
        ))  # fmt: skip
    console.print(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path)
    arguments = parser.parse_args()
    trace, visits = record(demo_model(), demo_texts(held_out=True))
    if arguments.trace:
        write_trace(arguments.trace, trace)
    first = next(iter(trace.counts.values()))
    results: dict[str, list[Row]] = {}
    for hosts, slots, redundancy in POOLS:
        pool = Pool(layers=len(trace.counts), experts=first.shape[1], slots=slots, hosts=hosts)
        title = f"{hosts} hosts with {slots} slots a layer, redundancy {redundancy}"
        results[title] = compare(pool, redundancy, *shifts_of(trace, WINDOWS, SEEN))
        show(title, results[title], visits, Console(width=130))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        whole = {"title": "recorded loads", "visits": visits, "results": results}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
