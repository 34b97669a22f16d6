"""With ``exact`` the result has the same bits, whoever computes what: float32, to the last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.actors.training.optimizer import RunOptimizer
from moesaic.cluster.training.orders import Commit, Order
from tests.helpers.training.crews import WAIT_S, backward, crew, until
from tests.helpers.training.disturbed import HASTY, Disturbed
from tests.helpers.training.outcomes import (
    F32,
    MAX_NORM,
    Outcome,
    microbatches,
    outcome,
    outcome_of,
    whole_step,
)
from tests.helpers.training.runs import LocalPool
from tests.integration.conftest import save_model

UNEVEN: dict[str, Callable[[int, int], list[int]]] = {
    "most for one": lambda number, workers: [[4], [0, 1, 2, 3]][number],
    "in another order": lambda number, workers: [[3, 1], [4, 0, 2]][number],
}
EVERYTHING: dict[str, Any] = {
    "workers": 3,
    "hosts": 3,
    "replicas": 2,
    "borrows": True,
    "training": {"redundancy": 1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "two workers": {"workers": 2},
    "workers without microbatches": {"workers": 7},
    **{name: {"workers": 2, "deal": deal} for name, deal in UNEVEN.items()},
    "three hosts": {"hosts": 3},
    "two replicas": {"hosts": 2, "replicas": 2},
    "three replicas": {"hosts": 3, "replicas": 3},
    "lent": {"hosts": 2, "borrows": True},
    "redundancy": {"hosts": 2, "training": {"redundancy": 1}},
    "all at once": EVERYTHING,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts of a token are on several hosts, so that it shows how these are added up."""
    return save_model(tmp_path_factory.mktemp("model"), "mixtral", num_experts_per_tok=4)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    """By one worker with one host, and nothing lent."""
    return outcome_of(folder, hosts=1)


@pytest.mark.parametrize("how", OTHERS.values(), ids=OTHERS.keys())
def test_who_computes_what_does_not_change_a_bit(
    folder: Path, alone: Outcome, how: dict[str, Any]
) -> None:
    assert outcome_of(folder, **how).differences(alone) == []


@pytest.mark.parametrize("architecture", ["gpt_oss", "bfloat16"])
def test_biases_and_half_precision(tmp_path: Path, architecture: str) -> None:
    name = "mixtral" if architecture == "bfloat16" else architecture
    dtype = torch.bfloat16 if architecture == "bfloat16" else F32
    folder = save_model(tmp_path, name)
    alone = outcome_of(folder, hosts=1, dtype=dtype)
    assert outcome_of(folder, dtype=dtype, **EVERYTHING).differences(alone) == []


def test_a_host_that_is_lost_within_a_step_does_not_change_a_bit(
    folder: Path, alone: Outcome
) -> None:
    def lose(pool: LocalPool, step: int) -> None:
        if step == 1:
            pool.lose("host-1")

    how: dict[str, Any] = {"hosts": 3, "replicas": 2, "training": {"redundancy": 1}}
    assert outcome_of(folder, workers=2, within=lose, **how).differences(alone) == []


def test_attempts_that_are_lost_do_not_change_a_bit(folder: Path, alone: Outcome) -> None:
    """Each begins with other replicas."""
    lost = []

    def lose(pool: LocalPool, step: int) -> None:
        def gate(host: str, order: Order) -> bool:
            if not isinstance(order, Commit) and len(lost) < 3 * step:
                lost.append(order)
                return False
            return True

        pool.gate = gate

    how: dict[str, Any] = {"hosts": 3, "replicas": 3, "workers": 2}
    assert outcome_of(folder, within=lose, **how).differences(alone) == []
    assert len(lost) == 9


def test_answers_that_are_lost_or_damaged_do_not_change_a_bit(
    folder: Path, alone: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturbed = Disturbed(seed=1)
    how: dict[str, Any] = {"hosts": 2, "replicas": 2, "training": {"policy": HASTY}}
    with disturbed.backward(monkeypatch):
        found = outcome_of(folder, **how)
    assert disturbed.counts["lost"] and disturbed.counts["damaged"]
    assert found.differences(alone) == []


def test_workers_that_come_and_go_do_not_change_a_bit(folder: Path, alone: Outcome) -> None:
    """One step alone, one while another comes, one by both, and one that the other leaves."""
    options: dict[str, Any] = {"dtype": F32, "exact": True, "max_grad_norm": MAX_NORM}
    workers = []

    def whole(model: Any, optimizer: RunOptimizer) -> tuple[float, float]:
        workers.append(optimizer.run.workers)
        return whole_step(model, optimizer)

    def leave(model: Any, optimizer: RunOptimizer) -> None:
        backward(model, microbatches(3)[1::2])
        optimizer.close()

    with crew(folder, least=1, dtype=F32) as team:
        team.begin("a", **options)
        found = [team.do("a", whole).result(WAIT_S)]
        comes = team.join("b", **options)
        until(lambda: team.lead._workers._known.get("b") is not None)
        until(lambda: team.lead._workers._known["b"].waits)
        found.append(team.do("a", whole).result(WAIT_S))
        comes.result(WAIT_S)
        first, second = team.each(whole)
        assert first == second
        found.append(first)
        goes = team.do("b", leave)
        found.append(team.do("a", whole).result(WAIT_S))
        goes.result(WAIT_S)
        made = outcome(team.pool, team.team, team.models["a"], found)
    assert workers == [1, 1, 2, 2, 2]
    assert made.differences(alone) == []
