"""What a run tells the pool of itself, for people who look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.cluster.training.orders import Begin, Order, Own
from moesaic.cluster.training.progress import RunProgress, RunTelling
from moesaic.proto.errors import StepLost
from tests.helpers.training import whole_steps
from tests.helpers.training.crews import backward, microbatches
from tests.helpers.training.runs import optimizing, training_pool
from tests.helpers.training.whole_steps import one_step
from tests.integration.conftest import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "mixtral")


def test_what_a_second_loss_would_cost_until_all_is_copied_again(folder: Path) -> None:
    with (
        training_pool(folder, hosts=3, replicas=3) as pool,
        optimizing(pool, folder, redundancy=1) as (model, optimizer),
    ):
        run: Any = optimizer.run

        def told() -> RunProgress:
            run.lead.driver.look()
            run.lead.driver.look()  # it tells first, and follows hosts then
            assert pool.told is not None
            return pool.told

        assert told()[:4] == (1, 1, 0, None)
        owned = sum("host-2" in hosts for hosts in run.lead.steps.owners.values())
        pool.gate = lambda host, order: not isinstance(order, Own)
        pool.lose("host-2")
        assert told().unprotected == owned
        pool.gate = lambda host, order: True
        assert told().unprotected == 0
        parts = told().parts
        assert parts is not None
        assert parts.redundancy == 1
        assert parts.owned.keys() == {"host-0", "host-1"}
        owners = run.lead.steps.owners
        assert parts.owners == {
            key: tuple(owners[key.expert(expert)] for expert in range(len(each)))
            for key, each in parts.owners.items()
        }
        # Both own all there is: what they say of it is what they keep, once it has state.
        with pytest.raises(StepLost):  # the attempt has lost its host
            one_step(model, optimizer, 0)
        optimizer.zero_grad()
        one_step(model, optimizer, 0)
        for name, host in pool.alive.items():
            training: Any = host.training
            kept = training._run.owned.nbytes
            tensors, size = parts.owned[name]
            assert tensors == training.owned == len(owners)
            assert size == pytest.approx(2 * kept.master + kept.state, rel=0.01)


def test_without_redundancy_all_is_unprotected_and_an_attempt_has_its_number(folder: Path) -> None:
    def refused(host: str, order: Order) -> bool:
        return not (isinstance(order, Begin) and host == "host-1")

    with training_pool(folder, hosts=2) as pool, optimizing(pool, folder) as (model, optimizer):
        run: Any = optimizer.run
        one_step(model, optimizer, 0)
        optimizer.zero_grad()
        pool.gate = refused
        backward(model, microbatches(1))
        optimizer.step()  # the attempt that follows is lost from its beginning
        pool.gate = lambda host, order: True
        backward(model, microbatches(2))
        run.lead.driver.look()
        assert pool.told is not None
        assert pool.told[:3] == (2, 1, len(run.lead.steps.owners))


def test_how_fast_it_is(folder: Path) -> None:
    with training_pool(folder, hosts=2) as pool, optimizing(pool, folder) as (model, optimizer):
        run: Any = optimizer.run
        lead, told, now = run.lead, [], [0.0]
        lead._clock = lambda: now[0]
        lead._telling = RunTelling(lead.steps)
        lead._telling.began(now[0])
        for step in range(3):
            now[0] += 2.0 + step
            one_step(model, optimizer, step)
            told.append(lead._progress()[3:5])
        for host in pool.alive.values():
            *_, busy_s, backward_s, owner_s = host.report().work
            assert busy_s > 0
            assert backward_s > 0
            assert owner_s > 0
        tokens = sum(ids.numel() for ids in whole_steps.microbatches(0))
        assert told == [(2.0, tokens / 2), (2.5, 2 * tokens / 5), (3.0, 3 * tokens / 9)]
