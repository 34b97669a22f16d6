"""Defects of `moesaic train`, each as a test that fails until it is mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.actors.training.lead import coordinator as coordinator_module
from moesaic.cluster.train_command.records import HeldOutRecord, StepRecord
from moesaic.proto.errors import MoesaicError
from tests.helpers.training.runs import Team, training_pool
from tests.helpers.training.train_runs import Runner, train_spec, write_tokens
from tests.helpers.training.trunks import saved

SEQUENCES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(coordinator_module, "MEET_S", 20.0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    write_tokens(folder.tokens, SEQUENCES)
    return folder


class Killed(BaseException):
    """A worker is gone, as with kill -9: nothing of it goes on."""


def killed_after(step: int) -> Callable[[Any, Any], None]:
    """Return what kills a worker right after the commit of a step, before it says anything."""

    def begun(optimizer: Any, _: Any) -> None:
        made = optimizer.step

        def stepping(*given: Any, **named: Any) -> Any:
            found = made(*given, **named)
            if optimizer.run.step == step:
                # Its hosts hear nothing more of it.
                optimizer.run.close = lambda: None
                raise Killed
            return found

        optimizer.step = stepping

    return begun


def steps_of(run: RunFolder) -> list[int]:
    return [one.step for one in run.records()[0] if isinstance(one, StepRecord)]


def test_no_record_is_lost_with_the_only_worker(folder: Path, run: RunFolder) -> None:
    """It is killed after a commit, and before it has written the step's record."""
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(Killed):
            runner.work(None, "worker-0", begun=killed_after(5))
        runner.work(None, "worker-0", run=2, since=1)
    assert steps_of(run) == list(range(1, 9))


def test_a_run_that_is_over_is_resumed_without_another_record(
    folder: Path, run: RunFolder
) -> None:
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    before = run.records()[0]
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    assert run.records()[0] == before


def test_an_evaluation_is_recorded_once(folder: Path, run: RunFolder) -> None:
    """A run that goes on from a checkpoint, after whose step it was evaluated already."""
    spec = train_spec(evaluation={"every_steps": 2, "sequences": 4})
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        with pytest.raises(Killed):
            runner.work(None, "worker-0", begun=killed_after(5))
    with training_pool(folder, hosts=2, replicas=2) as pool:
        Runner(pool, folder, spec, run).train(1)
    held_out = [one.step for one in run.records()[0] if isinstance(one, HeldOutRecord)]
    assert held_out == [0, 2, 4, 6, 8]
