"""Workers of `moesaic train` are replaced when they are gone or frozen, and not after the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.exceptions import RayActorError

from moesaic.actors.training.command import crew as crew_module
from moesaic.actors.training.command.crew import FROZEN_S, MOST_LOSSES, WorkerCrew
from moesaic.actors.training.command.worker import RayTrainWorker, Work
from moesaic.cluster.placement import ModelRef
from moesaic.cluster.train_command.train_spec import TrainSpec
from moesaic.proto.errors import ClusterError, NoRun


class FakeWorker:
    """An actor; what its methods return are its futures, by their names."""

    def __init__(self, number: int, again: bool) -> None:
        self.number, self.again = number, again
        self.told: list[str] = []
        self.run, self.pid, self.stop = (self._method(one) for one in ("run", "pid", "stop"))

    def _method(self, name: str) -> Any:
        def remote() -> tuple[FakeWorker, str]:
            self.told.append(name)
            return self, name

        return MagicMock(remote=remote)


class FakeRay:
    """Actors that end, are gone, or are frozen as a test says."""

    def __init__(self) -> None:
        self.workers: list[FakeWorker] = []
        self.ended: list[FakeWorker] = []
        self.gone: list[FakeWorker] = []
        self.frozen: list[FakeWorker] = []

    def remote(self, _: type) -> Any:
        return self

    def options(self, **_: Any) -> Any:
        def remote(_: Work, number: int, *, again: bool) -> FakeWorker:
            self.workers.append(FakeWorker(number, again))
            return self.workers[-1]

        return MagicMock(remote=remote)

    def wait(self, futures: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        done = [
            (worker, name)
            for worker, name in futures
            if worker in (self.ended + self.gone if name == "run" else self.workers)
            and not (name == "pid" and worker in self.frozen)
        ]
        return done[:1], [one for one in futures if one not in done[:1]]

    def get(self, future: tuple[FakeWorker, str]) -> None:
        if future[0] in self.gone:
            raise RayActorError

    def kill(self, worker: FakeWorker) -> None:
        self.gone.append(worker)


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    monkeypatch.setattr(crew_module, "ray", ray)
    monkeypatch.setattr(crew_module, "ray_get", lambda *_: None)
    monkeypatch.setattr(crew_module, "stored_deployment", lambda _: None)
    return ray


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def crew(fake: FakeRay, said: list[str]) -> WorkerCrew:
    spec = TrainSpec.model_validate({"data": {"path": "x"}, "workers": {"count": 2}})
    ref = ModelRef(name="m", dtype="float32")
    work = Work(namespace="n", model=ref, spec=spec, folder=Path("unused"))
    return WorkerCrew(work, told=said.append)


def test_another_worker_comes_in_the_place_of_one_that_is_gone(
    fake: FakeRay, crew: WorkerCrew, said: list[str]
) -> None:
    assert [(one.number, one.again) for one in fake.workers] == [(0, False), (1, False)]
    fake.gone.append(fake.workers[1])
    assert not crew.look(3, 0.0)
    assert [(one.number, one.again) for one in fake.workers[2:]] == [(1, True)]
    assert len(said) == 1
    assert said[0].startswith("worker 1 is gone (")
    fake.ended += [fake.workers[0], fake.workers[2]]
    assert not crew.look(9, 0.0)
    assert crew.look(9, 0.0)


def test_workers_that_are_lost_without_a_step_end_the_run(fake: FakeRay, crew: WorkerCrew) -> None:
    for _ in range(MOST_LOSSES):
        fake.gone.append(fake.workers[-1])
        crew.look(3, 0.0)
    fake.gone.append(fake.workers[-1])
    crew.look(4, 0.0)  # a step was made: the count begins anew
    for _ in range(MOST_LOSSES - 1):
        fake.gone.append(fake.workers[-1])
        crew.look(4, 0.0)
    fake.gone.append(fake.workers[-1])
    with pytest.raises(ClusterError, match="6 workers were lost after step 4"):
        crew.look(4, 0.0)


def test_nobody_takes_the_place_of_a_worker_when_the_run_is_over(
    fake: FakeRay, crew: WorkerCrew
) -> None:
    """One has ended, and so the run has; the other one dies while it closes its trunk."""
    fake.ended.append(fake.workers[0])
    assert not crew.look(9, 0.0)
    fake.gone.append(fake.workers[1])
    assert crew.look(9, 0.0)
    assert len(fake.workers) == 2


def test_a_worker_that_comes_after_ctrl_c_is_told_to_stop(fake: FakeRay, crew: WorkerCrew) -> None:
    crew.stop()
    fake.gone.append(fake.workers[0])
    crew.look(3, 0.0)
    assert all("stop" in one.told for one in fake.workers)
    assert len(fake.workers) == 3


def test_a_frozen_worker_counts_as_gone_after_a_while(
    fake: FakeRay, crew: WorkerCrew, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(crew_module, "time", clock)
    crew.look(3, 0.0)
    fake.frozen.append(fake.workers[0])
    for _ in range(10):
        clock.now += FROZEN_S / 10 - 0.01
        crew.look(3, 0.0)
    assert not said
    clock.now += 1.0
    crew.look(3, 0.0)
    crew.look(3, 0.0)
    assert said[0].startswith("worker 0 has not answered")
    assert (fake.workers[-1].number, fake.workers[-1].again) == (0, True)
    fake.frozen.clear()
    clock.now += 2 * FROZEN_S
    crew.look(3, 0.0)
    clock.now += FROZEN_S
    crew.look(3, 0.0)
    assert len(fake.workers) == 3


@pytest.mark.parametrize("again", [False, True])
def test_a_run_is_begun_anew_only_if_none_lives(again: bool) -> None:
    """An actor that is being restarted is no reason: its run lives."""
    asked: list[bool] = []
    errors: list[ClusterError] = []

    class Worker(RayTrainWorker):
        def __init__(self) -> None:
            self._again = again

        def _opened(self, trunk: Any, *, succeed: bool) -> Any:
            asked.append(succeed)
            if errors:
                raise errors.pop()
            return "opened"

    found: Any = Worker()._optimizer(MagicMock())
    assert (found, asked) == ("opened", [again])
    if again:
        errors.append(NoRun("none lives"))
        Worker()._optimizer(MagicMock())
        assert asked[1:] == [True, False]
        errors.append(ClusterError("run-11: the actor is restarting"))
        with pytest.raises(ClusterError, match="restarting"):
            Worker()._optimizer(MagicMock())
        assert asked[3:] == [True]
