"""From a host's kill (-9) to the next committed step, and Ray Train's restart from a checkpoint.

    python -m benchmarks.resilience.training_kills [--json PATH] [--rounds N] [--ray-train PYTHON]

The pool is a cluster on Ray with three hosts of one thread each, two replicas of each expert and
two owners of everything; its trunk is in this process. Ray Train (`ray_train.py`) runs the same
steps of the same model, whole in each of its workers, on a Ray of its own, with a checkpoint after
every step. Both take turns. A turn begins when everything is as protected as before the last kill;
it makes some steps, and then kills a host, or a worker, some way into the next one. A kill's time
ends with the next step that is committed.

Ray Train needs pandas and pyarrow, which Moesaic does without. `--ray-train` names the Python of an
environment that has them:

    python -m venv .venv-ray-train
    .venv-ray-train/bin/pip install -c constraints.txt torch transformers accelerate 'ray[train]'
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

import moesaic
from benchmarks.measure import write_json
from benchmarks.training_load import (
    LEARNING_RATE,
    MAX_NORM,
    TrainingLoad,
    add_options,
    backward,
    load_of,
)
from moesaic.handle import Cluster
from moesaic.proto.errors import ExpertUnavailable

ROOT = Path(__file__).parents[2]
BEYOND_TARGET_S = 2.0
RAY_TRAIN_TARGET = 0.2
# When the kill comes, as parts of a step's time; rounds take turns.
PARTS = (0.2, 0.5, 0.8)
# Until a pool is as protected as before, and until Ray Train has answered or ended.
WHOLE_S, ANSWER_S, END_S = 300.0, 600.0, 30.0

# step_s and kill_to_step_s; of the pool also what the latter consists of, if an attempt was lost.
Found = dict[str, float]


class Trainee:
    """A model that is trained in the pool, step after step, whatever is lost."""

    def __init__(
        self, cluster: Cluster, model: Any, optimizer: moesaic.PoolOptimizer, load: TrainingLoad
    ) -> None:
        self._cluster, self._model = cluster, model
        self._optimizer, self._load = optimizer, load
        self._lost: list[tuple[float, float]] = []  # attempts: when that was known, and made good

    def step(self) -> float:
        """Make a step; return its seconds, with attempts that were lost."""
        began, run = time.monotonic(), self._optimizer.run
        while True:
            try:
                _, targets = backward(self._model, self._load.step(run.step))
                self._optimizer.step(weight=targets)
                return time.monotonic() - began
            except (moesaic.StepLost, ExpertUnavailable):
                known = time.monotonic()
                self._optimizer.zero_grad()
                self._lost.append((known, time.monotonic()))

    def round(self, number: int, part: float, steps: int) -> Found:
        """Make some steps, and kill a host when ``part`` of the next one's time has passed."""
        step_s = statistics.median(self.step() for _ in range(steps))
        processes = sorted(self._cluster.status().processes.items())
        name, pid = [(name, one.pid) for name, one in processes][number % len(processes)]
        killed: list[float] = []

        def kill() -> None:
            os.kill(pid, signal.SIGKILL)
            killed.append(time.monotonic())

        self._lost.clear()
        timer = threading.Timer(part * step_s, kill)
        timer.start()
        committed = 0.0
        while not killed or committed < killed[0]:  # a kill that comes late hits the next step
            self.step()
            committed = time.monotonic()
        timer.join()
        found = {"step_s": step_s, "kill_to_step_s": committed - killed[0]}
        if self._lost:
            known, begun = self._lost[0]
            found |= {"kill_to_lost_s": known - killed[0], "lost_to_attempt_s": begun - known}
        found["lost_attempts"] = len(self._lost)
        self._recover(name, pid)
        return found

    def _recover(self, name: str, gone: int) -> None:
        """Make steps until a killed host is back, and everything has two replicas and owners."""
        deadline = time.monotonic() + WHOLE_S
        while not self._is_whole(name, gone):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the pool is not whole {WHOLE_S:g} s after {name} was killed")
            self.step()

    def _is_whole(self, name: str, gone: int) -> bool:
        status = self._cluster.status()
        training, process = status.training, status.processes.get(name)
        if training is None:
            raise RuntimeError("the training run is gone")
        lacking = (
            status.unprotected_experts,
            status.missing_experts,
            status.balancing.pending_moves,
            training.unprotected_tensors,
        )
        up = all(host.state == "up" for host in status.hosts)
        return up and process is not None and process.pid != gone and not any(lacking)


@contextmanager
def trainee(load: TrainingLoad, folder: Path, lending: str) -> Iterator[Trainee]:
    model = {"name": "m", "path": str(folder), "dtype": "float32", "replicas": 2, "train": True}
    spec = {
        "name": f"kills-{os.getpid()}",
        "models": [model],
        "hosts": [{"count": 3, "threads": 1, "device": "cpu"}],
        "network": {"lending": lending},
        "endpoint": None,
        "balance": {"auto": False, "redundancy": 1},
    }
    with moesaic.up(spec) as cluster:
        trunk = cluster.from_pretrained("m", train=True)
        with moesaic.PoolOptimizer(
            trunk, cluster, lr=LEARNING_RATE, max_grad_norm=MAX_NORM
        ) as optimizer:
            yield Trainee(cluster, trunk, optimizer, load)


# ---- Ray Train ----------------------------------------------------------------------------------


