"""Train the demo model on three domains of text, and draw what it has learned.

python examples/train/domains/run.py

Needs the cluster of deploy/training.yaml, and matplotlib. A run that was stopped goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib import rcParams
from matplotlib.figure import Figure
from measure import measure
from texts import DOMAINS, write_texts

import moesaic

HERE = Path(__file__).parent


def main() -> None:
    spec_path = HERE / "train.yaml"
    spec: dict[str, Any] = yaml.safe_load(spec_path.read_text())
    texts, run = Path(spec["data"]["path"]), Path(spec["checkpoints"]["folder"])
    kept = texts.parent / "held-out.json"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(write_texts(texts)))
    held_out: dict[str, str] = json.loads(kept.read_text())

    folder = moesaic.connect(spec["cluster"]).status().models[0].path
    assert folder is not None, "the demo model is in a folder, and training leaves that as it is"
    resume = ["--resume"] if (run / "run.json").exists() else []
    command = [sys.executable, "-m", "moesaic.cli.main", "train", str(spec_path), *resume]
    subprocess.run(command, check=True)

    torch.set_num_threads(spec["workers"]["threads"])
    before = measure(folder, held_out)
    after = measure(run / "checkpoints" / f"step-{spec['steps']}", held_out)
    records = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    results = {
        "perplexity": {d: [before[d].perplexity, after[d].perplexity] for d in DOMAINS},
        "shares_before": {d: before[d].shares for d in DOMAINS},
        "shares_after": {d: after[d].shares for d in DOMAINS},
        "losses": {r["step"]: r["loss"] for r in records if "loss" in r},
        "held_out_losses": {r["step"]: r["held_out_loss"] for r in records if "held_out_loss" in r},
    }
    (HERE / "results.json").write_text(json.dumps(results) + "\n")
    draw_losses(results, HERE / "losses.svg")
    draw_experts(results, HERE / "experts.svg")
    for domain, (first, last) in results["perplexity"].items():
        print(f"{domain}: held-out perplexity {first:.2f} before, {last:.2f} after")


def draw_losses(results: dict[str, Any], path: Path) -> None:
    figure = _figure(7.6, 3.6)
    axes = figure.subplots()
    for values, words in (
        (results["losses"], "of a step"),
        (results["held_out_losses"], "held out"),
    ):
        axes.plot([int(step) for step in values], list(values.values()), label=words)
    axes.set(xlabel="steps of 2,048 tokens", ylabel="loss (nats)", title="The demo model learns")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def draw_experts(results: dict[str, Any], path: Path) -> None:
    """Each row is a layer, and each column an expert: how often the gates choose it."""
    figure = _figure(7.6, 6.4)
    grid = figure.subplots(2, len(DOMAINS), sharex=True, sharey=True)
    for row, when in zip(grid, ("before", "after"), strict=True):
        for axes, domain in zip(row, DOMAINS, strict=True):
            shares = torch.tensor(results[f"shares_{when}"][domain])
            image = axes.imshow(
                shares * shares.shape[1], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2
            )
            axes.set_title(f"{domain}, {when}")
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    figure.colorbar(image, ax=grid, label="tokens, 1 is an even share")
    figure.savefig(path, metadata={"Date": None})


def _figure(width: float, height: float) -> Figure:
    rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "moesaic", "figure.facecolor": "white"}
    )
    return Figure(figsize=(width, height), layout="constrained")


if __name__ == "__main__":
    main()
