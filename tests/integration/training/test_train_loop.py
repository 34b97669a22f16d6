"""The loop of `moesaic train` makes the steps of the plain model, whoever computes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.command.run_folder import RunFolder
from moesaic.actors.training.lead import coordinator as coordinator_module
from moesaic.cluster.train_command.records import ReturnRecord, StepRecord
from moesaic.proto.errors import CheckpointError
from tests.helpers.training.runs import training_pool
from tests.helpers.training.train_runs import (
    Plain,
    Runner,
    assert_same_moments,
    plain_run,
    train_spec,
    write_tokens,
)
from tests.helpers.training.trunks import saved
from tests.helpers.training.whole_steps import assert_same_model

SEQUENCES = 24  # with 4 or 5 held out, an epoch has little more than 3 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that waits for nothing is told so after some seconds, and not after an hour."""
    monkeypatch.setattr(coordinator_module, "MEET_S", 20.0)
    yield
    assert torch.get_default_dtype() == torch.float32, "models were built in several threads"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    write_tokens(folder.tokens, SEQUENCES)
    return folder


def assert_same(runner: Runner, expected: Plain, tolerance: float = 1e-10) -> list[StepRecord]:
    """All steps and evaluations were recorded, and are the plain model's; so are the moments."""
    plain, _, losses, held_out = expected
    steps, evaluations = runner.told()
    assert [one.step for one in steps] == list(range(1, len(losses) + 1))
    got = torch.tensor([(one.loss, one.grad_norm) for one in steps], dtype=torch.float64)
    assert (got - torch.tensor(losses, dtype=torch.float64)).abs().max() < tolerance
    seen = torch.tensor([one.held_out_loss for one in evaluations], dtype=torch.float64)
    assert (seen - torch.tensor(held_out, dtype=torch.float64)).abs().max() < tolerance
    assert_same_model(runner.pool, runner.models[-1], plain, tolerance)
    assert_same_moments(runner.run, expected, 10 * tolerance)
    return steps


# The auxiliary loss of transformers is computed in float32.
@pytest.mark.parametrize(("balance_loss", "tolerance"), [(None, 1e-10), (0.05, 2e-6)])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_steps_are_those_of_the_plain_model(
    folder: Path, run: RunFolder, workers: int, balance_loss: float | None, tolerance: float
) -> None:
    """With four workers one has no microbatch."""
    spec = train_spec(balance_loss=balance_loss)
    expected = plain_run(folder, spec, run)
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)
        runner.train(workers)
        steps = assert_same(runner, expected, tolerance)
    assert all(one.workers == workers and one.attempts == 1 for one in steps)
    assert all((one.balance_loss is None) == (balance_loss is None) for one in steps)
    assert steps[-1].max_over_mean is None or steps[-1].max_over_mean >= 1
    # The last checkpoints are there, and the run is over.
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["step-00000006", "step-00000008"]
    assert all(host.report().owned == 0 for host in pool.hosts.hosts)


def test_a_run_is_resumed_in_another_epoch_with_other_workers_and_hosts(
    folder: Path, run: RunFolder
) -> None:
    spec = train_spec()
    expected = plain_run(folder, spec, run)
    with training_pool(folder, hosts=1) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            step = optimizer.step

            def stepping(*given: Any, **named: Any) -> Any:
                found = step(*given, **named)
                if optimizer.run.step == 5:  # in the second epoch
                    runner.stop.set()
                return found

            optimizer.step = stepping

        runner.train(2, begun=begun)
        steps, _ = runner.told()
        assert steps[-1].step == 5
    with training_pool(folder, hosts=3, replicas=2) as pool:
        resumed = Runner(pool, folder, spec, run)
        resumed.train(3)
        assert_same(resumed, expected)


def test_a_run_goes_back_to_its_checkpoint_by_itself(folder: Path, run: RunFolder) -> None:
    spec = train_spec()
    expected = plain_run(folder, spec, run)
    with training_pool(folder, hosts=3, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            step, lost = optimizer.step, []

            def stepping(*given: Any, **named: Any) -> Any:
                if optimizer.run.step == 5 and not lost:
                    lost.append(True)
                    pool.lose("host-1")
                return step(*given, **named)

            optimizer.step = stepping

        runner.train(1, begun=begun)
        steps = assert_same(runner, expected)
    assert steps[4].attempts > 1
    assert [one.step for one in run.records()[0] if isinstance(one, StepRecord)] == [
        *range(1, 6),
        *range(5, 9),
    ]
    (back,) = [one for one in run.records()[0] if isinstance(one, ReturnRecord)]
    assert back.step == 4
    assert "gone back to its checkpoint after step 4: hosts were lost (host-1" in back.words


def test_a_run_whose_state_is_lost_before_its_first_checkpoint_ends(
    folder: Path, run: RunFolder
) -> None:
    spec = train_spec()
    with training_pool(folder, hosts=2, replicas=2) as pool:
        runner = Runner(pool, folder, spec, run)

        def begun(optimizer: Any, loop: Any) -> None:
            pool.lose("host-1")
            run.newest = lambda: None  # type: ignore[method-assign]

        with pytest.raises(CheckpointError, match="No checkpoint was written yet"):
            runner.train(1, begun=begun)
