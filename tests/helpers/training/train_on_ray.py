"""Runs of `moesaic train` over a cluster on Ray, and what happens to them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch

import moesaic
from moesaic.actors.runtime.ray_border import namespace_of
from moesaic.actors.training.command.command import Watcher
from moesaic.actors.training.command.crew import WorkerCrew
from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.cluster.reports.training import TrainReport
from moesaic.cluster.train_command.records import Record, StepRecord, history
from moesaic.cluster.train_command.train_spec import TrainSpec
from moesaic.handle import Cluster
from tests.helpers.processes.live import processes_of

Deeds = Mapping[int, Callable[["Run"], Any]]
WORDS = "the quick brown fox jumps over the lazy dog and runs away from every cat"


def write_texts(folder: Path, files: int, words: int) -> Path:
    """Write texts of different lengths."""
    for number in range(files):
        chance = random.Random(number)
        size = words * (number + 1)
        text = " ".join(chance.choice(WORDS.split()) for _ in range(size))
        (folder / f"{number}.txt").write_text(text)
    return folder


def spec_of(pool: Cluster, texts: Path, folder: Path, **changes: Any) -> TrainSpec:
    values: dict[str, Any] = {
        "cluster": pool.name,
        "steps": 12,
        "data": {"path": str(texts), "sequence_length": 16, "held_out": 0.1},
        "batch": {"sequences": 4, "microbatch": 1},
        "workers": {"count": 2, "num_cpus": 0},
        "optimizer": {
            "settings": {"lr": 1e-3, "weight_decay": 0.1},
            "redundancy": 1,
            "exact": True,
        },
        "evaluation": {"every_steps": 4, "sequences": 4},
        "checkpoints": {"folder": str(folder), "every_steps": 3},
        "balance_loss": 0.01,
    }
    return TrainSpec.model_validate(values | changes)


class Run:
    """A run that things happen to, each when a step was recorded."""

    def __init__(self, pool: Cluster, spec: TrainSpec, deeds: Deeds | None = None) -> None:
        self.pool, self.spec = pool, spec
        self.crew: WorkerCrew | None = None  # None: nothing has started
        self.first_pids: dict[int, int] = {}
        self.said: list[str] = []
        self.stop = threading.Event()
        self._deeds = dict(deeds or {})
        self._failed: list[BaseException] = []
        self._acting: list[threading.Thread] = []

    def train(self, *, resume: bool = False) -> TrainReport:
        watcher = Watcher(said=self.said.append, recorded=self._recorded, began=self._began)
        report = moesaic.train(self.spec, resume=resume, stop=self.stop, watcher=watcher)
        for one in self._acting:
            one.join(60)
        if self._failed:
            raise self._failed[0]
        return report

    def pid_of_worker(self, number: int) -> int:
        assert self.crew is not None
        return self.crew.pids()[number]

    def _began(self, crew: WorkerCrew) -> None:
        self.crew, self.first_pids = crew, crew.pids()

    def _recorded(self, record: Record) -> None:
        if isinstance(record, StepRecord) and (deed := self._deeds.pop(record.step, None)):
            self._acting.append(threading.Thread(target=self._act, args=(deed,)))
            self._acting[-1].start()

    def _act(self, deed: Callable[[Run], Any]) -> None:
        try:
            deed(self)
        except BaseException as error:
            self._failed.append(error)

    @property
    def losses(self) -> dict[int, tuple[float, float]]:
        """By step: the loss, and the norm of all gradients."""
        steps, _ = history(RunFolder(Path(self.spec.checkpoints.folder)).records()[0])
        return {one.step: (one.loss, one.grad_norm or 0.0) for one in steps}


def kill_worker(number: int) -> Callable[[Run], None]:
    return lambda run: os.kill(run.pid_of_worker(number), signal.SIGKILL)


def kill_host(name: str) -> Callable[[Run], None]:
    return lambda run: os.kill(processes_of(run.pool)[name].pid, signal.SIGKILL)


def kill_run(run: Run) -> None:
    known: Any = ray.util.list_named_actors(all_namespaces=True)
    own = namespace_of(run.pool.name)
    (name,) = [one["name"] for one in known if one["namespace"] == own and "run-" in one["name"]]
    actor: Any = ray.get_actor(name, namespace=own)
    os.kill(ray.get(actor.pid.remote(), timeout=30.0), signal.SIGKILL)


def nothing_trains(pool: Cluster) -> bool:
    return pool.status().training is None


def fork(run: Run, step: int, target: Path) -> Path:
    """Make a folder of a run that has come to a step of another one, whose checkpoint it has."""
    source = RunFolder(Path(run.spec.checkpoints.folder))
    made = RunFolder(target)
    made.checkpoints.mkdir(parents=True)
    for file in (source.tokens, source.path / "run.json"):
        shutil.copy(file, target)
    shutil.copytree(source.checkpoint(step), made.checkpoint(step))
    for record in source.records()[0]:
        if record.step < step or (record.step == step and isinstance(record, StepRecord)):
            made.add(record)
    return target


def assert_same(run: Run, expected: Run, tolerance: float = 2e-5) -> None:
    assert list(run.losses) == list(range(1, run.spec.steps + 1))
    got, wanted = (torch.tensor(list(one.losses.values())) for one in (run, expected))
    assert (got - wanted).abs().max() < tolerance
