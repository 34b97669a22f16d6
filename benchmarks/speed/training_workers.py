"""Two processes that compute a training step together, against one, on the same cores.

    python -m benchmarks.speed.training_workers [--json PATH] [--rounds N] [--lending never always]

Each crew of workers has a cluster on Ray of its own, with two hosts of one thread each. Its workers
are processes that share the machine's cores out evenly, and begin every step together. Both crews
make the same steps from the same microbatches, in turns; their losses are compared. Seconds are
those from the moment at which all workers are told to begin until all have committed the step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
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

TARGET = 1.05
# Sums in another order, over all steps.
LOSS_TOLERANCE = 1e-3
END_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Worker processes that wait for the next step."""

    workers: list[subprocess.Popen[str]]

    def step(self) -> tuple[float, float]:
        """Make a step; return its seconds and its loss."""
        began = time.perf_counter()
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write("step\n")
            worker.stdin.flush()
        (loss,) = {_told(worker)["loss"] for worker in self.workers}
        return time.perf_counter() - began, loss


def _told(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):  # Ray prints, too
            return json.loads(line)
    raise RuntimeError(f"worker {worker.pid} has ended ({worker.wait(END_S)})")


@contextmanager
def crew(load: TrainingLoad, folder: Path, lending: str, count: int) -> Iterator[Crew]:
    spec = {
        "name": f"crew-of-{count}-{lending}-{os.getpid()}",
        "models": [{"name": "m", "path": str(folder), "dtype": "float32", "train": True}],
        "hosts": [{"count": 2, "threads": 1, "device": "cpu"}],
        "network": {"lending": lending},
        "endpoint": None,
    }
    with moesaic.up(spec) as cluster, ExitStack() as stack:
        command = [sys.executable, "-m", __spec__.name, "--worker", cluster.name]
        workers = []
        for rank in range(count):
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count)}
            worker = subprocess.Popen(
                [*command, json.dumps(asdict(load))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            stack.callback(_end, worker)
            workers.append(worker)
        for worker in workers:
            _told(worker)
        try:
            yield Crew(workers=workers)
        finally:
            for worker in workers:  # all before `_end` waits for the first
                assert worker.stdin is not None
                worker.stdin.close()


def _end(worker: subprocess.Popen[str]) -> None:
    try:
        worker.wait(END_S)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait(END_S)


def work(name: str, load: TrainingLoad) -> None:
    """Be a worker: make a step for each line, until there are no more."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    cluster = moesaic.connect(name)
    model = cluster.from_pretrained("m", train=True)
    with moesaic.PoolOptimizer(
        model, cluster, lr=LEARNING_RATE, max_grad_norm=MAX_NORM
    ) as optimizer:
        run = optimizer.run
        print(json.dumps({"workers": run.workers}), flush=True)
        for _ in sys.stdin:
            own = load.step(run.step)[run.number :: run.workers]
            losses, targets = backward(model, own)
            loss, of_all = run.total("loss", (losses, targets))
            optimizer.step(weight=targets)
            print(json.dumps({"loss": loss / of_all}), flush=True)


def measure(load: TrainingLoad, folder: Path, lending: str, rounds: int) -> Comparison:
    seconds: dict[str, list[float]] = {"1 worker": [], "2 workers": []}
    with (
        crew(load, folder, lending, 1) as alone,
        crew(load, folder, lending, 2) as together,
    ):
        for number in range(rounds + 1):
            (alone_s, wanted), (together_s, found) = alone.step(), together.step()
            if not math.isclose(wanted, found, rel_tol=LOSS_TOLERANCE):
                raise RuntimeError(f"not the same step: losses {wanted} and {found}")
            if number:  # the first one makes the optimizer's state
                seconds["1 worker"].append(alone_s)
                seconds["2 workers"].append(together_s)
    pairs = zip(seconds["2 workers"], seconds["1 worker"], strict=True)
    return Comparison(
        case=f"lending: {lending}",
        ours="2 workers",
        base="1 worker",
        seconds={name: statistics.median(found) for name, found in seconds.items()},
        ratio=statistics.median(two / one for two, one in pairs),
        target=TARGET,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lending", nargs="+", default=["never", "always"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    add_options(parser, TrainingLoad(sequences=2))
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if given.worker is not None:
        name, load = given.worker
        work(name, TrainingLoad(**json.loads(load)))
        return
    load = load_of(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load.save(folder)
        found = [measure(load, folder, lending, given.rounds) for lending in given.lending]
    report(f"A training step of {load.tokens:,} tokens, two workers and one", found, given.json)


if __name__ == "__main__":
    main()
