"""A training checkpoint every 20 steps against none: seconds over 60 steps.

    python -m benchmarks.speed.training_checkpoints [--json PATH] [--rounds N] [--steps N]

Both ways train the same model on the same cluster on Ray, in turns of so many steps; it has two
hosts of one thread each, and the trunk is in this process. Checkpoints are written as `moesaic
train` writes them: one begins after every 20th step with `optimizer.save(wait=False)`, and only the
newest two are kept. A turn ends when its last checkpoint is on the disk. What a turn has left in
the page cache is written out before the next one begins.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import Comparison, report
from benchmarks.training_load import (
    LEARNING_RATE,
    MAX_NORM,
    TrainingLoad,
    add_options,
    backward,
    load_of,
)
from moesaic.actors.training.training_run import Saving
from moesaic.models.export.training_checkpoint import keep_last

TARGET = 1.03
KEPT = 2
SAVED_S = 600.0


class Trainee:
    """A model that is trained in the pool, with or without checkpoints."""

    def __init__(
        self, model: torch.nn.Module, optimizer: moesaic.PoolOptimizer, load: TrainingLoad
    ) -> None:
        self._model, self._optimizer, self._load = model, optimizer, load
        self.written = 0  # checkpoints

    def train(self, steps: int, *, every: int | None = None, folder: Path) -> float:
        """Return the seconds of some steps, with a checkpoint before every so many of them."""
        began, saving = time.perf_counter(), None
        for number in range(steps):
            if every is not None and number % every == 0:
                self._finish(saving, folder)
                target = folder / f"step-{self._optimizer.run.step:08d}"
                saving = self._optimizer.save(target, wait=False)
            self.step()
        self._finish(saving, folder)
        return time.perf_counter() - began

    def step(self) -> None:
        _, targets = backward(self._model, self._load.step(self._optimizer.run.step))
        self._optimizer.step(weight=targets)

    def _finish(self, saving: Saving | None, folder: Path) -> None:
        if saving is not None:
            saving.result(timeout=SAVED_S)
            keep_last(folder, KEPT)
            self.written += 1


@contextmanager
def trainee(load: TrainingLoad, folder: Path, lending: str) -> Iterator[Trainee]:
    spec = {
        "name": f"checkpoints-{lending}-{os.getpid()}",
        "models": [{"name": "m", "path": str(folder), "dtype": "float32", "train": True}],
        "hosts": [{"count": 2, "threads": 1, "device": "cpu"}],
        "network": {"lending": lending},
        "endpoint": None,
    }
    with moesaic.up(spec) as cluster:
        model = cluster.from_pretrained("m", train=True)
        with moesaic.PoolOptimizer(
            model, cluster, lr=LEARNING_RATE, max_grad_norm=MAX_NORM
        ) as optimizer:
            yield Trainee(model, optimizer, load)


def measure(given: argparse.Namespace, lending: str, scratch: Path) -> Comparison:
    load, checkpoints = load_of(given), scratch / f"checkpoints-{lending}"
    checkpoints.mkdir()
    none, saved = "no checkpoint", f"every {given.every} steps"
    seconds: dict[str, list[float]] = {none: [], saved: []}
    with trainee(load, scratch / "model", lending) as training:
        # The optimizer's state is made in the first step, and buffers in the first checkpoint.
        training.train(2, every=1, folder=checkpoints)
        for _ in range(given.rounds):
            for way, every in ((none, None), (saved, given.every)):
                os.sync()
                seconds[way].append(training.train(given.steps, every=every, folder=checkpoints))
        written = training.written
    newest = max(checkpoints.iterdir())
    nbytes = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    print(f"lending: {lending}: {written} checkpoints of {nbytes / 1e6:,.0f} MB were written")
    pairs = zip(seconds[saved], seconds[none], strict=True)
    return Comparison(
        case=f"lending: {lending}",
        ours=saved,
        base=none,
        seconds={way: statistics.median(found) for way, found in seconds.items()},
        ratio=statistics.median(with_s / without_s for with_s, without_s in pairs),
        target=TARGET,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of one turn")
    parser.add_argument("--every", type=int, default=20, help="steps from checkpoint to checkpoint")
    parser.add_argument("--lending", nargs="+", default=["never"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    add_options(parser, TrainingLoad(microbatches=2))
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        scratch = Path(name)
        load_of(given).save(scratch / "model")
        found = [measure(given, lending, scratch) for lending in given.lending]
    title = f"{given.steps} training steps of {load_of(given).tokens:,} tokens"
    report(title, found, given.json)


if __name__ == "__main__":
    main()
