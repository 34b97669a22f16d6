"""A gate that is biased to one expert while its model trains, as the controller sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.cluster.control.control import Control
from moesaic.cluster.control.watchdog import Watchdog
from moesaic.cluster.planner.plan import PoolHost
from tests.helpers.training.runs import LocalPool, optimizing, training_pool
from tests.helpers.training.whole_steps import one_step
from tests.integration.conftest import save_model

CHOSEN = 3  # the expert that the gate is biased to
STEPS = 20


class Observer:
    """The controller's state machine, which hears the routers of a pool after each step."""

    def __init__(self, pool: LocalPool, experts_per_token: int) -> None:
        shape = pool.hosts.shape
        self.control = Control([PoolHost(name=host.name) for host in pool.hosts.hosts], term=1)
        self.control.add_model(replace(shape, experts_per_token=experts_per_token), on_disk=True)
        placed = pool.hosts.placement.layers
        self.control.training.begin(shape.model, placed, who="test", unix_s=0.0, now=0.0)
        self.watchdog = Watchdog(self.control, 0.0)
        self._pool = pool
        self._now = 0.0

    def warnings(self) -> list[str]:
        """What `status` shows."""
        self._now += 0.1
        for router in self._pool.routers:
            self.control.hear(router.take_load(), self._now)
        return self.watchdog.vitals(["up", "up"], self._now).warnings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its gates have a bias, and may choose any experts together."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, "deepseek_v3", n_group=1, topk_group=1)


@pytest.mark.parametrize("borrows", [False, True])
def test_a_biased_gate_is_told_within_20_steps_and_so_is_its_recovery(
    folder: Path, borrows: bool
) -> None:
    with (
        training_pool(folder, borrows=borrows) as pool,
        # At a higher rate the gates of so small a model collapse by themselves.
        optimizing(pool, folder, borrows=borrows, lr=1e-5) as (model, optimizer),
    ):
        layers = sorted(pool.hosts.shape.experts)
        observer = Observer(pool, model.config.num_experts_per_tok)
        gates: list[Any] = [
            module for name, module in model.named_modules() if name.endswith("mlp.gate")
        ]
        assert len(gates) == len(layers)
        numbers = iter(range(100))

        def step() -> list[str]:
            one_step(model, optimizer, next(numbers))
            return [one for one in observer.warnings() if "routing" in one]

        assert [step() for _ in range(STEPS)] == [[]] * STEPS
        with torch.no_grad():
            gates[-1].e_score_correction_bias[CHOSEN] += 100.0
        told = [step() for _ in range(STEPS)]
        (text,) = told[-1]
        assert f"collapsed in 1 of {len(layers)} layers, the worst is layer {layers[-1]}" in text
        assert f"(expert {CHOSEN})" in text
        with torch.no_grad():
            gates[-1].e_score_correction_bias[CHOSEN] -= 100.0
        assert [step() for _ in range(STEPS)][-1] == []
