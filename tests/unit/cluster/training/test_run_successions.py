"""Processes that decide for a run are killed, or seem to be: another one goes on, from seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest

from moesaic.cluster.training.orders import Commit, Disown, Order, Own, Renew
from moesaic.cluster.training.succession import Inheritance
from moesaic.proto.errors import ClusterError
from tests.helpers.cluster.planted_bugs import Bug, find, run_seed
from tests.helpers.cluster.steps_world import TrainingWorld
from tests.helpers.cluster.successions import succeed
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Faults, Killed, answer_of
from tests.helpers.effort import tries

SEEDS = tries(200)
RARE = Faults(lost=0.0005, restarted=0.0005, frozen=0.0005, pool_changes=0.05, killed=0.01)
WORLDS: dict[str, dict[str, Any]] = {
    "one loss at a time": {
        "hosts": 5,
        "redundancy": 1,
        "faults": Faults(killed=0.01, one_at_a_time=True),
    },
    "losses at will": {
        "hosts": 4,
        "redundancy": 1,
        "faults": Faults(killed=0.01),
    },
    "no redundancy": {
        "hosts": 4,
        "redundancy": 0,
        "faults": RARE,
    },
}


@pytest.mark.parametrize("kind", WORLDS)
def test_invariants_hold_whoever_decides(kind: str) -> None:
    happened, broken = Counter[str](), 0
    for seed in range(SEEDS):
        try:
            done = run_seed(seed, WORLDS[kind])
        except Violation as violation:
            raise AssertionError(f"seed {seed}") from violation
        happened += done.world.happened
        broken += bool(done.broken)
    assert happened.keys() >= {"killed", "zombie", "finished", "lost", "unanswered"}
    assert broken < SEEDS
    if WORLDS[kind]["faults"].one_at_a_time:
        assert not broken


# ---- what chance brings about seldom ------------------------------------------------------------


def a_successor_of_a_drained_host_that_does_not_forget() -> TrainingWorld:
    """The run that knew of it is gone when the host is to own something again."""
    world = TrainingWorld(0, hosts=2, redundancy=0)
    world.gate = lambda name, order: "order lost" if isinstance(order, Disown) else None
    world.leaving = {"h0"}
    world.follow()
    world.train(2, attempts=2)
    succeed(world)
    world.gate = lambda name, order: None
    world.leaving = {"h1"}
    world.calm_down()
    assert set(world.steps.owners.values()) == {("h0",)}
    return world


def a_successor_finds_half_an_owner() -> TrainingWorld:
    """A host was copying an expert, and what it shares with others, when the run was killed."""
    world = TrainingWorld(0, hosts=2, redundancy=0)
    new = world.hosts.join()
    world.follow()
    world.leaving = {"h0", "h1"}

    def gate(name: str, order: Order) -> None:
        if name == new and isinstance(order, Own):
            some = {key: how for key, how in order.keys.items() if key != world.shared}
            answer_of(world.places[name].host, replace(order, keys=some))
            raise Killed

    world.gate = gate
    with pytest.raises(Killed):
        world.follow()
    world.gate = lambda name, order: "order lost" if isinstance(order, Own) else None
    succeed(world)
    world.gate = lambda name, order: None
    world.calm_down()
    return world


def a_run_that_is_killed_before_replicas_are_renewed() -> TrainingWorld:
    """All owners have committed; replicas have not fetched the new version, nor is it published."""
    world = TrainingWorld(1, hosts=3, redundancy=0)

    def gate(name: str, order: Order) -> None:
        if isinstance(order, Renew):
            raise Killed

    world.gate = gate
    with pytest.raises(Killed):
        world.attempt()
    world.gate = lambda name, order: None
    succeed(world)
    assert (world.steps.step, world.happened["finished"]) == (1, 1)
    world.calm_down()
    return world


def a_successor_finds_less_than_is_served() -> TrainingWorld:
    """The only host that is left has missed the last commit: no state is better than an old one."""
    world = TrainingWorld(0, hosts=2, redundancy=1)

    def gate(name: str, order: Order) -> Literal["order lost"] | None:
        return "order lost" if name == "h0" and isinstance(order, Commit) else None

    world.gate = gate
    world.excused.add("h0")
    world.train(1, attempts=1)
    world.hosts.lose("h1")
    world.hosts.join()
    with pytest.raises(ClusterError, match="no host that answers has the optimizer's state"):
        succeed(world)
    return world


def a_host_that_has_committed_is_lost_with_the_run() -> TrainingWorld:
    """Nobody who is left has the version that it may go on serving to somebody."""
    world = TrainingWorld(0, hosts=2, redundancy=1)
    committed: list[str] = []

    def gate(name: str, order: Order) -> None:
        if isinstance(order, Commit):
            if committed:
                raise Killed
            committed.append(name)

    world.gate = gate
    with pytest.raises(Killed):
        world.attempt()
    world.gate = lambda name, order: None
    world.hosts.lose(committed[0])
    world.hosts.join()
    succeed(world)
    assert world.steps.step == 0
    world.calm_down()
    return world


SCENARIOS: dict[str, Callable[[], TrainingWorld]] = {
    made.__name__.replace("_", " "): made
    for made in (
        a_successor_of_a_drained_host_that_does_not_forget,
        a_successor_finds_half_an_owner,
        a_run_that_is_killed_before_replicas_are_renewed,
        a_successor_finds_less_than_is_served,
        a_host_that_has_committed_is_lost_with_the_run,
    )
}
HEIRS, WILD, POOR = WORLDS
NOT_FORGOTTEN, HALF, KILLED, BEHIND, COMMITTED = SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_invariants_hold_in_scenarios(scenario: str) -> None:
    world = SCENARIOS[scenario]()
    assert bool(world.steps.broken) == (scenario == BEHIND)


# ---- planted bugs -------------------------------------------------------------------------------

BUGS = {
    "a commit that some have carried out is begun anew": Bug(
        "succeed",
        "if (unfinished := there.unfinished()) is not None:",
        "if unfinished := None:",
        POOR,
        "only a loss breaks a run",
    ),
    "hosts that did not answer at once are given up": Bug(
        "succeed",
        "if silent := errors_of(found):",
        "if silent := None:",
        POOR,
        "only a loss breaks a run",
    ),
    "the next version has the number of the last": Bug(
        "succeed",
        "max(self._next_version, version + 1)",
        "version",
        HEIRS,
        "a number names one commit",
    ),
    "what is older than what is served counts": Bug(
        "owners",
        "self.served.of(key) if published else newest",
        "newest",
        BEHIND,
        "no step is lost",
        Inheritance,
    ),
    "a host that has taken over a part of what it should is an owner": Bug(
        "owners",
        "is None or h in shared",
        "is None or True",
        HALF,
        "owners are equal",
        Inheritance,
    ),
    "a successor leaves an old state to a host": Bug(
        "succeed", "there.left()", "{}", NOT_FORGOTTEN, "owners are equal"
    ),
    "a step that is begun anew has the number of the one before": Bug(
        "_skip_version",
        "self._next_version += 1",
        "pass",
        COMMITTED,
        "a number names one commit",
    ),
    "a successor does not renew replicas": Bug(
        "succeed", "yield hosts.renewals(version)", "yield {}", KILLED, "replicas are renewed"
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find(BUGS[name], WORLDS, SCENARIOS, SEEDS, monkeypatch)
