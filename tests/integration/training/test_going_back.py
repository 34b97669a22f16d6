"""State that is lost with its hosts takes a run back to a checkpoint, and its workers with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.lead import coordinator as coordinator_module
from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.training.orders import Commit, Disown, Order
from moesaic.proto.errors import BadInput, StateLost, StepLost
from tests.helpers.training.crews import MAX_NORM, WAIT_S, Crew, crew, plain_losses
from tests.helpers.training.crews import one_step as crew_step
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.trunks import plain_model, saved
from tests.helpers.training.whole_steps import assert_same_model, one_step, plain_run

STEPS, SAVED = 5, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that waits for nothing is told so after some seconds, and not after an hour."""
    monkeypatch.setattr(coordinator_module, "MEET_S", 20.0)


@pytest.fixture(scope="module")
def of_crew(folder: Path) -> tuple[Any, list[float]]:
    plain = plain_model(folder, torch.float64)
    adam = torch.optim.AdamW(plain.parameters(), fused=True, lr=1e-2, weight_decay=0.1)
    return plain, plain_losses(plain, adam, STEPS)


def test_a_run_whose_state_is_lost_goes_on_from_its_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    plain, expected = plain_run(folder, STEPS)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        for step in range(SAVED + 1):
            one_step(model, optimizer, step)
            if step + 1 == SAVED:
                optimizer.save(tmp_path / "saved")
        pool.lose("host-1")
        with pytest.raises((StepLost, StateLost)):  # the run itself may have noticed it before
            one_step(model, optimizer, SAVED + 1)
        for _ in range(2):  # it is said as often as it is asked
            with pytest.raises(StateLost, match="go back to a checkpoint"):
                optimizer.zero_grad()
        with pytest.raises(StateLost):
            one_step(model, optimizer, SAVED + 1)
        optimizer.load(tmp_path / "saved")
        assert optimizer.run.step == SAVED
        found = [one_step(model, optimizer, step) for step in range(SAVED, STEPS)]
        assert torch.tensor(found).sub(torch.tensor(expected[SAVED:])).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)
    assert all(host.report().owned == 0 for host in pool.alive.values())


def test_nothing_is_left_of_a_step_that_only_some_hosts_have_applied(
    folder: Path, tmp_path: Path
) -> None:
    """Those would serve it by the number that the checkpoint's weights were given."""
    plain, expected = plain_run(folder, STEPS)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        for step in range(SAVED):
            one_step(model, optimizer, step)
        optimizer.save(tmp_path / "saved")
        pool.gate = lambda host, order: host != "host-2" or not isinstance(order, Commit)
        with pytest.raises(StateLost, match="host-2: host-2 does not answer"):
            one_step(model, optimizer, SAVED)
        pool.gate = lambda host, order: True
        optimizer.load(tmp_path / "saved")
        found = [one_step(model, optimizer, step) for step in range(SAVED, STEPS)]
        assert torch.tensor(found).sub(torch.tensor(expected[SAVED:])).abs().max() < 1e-12
        assert_same_model(pool, model, plain, 1e-12)


@pytest.mark.parametrize("published", [True, False])
def test_a_successor_without_the_state_begins_and_takes_a_checkpoint(
    folder: Path, tmp_path: Path, published: bool
) -> None:
    """The process and a host are gone at once, perhaps with a step that only some have applied."""
    plain, expected = plain_run(folder, STEPS)
    with (
        training_pool(folder, hosts=3, replicas=2) as pool,
        optimizing(pool, folder) as (model, optimizer),
    ):
        for step in range(SAVED):
            one_step(model, optimizer, step)
        optimizer.save(tmp_path / "saved")
        if not published:
            left = [2]

            def gate(host: str, order: Order) -> bool:
                left[0] -= isinstance(order, Commit)
                return left[0] >= 0

            pool.gate = gate
            with pytest.raises(StateLost, match="did not commit"):
                one_step(model, optimizer, SAVED)
            pool.gate = lambda host, order: True
        pool.lose("host-0")
        with optimizing(pool, folder, run=2, since=1) as (later, heir):
            assert heir.run.is_broken
            with pytest.raises(StateLost):
                heir.zero_grad()
            heir.load(tmp_path / "saved")
            assert not heir.run.is_broken
            assert heir.run.step == SAVED
            found = [one_step(later, heir, step) for step in range(SAVED, STEPS)]
            assert torch.tensor(found).sub(torch.tensor(expected[SAVED:])).abs().max() < 1e-12
            assert_same_model(pool, later, plain, 1e-12)


