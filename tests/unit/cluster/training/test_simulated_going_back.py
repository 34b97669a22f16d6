"""Runs whose state is lost under random faults go back to a checkpoint, from seeds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.helpers.cluster.planted_bugs import ATTEMPTS, STEPS, Bug
from tests.helpers.cluster.steps_world import TrainingWorld
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Faults
from tests.helpers.effort import tries
from tests.helpers.training.simulated_going_back import train_and_go_back

SEEDS = tries(200)
WORLDS: dict[str, dict[str, Any]] = {
    "no redundancy": {
        "hosts": 4,
        "redundancy": 0,
        "faults": Faults(lost=0.002, restarted=0.002, frozen=0.002, interrupted=0.003),
    },
    "losses at will": {"hosts": 4, "redundancy": 1, "faults": Faults(interrupted=0.003)},
    "changes are seen late": {
        "hosts": 5,
        "redundancy": 0,
        "faults": Faults(lost=0.002, restarted=0.004, unseen=0.5),
    },
}


def back(seed: int, kind: str) -> TrainingWorld:
    world = TrainingWorld(seed, **WORLDS[kind])
    train_and_go_back(world, STEPS, ATTEMPTS)
    return world


@pytest.mark.parametrize("kind", WORLDS)
def test_invariants_hold_when_runs_go_back(kind: str) -> None:
    happened = Counter[str]()
    for seed in range(SEEDS):
        try:
            happened += back(seed, kind).happened
        except Violation as violation:
            raise AssertionError(f"seed {seed}") from violation
    assert happened["went back"] > SEEDS / 10
    assert happened["went back in part"]


NONE, WILD, LATE = WORLDS
BUGS = {
    "a checkpoint gets the number of a commit that some hosts have": Bug(
        "commit", "self._is_begun = True", "pass", NONE, "versions are whole"
    ),
    "a checkpoint that was taken over in part keeps its number": Bug(
        "take_over",
        "self._is_begun, version = True,",
        "self._is_begun, version = False,",
        NONE,
        "versions are whole",
    ),
    "owners keep what they had": Bug(
        "forget", "tuple(sorted(self.plan.tensors))", "()", NONE, "owners are equal"
    ),
    "an attempt of before is taken for one after": Bug(
        "_count_version", "self._turn += 1", "pass", NONE, "the newest run is obeyed"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    bug.plant(monkeypatch)
    for seed in range(SEEDS):
        try:
            back(seed, bug.where)
        except Violation as violation:
            assert violation.invariant == bug.found
            return
    raise AssertionError("nothing shows it")
