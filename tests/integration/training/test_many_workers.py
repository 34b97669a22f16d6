"""A step by several workers is the step of one: whatever each has, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.proto.errors import BadInput
from tests.helpers.training.crews import MAX_NORM, backward, microbatches, one_step, plain_losses
from tests.helpers.training.runs import LocalPool, Team, optimizing, training_pool
from tests.helpers.training.trunks import plain_model
from tests.helpers.training.whole_steps import assert_same_model
from tests.integration.conftest import save_model

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


def plain_run(folder: Path) -> tuple[Any, list[float]]:
    plain = plain_model(folder, torch.float64)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return plain, plain_losses(plain, adam, STEPS)


def together(
    pool: LocalPool, folder: Path, names: Sequence[str], act: Callable[[Any, RunOptimizer], Any]
) -> list[Any]:
    """Let workers act, each in a thread; the run ends when all have."""
    team = Team(len(names))

    def work(name: str) -> Any:
        with optimizing(pool, folder, team=team, name=name, max_grad_norm=MAX_NORM, exact=True) as (
            model,
            optimizer,
        ):
            return act(model, optimizer)

    with ThreadPoolExecutor(len(names)) as threads:
        return list(threads.map(work, names))


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_any_number_of_workers_makes_the_same_steps(folder: Path, workers: int) -> None:
    plain, expected = plain_run(folder)

    def act(model: Any, optimizer: RunOptimizer) -> tuple[Any, list[float], list[float | None]]:
        found = [one_step(model, optimizer) for _ in range(STEPS)]
        return model, found, [optimizer.grad_norm]

    with training_pool(folder, hosts=2) as pool:
        done = together(pool, folder, [f"worker-{n}" for n in range(workers)], act)
        for model, found, norms in done:
            assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-12
            assert norms == done[0][2]
            assert_same_model(pool, model, plain, 1e-12)


def test_a_worker_that_leaves_costs_its_step_and_another_one_takes_its_place(folder: Path) -> None:
    plain, expected = plain_run(folder)

    def stays(model: Any, optimizer: RunOptimizer) -> list[float]:
        return [one_step(model, optimizer) for _ in range(STEPS - optimizer.run.step)]

    def leaves(model: Any, optimizer: RunOptimizer) -> list[float]:
        found = [one_step(model, optimizer)]
        backward(model, microbatches(1)[:1])
        return found

    with training_pool(folder, hosts=2) as pool, ThreadPoolExecutor(3) as threads:
        team = Team(2)

        def work(name: str, act: Callable[[Any, RunOptimizer], list[float]]) -> Any:
            with optimizing(pool, folder, team=team, name=name, max_grad_norm=MAX_NORM) as given:
                return given[0], act(*given)

        one = threads.submit(work, "one", stays)
        gone = threads.submit(work, "another", leaves)
        assert abs(gone.result()[1][0] - expected[0]) < 1e-12
        later = threads.submit(work, "a third", stays)
        for done, first in ((one, 0), (later, 1)):
            model, found = done.result()
            assert torch.tensor(found).sub(torch.tensor(expected[first:])).abs().max() < 1e-12
            assert_same_model(pool, model, plain, 1e-12)


def test_workers_that_disagree_are_told_so(folder: Path) -> None:
    def act(model: Any, optimizer: RunOptimizer) -> str:
        run: Any = optimizer.run
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + run.number)
        with pytest.raises(BadInput, match="the workers disagree about the step") as error:
            one_step(model, optimizer)
        return str(error.value)

    with training_pool(folder, hosts=2) as pool:
        first, second = together(pool, folder, ["a", "b"], act)
        assert first == second


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_one_workers_norm_is_refused_when_it_is_asked_for(
    folder: Path, alike: bool, foreach: bool | None
) -> None:
    """Also where all have the same microbatch, and so the same norm: not that of the step."""

    def act(model: Any, optimizer: RunOptimizer) -> float | None:
        run: Any = optimizer.run
        _, count = backward(model, [microbatches(0)[0 if alike else run.number]])
        with pytest.raises(BadInput, match=r"2 workers .* PoolOptimizer\(max_grad_norm=...\)"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=foreach)
        optimizer.step(weight=count)  # nothing was multiplied by anything
        return optimizer.grad_norm

    with training_pool(folder, hosts=2) as pool:
        first, second = together(pool, folder, ["a", "b"], act)
        assert first == second


def test_a_worker_that_is_alone_clips_as_it_likes(folder: Path) -> None:
    def act(model: Any, optimizer: RunOptimizer) -> None:
        backward(model, microbatches(0)[:1])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(min(float(norm), MAX_NORM), rel=1e-4)

    with training_pool(folder, hosts=2) as pool:
        together(pool, folder, ["a"], act)