# ---- several workers ----------------------------------------------------------------------------


def goes_back(folder: Path) -> Any:
    def act(model: Any, optimizer: RunOptimizer) -> list[float]:
        found: dict[int, float] = {}
        while (step := optimizer.run.step) < STEPS:
            try:
                found[step] = crew_step(model, optimizer)
            except StateLost:
                optimizer.load(folder)
        return [found[step] for step in sorted(found)]

    return act


@pytest.fixture
def begun(folder: Path, tmp_path: Path) -> Iterator[tuple[Crew, Path]]:
    """Two workers, with a checkpoint after two steps, and one step more."""
    target = tmp_path / "saved"
    with crew(folder, hosts=3) as team:
        team.begin("a", "b", max_grad_norm=MAX_NORM)
        for _ in range(SAVED):
            team.each(crew_step)
        team.do("a", lambda _, optimizer: optimizer.save(target)).result(WAIT_S)
        team.each(crew_step)
        yield team, target


def test_all_workers_go_back_together(
    begun: tuple[Crew, Path], of_crew: tuple[Any, list[float]]
) -> None:
    team, target = begun
    plain, expected = of_crew
    team.pool.lose("host-1")
    for losses in team.each(goes_back(target)):
        got = torch.tensor(losses) - torch.tensor(expected[-len(losses) :])
        assert len(losses) == STEPS - SAVED
        assert got.abs().max() < 1e-12
    assert_same_model(team.pool, team.models["a"], plain, 1e-12)
    assert_same_model(team.pool, team.models["b"], plain, 1e-12)


def test_a_worker_that_is_gone_meanwhile_has_a_successor(
    begun: tuple[Crew, Path], of_crew: tuple[Any, list[float]]
) -> None:
    team, target = begun
    plain, _ = of_crew
    team.pool.lose("host-1")
    a = team.do("a", goes_back(target))
    team.optimizers.pop("b").close()
    joined = team.join("c", max_grad_norm=MAX_NORM)
    joined.result(WAIT_S)
    c = team.do("c", goes_back(target))
    errors = [one.exception(WAIT_S) for one in (c, a)]
    assert errors == [None, None]
    assert_same_model(team.pool, team.models["a"], plain, 1e-12)
    assert_same_model(team.pool, team.models["c"], plain, 1e-12)


def test_a_worker_enters_a_broken_run(
    begun: tuple[Crew, Path], of_crew: tuple[Any, list[float]]
) -> None:
    """All others are gone; it brings the checkpoint itself."""
    team, target = begun
    plain, _ = of_crew
    team.pool.lose("host-1")
    team.do("a", lambda _, optimizer: optimizer.close())

    def notices(_: Any, optimizer: RunOptimizer) -> None:
        with pytest.raises(StepLost):
            optimizer.step()
        optimizer.zero_grad()

    b = team.do("b", notices)
    joined = team.join("c", max_grad_norm=MAX_NORM)
    assert isinstance(b.exception(WAIT_S), StateLost)
    joined.result(WAIT_S)
    assert team.optimizers["c"].run.is_broken
    b = team.do("b", goes_back(target))
    c = team.do("c", goes_back(target))
    b.result(WAIT_S)
    c.result(WAIT_S)
    assert_same_model(team.pool, team.models["c"], plain, 1e-12)


def test_a_checkpoint_is_taken_over_anew_if_a_host_is_lost_meanwhile(
    begun: tuple[Crew, Path], of_crew: tuple[Any, list[float]]
) -> None:
    team, target = begun
    plain, _ = of_crew
    orders: list[Order] = []

    def gate(host: str, order: Order) -> bool:
        # The first time that hosts forget what they own, another one is lost.
        if isinstance(order, Disown) and len(order.keys) > 1 and not orders:
            orders.append(order)
            return False
        return True

    team.pool.lose("host-1")
    team.pool.gate = gate

    def act(model: Any, optimizer: RunOptimizer) -> None:
        while optimizer.run.step < STEPS or optimizer.run.is_broken:
            try:
                crew_step(model, optimizer)
            except StateLost:
                try:
                    optimizer.load(target)
                except BadInput:
                    raise
                except Exception as error:
                    failed.append(error)

    failed: list[Exception] = []
    team.each(act)
    assert orders
    assert failed, "the first try has failed"
    assert_same_model(team.pool, team.models["a"], plain, 1e-12)