def why_not(python: str) -> str | None:
    """Return why Ray Train cannot run in an environment, in a line; None: it can."""
    command = [python, "-c", "import pandas, pyarrow, transformers, ray.train.torch"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return (found.stderr.splitlines() or ["?"])[-1] if found.returncode else None


class RayTrain:
    """The same loop under Ray Train, in a process that makes a round when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def round(self, part: float) -> Found:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{part}\n")
        process.stdin.flush()
        timer = threading.Timer(ANSWER_S, process.kill)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):  # Ray prints, too
                    return json.loads(line)
        finally:
            timer.cancel()
        raise RuntimeError(f"Ray Train's process has ended with {process.wait(END_S)}")


@contextmanager
def ray_train(
    python: str, load: TrainingLoad, folder: Path, workers: int, steps: int
) -> Iterator[RayTrain]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        setting = {
            "folder": str(folder),
            "scratch": scratch,
            "load": asdict(load),
            "workers": workers,
            "steps": steps,
        }
        # Not this process's Ray, nor its token.
        environment = {name: one for name, one in os.environ.items() if "RAY_" not in name}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(
            [python, "-m", "benchmarks.resilience.ray_train", json.dumps(setting)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield RayTrain(process)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, and what it has started."""
    started = []
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(END_S)
    _, left = psutil.wait_procs(started, timeout=END_S)
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=END_S)


# ---- figures ------------------------------------------------------------------------------------


def measure(given: argparse.Namespace, folder: Path, *, with_ray_train: bool) -> dict[str, Any]:
    load = load_of(given)
    pool: list[Found] = []
    peer: list[Found] = []
    with ExitStack() as stack:
        training = stack.enter_context(trainee(load, folder, given.lending))
        restarting = None
        if with_ray_train:
            restarting = stack.enter_context(
                ray_train(given.ray_train, load, folder, given.train_workers, given.steps)
            )
        training.step()  # the optimizer's state is made
        for number, part in zip(range(given.rounds), itertools.cycle(PARTS)):
            pool.append(training.round(number, part, given.steps))
            _print_round(number, "pool", pool[-1])
            if restarting is not None:
                peer.append(restarting.round(part))
                _print_round(number, "Ray Train", peer[-1])
    return {"pool": pool, "ray_train": peer or None}


def _print_round(number: int, who: str, found: Found) -> None:
    took = f"{found['kill_to_step_s']:.2f} s after a kill, a step takes {found['step_s']:.2f} s"
    if "kill_to_lost_s" in found:
        took += f"; lost after {found['kill_to_lost_s']:.2f} s"
        took += f", begun again {found['lost_to_attempt_s']:.2f} s later"
    print(f"round {number + 1}, {who}: {took}", flush=True)


def summary(pool: Sequence[Found], peer: Sequence[Found] | None) -> dict[str, Any]:
    """Medians; ratios are those within a round."""
    beyond = [one["kill_to_step_s"] - one["step_s"] for one in pool]
    ratio = None
    if peer:
        pairs = zip(pool, peer, strict=True)
        ratio = statistics.median(
            one["kill_to_step_s"] / other["kill_to_step_s"] for one, other in pairs
        )
    return {
        "beyond_a_step_s": statistics.median(beyond),
        "longest_beyond_a_step_s": max(beyond),
        "beyond_target_s": BEYOND_TARGET_S,
        "of_ray_train": ratio,
        "ray_train_target": RAY_TRAIN_TARGET,
        "met": statistics.median(beyond) <= BEYOND_TARGET_S
        and (ratio is None or ratio <= RAY_TRAIN_TARGET),
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title="From a kill (-9) to the next committed step")
    for column in ("", "a step", "median", "longest", "beyond a step", "longest"):
        table.add_column(column, justify="right" if column else "left")
    for name, title in (("pool", "pool, a host"), ("ray_train", "Ray Train, a worker")):
        rounds = found[name]
        if rounds is None:
            continue
        step_s, kill_s = ([one[key] for one in rounds] for key in ("step_s", "kill_to_step_s"))
        beyond = [whole - step for whole, step in zip(kill_s, step_s, strict=True)]
        figures = (
            *(statistics.median(step_s), statistics.median(kill_s), max(kill_s)),
            *(statistics.median(beyond), max(beyond)),
        )
        table.add_row(title, *(f"{one:.2f} s" for one in figures))
    table.caption = f"target beyond a step: {BEYOND_TARGET_S:g} s"
    Console().print(table)
    if found["of_ray_train"] is not None:
        print(
            f"pool / Ray Train: {found['of_ray_train']:.3f} (median of {len(found['pool'])} "
            f"rounds; target {RAY_TRAIN_TARGET:g})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="of a round, before its kill")
    parser.add_argument("--lending", default="never")
    parser.add_argument("--ray-train", default=sys.executable, help="a Python that has ray[train]")
    parser.add_argument("--train-workers", type=int, default=1, help="of Ray Train")
    add_options(parser, TrainingLoad(microbatches=2))
    given = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    missing = why_not(given.ray_train)
    if missing is not None:
        print(f"Ray Train is left out: {missing}; name a Python that has ray[train]: --ray-train")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_of(given).save(folder)
        found = measure(given, folder, with_ray_train=missing is None)
    found |= summary(found["pool"], found["ray_train"])
    show(found)
    write_json(
        given.json,
        {"title": "training kills", "setting": vars(given), "left_out": missing, **found},
    )


if __name__ == "__main__":
    main()
