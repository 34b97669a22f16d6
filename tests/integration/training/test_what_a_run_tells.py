"""What a run tells the pool of itself, for people who look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesaic.cluster.training.orders import Begin, Order, Own
from moesaic.cluster.training.runs import RunProgress
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
        optimizing(pool, folder, redundancy=1) as (_, optimizer),
    ):
        run: Any = optimizer.run

        def told() -> RunProgress:
            run.lead.driver.look()
            run.lead.driver.look()  # it tells first, and follows hosts then
            assert pool.told is not None
            return pool.told

        assert told() == RunProgress(attempt=1, workers=1, unprotected=0)
        owned = sum("host-2" in hosts for hosts in run.lead.steps.owners.values())
        pool.gate = lambda host, order: not isinstance(order, Own)
        pool.lose("host-2")
        assert told().unprotected == owned
        pool.gate = lambda host, order: True
        assert told().unprotected == 0


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
        assert pool.told == RunProgress(2, 1, len(run.lead.steps.owners))
