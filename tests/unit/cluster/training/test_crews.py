"""Steps by several workers, which are killed, late, and replaced beside hosts and the run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from moesaic.cluster.training.workers import Workers
from tests.helpers.cluster.crew_world import CrewWorld
from tests.helpers.cluster.planted_bugs import Bug, find, run_seed
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Faults
from tests.helpers.effort import tries

SEEDS = tries(100)
CALM = Faults(
    unanswered=0.0, unanswered_moves=0.0, lost=0.0, restarted=0.0, frozen=0.0, worker_gone=0.01
)
WORLDS: dict[str, dict[str, Any]] = {
    "one loss at a time": {
        "hosts": 5,
        "faults": Faults(killed=0.005, worker_gone=0.01, one_at_a_time=True),
    },
    "losses at will": {"hosts": 4, "faults": Faults(killed=0.005, worker_gone=0.01)},
    "workers alone": {"hosts": 3, "redundancy": 0, "crew": 5, "faults": CALM},
    "one worker": {"hosts": 3, "crew": 1, "faults": CALM},
    "workers without a microbatch": {"hosts": 3, "crew": 6},
}
SAFE = WORLDS.keys() - {"losses at will"}
ALONE, IDLE = "workers alone", "workers without a microbatch"


@pytest.mark.parametrize("kind", WORLDS)
def test_invariants_hold_whoever_computes(kind: str) -> None:
    happened, broken = Counter[str](), 0
    for seed in range(SEEDS):
        try:
            done = run_seed(seed, WORLDS[kind], CrewWorld)
        except Violation as violation:
            raise AssertionError(f"seed {seed}") from violation
        happened += done.world.happened
        broken += bool(done.broken)
    if "faults" in WORLDS[kind]:
        assert happened.keys() >= {"worker gone", "late"}
    assert broken < SEEDS
    if kind in SAFE:
        assert not broken


BUGS = {
    "a step is decided before the last worker has come": Bug(
        "meet",
        "len(there) == len(self.part)",
        "len(there) >= len(self.part) - 1",
        ALONE,
        "owners are equal",
        Workers,
    ),
    "what was said in an attempt counts in the next one": Bug(
        "_take_part", "self._meetings.clear()", "pass", ALONE, "workers meet", Workers
    ),
    "one worker's gradients of the trunk count": Bug(
        "reduce_trunk", "tuple(put[key])", "tuple(put[key])[:1]", ALONE, "owners are equal"
    ),
    "layers from which one worker has not learned are left out": Bug(
        "_reduce_experts",
        "frozenset[int]().union",
        "frozenset(range(9)).intersection",
        IDLE,
        "a run goes on when faults end",
        CrewWorld,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find(BUGS[name], WORLDS, {}, SEEDS, monkeypatch, CrewWorld)
