"""The steps of a run under random faults, from seeds; and that planted bugs show."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest

from moesaic.cluster.training.orders import Begin, CloseRun, Commit, Disown, Order, Own
from moesaic.cluster.training.owners import _Dealing
from moesaic.cluster.training.run_hosts import RunHosts
from moesaic.cluster.training.run_plan import PoolNow
from moesaic.cluster.training.steps import TrainingSteps
from moesaic.cluster.versions import WeightVersions
from moesaic.proto.errors import ClusterError, StepLost
from tests.helpers.cluster.planted_bugs import Bug, find, run_seed
from tests.helpers.cluster.steps_world import TrainingWorld
from tests.helpers.cluster.training_host import Violation
from tests.helpers.cluster.training_hosts import Faults
from tests.helpers.effort import tries

SEEDS = tries(200)
RARE = Faults(lost=0.0005, restarted=0.0005, frozen=0.0005, interrupted=0.005, pool_changes=0.05)
# How many hosts there are, how many owners of a key, and what happens.
WORLDS: dict[str, dict[str, Any]] = {
    "one loss at a time": {"hosts": 5, "redundancy": 1, "faults": Faults(one_at_a_time=True)},
    "losses at will": {"hosts": 4, "redundancy": 1, "faults": Faults(interrupted=0.003)},
    "no redundancy, idle hosts lost": {
        "hosts": 5,
        "redundancy": 0,
        "faults": Faults(
            lost=0.04,
            restarted=0.06,
            frozen=0.01,
            pool_changes=0.5,
            unanswered_moves=0.3,
            idle_only=True,
        ),
    },
    "no redundancy": {"hosts": 4, "redundancy": 0, "faults": RARE},
    "hosts come and go": {
        "hosts": 5,
        "redundancy": 1,
        "faults": Faults(
            unanswered_moves=0.3, unanswered=0.01, pool_changes=0.5, one_at_a_time=True
        ),
    },
    "more owners than hosts": {"hosts": 3, "redundancy": 3, "faults": Faults()},
    "changes are seen late": {
        "hosts": 5,
        "redundancy": 1,
        "faults": Faults(lost=0.02, restarted=0.03, unseen=0.5, one_at_a_time=True),
    },
}


@pytest.mark.parametrize("kind", WORLDS)
def test_invariants_hold_under_faults(kind: str) -> None:
    happened, ends = Counter[str](), Counter[bool]()
    committed = lost = 0
    for seed in range(SEEDS):
        try:
            done = run_seed(seed, WORLDS[kind])
        except Violation as violation:
            raise AssertionError(f"seed {seed}") from violation
        happened += done.world.happened
        ends[bool(done.broken)] += 1
        committed += done.world.steps.step
        lost += len(done.world.lost)
    assert ends[False] > SEEDS / 10, "the faults leave runs to look at"
    assert committed > SEEDS * 2
    assert lost
    assert happened.keys() >= {"lost", "restarted", "frozen", "unanswered", "repeated", "joined"}
    assert happened.keys() >= {"drained"}
    assert bool(happened["unseen"]) == (kind == LATE)
    if WORLDS[kind]["faults"].one_at_a_time or WORLDS[kind]["faults"].idle_only:
        assert not ends[True]
    if kind == "no redundancy":
        assert ends[True]


PROBE = """
from tests.unit.cluster.training.test_training_steps import WORLDS, run_seed
world = run_seed(3, WORLDS["losses at will"]).world
print(sorted(world.happened.items()), world.steps.owners, world.steps.attempt)
"""


def test_a_seed_does_the_same_in_every_process() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1


# ---- what chance brings about seldom ------------------------------------------------------------


def a_beginning_without_an_answer() -> TrainingWorld:
    """A new host has begun the attempt, and gets its calls; the run does not hear of it."""
    world = TrainingWorld(0, hosts=3, redundancy=1)
    new = world.hosts.join()
    for place in world.places.values():
        place.host.experts.clear()
    for key in world.keys:
        world.serve(new, key)
    world.gate = lambda name, order: "answer lost" if isinstance(order, Begin) else None
    world.follow()
    world.gate = lambda name, order: None
    world.train(1, attempts=1)
    assert new in world.lost[-1]
    world.calm_down()
    return world


def a_drained_host_that_does_not_forget() -> TrainingWorld:
    """It stays after all, when others have taken steps with what it owned."""
    world = TrainingWorld(0, hosts=2, redundancy=0)
    world.gate = lambda name, order: "order lost" if isinstance(order, Disown) else None
    world.leaving = {"h0"}
    world.follow()
    world.train(2, attempts=2)
    assert world.steps.step == 2
    world.leaving = {"h1"}
    world.follow()
    world.check()
    assert set(world.steps.owners.values()) == {("h1",)}
    world.gate = lambda name, order: None
    world.calm_down()
    assert set(world.steps.owners.values()) == {("h0",)}
    return world


def a_host_that_does_not_close_the_run() -> TrainingWorld:
    """It has not committed, and comes back with what it had."""
    world = TrainingWorld(0, hosts=2, redundancy=1)
    world.excused.add("h0")

    def gate(name: str, order: Order) -> Literal["order lost"] | None:
        lost = name == "h0" and isinstance(order, Commit | CloseRun)
        return "order lost" if lost else None

    world.gate = gate
    world.train(1, attempts=1)
    assert world.steps.step == 1
    world.follow()
    world.follow()
    world.check()
    assert set(world.steps.owners.values()) == {("h1",)}
    world.gate = lambda name, order: None
    world.calm_down()
    return world


def an_owner_that_may_own_more() -> TrainingWorld:
    """It has taken over a key without an answer, and does not hear that it is to forget it."""
    world = TrainingWorld(0, hosts=3, redundancy=0)

    def gate(name: str, order: Order) -> Literal["order lost", "answer lost"] | None:
        if name == "h1" and isinstance(order, Own):
            return "answer lost"
        return "order lost" if name == "h1" and isinstance(order, Disown) else None

    world.gate = gate
    world.leaving = {"h0"}
    world.train(1, attempts=4)
    world.follow()
    before = world.steps.step
    world.train(before + 1, attempts=2)
    assert world.steps.step == before
    assert "h1 may still own" in world.lost[-1]
    world.gate = lambda name, order: None
    world.calm_down()
    return world


def a_copy_that_fails() -> TrainingWorld:
    """The owner that is drained stays one until there is another."""
    world = TrainingWorld(0, hosts=3, redundancy=1)
    world.gate = lambda name, order: "order lost" if isinstance(order, Own) else None
    world.leaving = {"h0"}
    before = world.steps.owners
    world.follow()
    if {key: set(hosts) for key, hosts in before.items()} != {
        key: set(hosts) for key, hosts in world.steps.owners.items()
    }:
        raise Violation("keys have all their owners", str(world.steps.owners))
    world.gate = lambda name, order: None
    world.calm_down()
    return world


def a_host_that_restarts_while_it_begins() -> TrainingWorld:
    """The run takes it for the incarnation before, so it owns nothing yet."""
    world = TrainingWorld(0, hosts=2, redundancy=0)
    new = world.hosts.join()
    world.leaving = {"h0", "h1"}

    def gate(name: str, order: Order) -> None:
        if name == new and isinstance(order, CloseRun) and not world.happened["restarted"]:
            world.hosts.restart(new)

    world.gate = gate
    world.follow()
    world.excused.clear()  # it owns nothing
    world.calm_down()
    assert set(world.steps.owners.values()) == {(new,)}
    return world


SCENARIOS: dict[str, Callable[[], TrainingWorld]] = {
    made.__name__.replace("_", " "): made
    for made in (
        a_beginning_without_an_answer,
        a_drained_host_that_does_not_forget,
        a_host_that_does_not_close_the_run,
        an_owner_that_may_own_more,
        a_copy_that_fails,
        a_host_that_restarts_while_it_begins,
    )
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_invariants_hold_in_scenarios(scenario: str) -> None:
    world = SCENARIOS[scenario]()
    assert not world.steps.broken


def test_a_lost_owner_is_named_with_what_to_do() -> None:
    world = TrainingWorld(0, hosts=3, redundancy=0)
    key, (owner,) = next(iter(world.steps.owners.items()))
    world.hosts.lose(owner)
    with pytest.raises(ClusterError, match=f"hosts were lost .{owner}: it is gone.*{key}.*in all"):
        world.exchange(world.steps.follow(world.now()))
    with pytest.raises(ClusterError, match="go back to a checkpoint, or train with redundancy"):
        world.exchange(world.steps.again(world.now()))
    assert "checkpoint" in world.steps.lost


def test_an_attempt_that_a_host_does_not_begin_is_lost_and_raises_when_it_is_used() -> None:
    world = TrainingWorld(0, hosts=3, redundancy=0)
    first = world.steps.attempt
    world.gate = lambda name, order: "answer lost" if isinstance(order, Begin) else None
    world.drop()
    assert "has not answered" in world.steps.lost
    with pytest.raises(StepLost, match=r"attempt 2 at step 0 .* has not answered in time; the wei"):
        world.exchange(world.steps.reduce_experts())
    world.gate = lambda name, order: None
    world.drop()
    assert world.steps.lost == ""
    assert world.steps.attempt == first._replace(number=3)
    world.train(2, attempts=2)
    assert (world.steps.step, world.steps.attempt.number) == (2, 1)


def test_a_run_begins_with_all_owners_or_not_at_all() -> None:
    world = TrainingWorld(0, hosts=3, redundancy=1)
    pool = world.now()
    steps = TrainingSteps(
        replace(world.steps.plan, run=8), pool, versions=world.steps.versions, next_version=9
    )
    asked = Counter[str]()

    def gate(name: str, order: Order) -> Literal["order lost"] | None:
        asked[name] += isinstance(order, Own)
        return "order lost" if asked[name] > 1 else None

    world.exchange(steps.open())
    for key in world.blocks:
        for entry in steps.owning(key):
            world.hosts.reach(entry).put_weights(8, key, 1)
    world.gate = gate
    with pytest.raises(ClusterError, match=r"h\d could not become another owner of what"):
        world.exchange(steps.own())
    leaving = replace(pool, leaving=frozenset(pool.entries))
    with pytest.raises(ClusterError, match="no host of the pool stays"):
        TrainingSteps(world.steps.plan, leaving, versions=WeightVersions(), next_version=2)


@pytest.mark.parametrize("redundancy", [0, 1])
def test_owners_of_one_key_are_on_one_kind_of_device(redundancy: int) -> None:
    world = TrainingWorld(0, hosts=3, redundancy=redundancy)
    pool, plan = world.now(), world.steps.plan
    first, *others = pool.entries
    gpus = {name: replace(pool.entries[name], device=f"GPU-{name}") for name in others}
    versions = WeightVersions()
    TrainingSteps(plan, replace(pool, entries=gpus), versions=versions, next_version=2)
    mixed = replace(pool, entries={first: pool.entries[first], **gpus})
    if redundancy:
        with pytest.raises(ClusterError, match=rf"{first} computes on a CPU and h\d on a GPU"):
            TrainingSteps(plan, mixed, versions=versions, next_version=2)
    else:
        TrainingSteps(plan, mixed, versions=versions, next_version=2)


@pytest.mark.parametrize("redundancy", [0, 1])
def test_a_host_on_another_kind_of_device_that_joins_owns_what_has_no_copies(
    redundancy: int,
) -> None:
    world = TrainingWorld(0, hosts=2, redundancy=redundancy)
    cpus = set(world.now().entries)
    new = world.hosts.join()

    def follow(leaving: str) -> set[str]:
        pool = world.now()
        gpu = replace(pool.entries[new], device="GPU-1")
        pool = replace(
            pool, entries={**pool.entries, new: gpu}, leaving=frozenset({leaving} - {""})
        )
        assert not world.exchange(world.steps.follow(pool))
        return {host for hosts in world.steps.owners.values() for host in hosts}

    follow("")
    drained = min(cpus)
    owners = follow(drained)
    assert owners == (cpus - {drained} if redundancy else cpus - {drained} | {new})


# ---- planted bugs -------------------------------------------------------------------------------


ONE, WILD, IDLE, NONE, GOING, MANY, LATE = WORLDS
BEGINNING, DRAINED, NOT_CLOSED, MORE, COPY, RESTARTS = SCENARIOS
EQUAL, GOES_ON, SAFE = (
    "owners are equal",
    "a run goes on when faults end",
    "one loss breaks nothing",
)
BUGS = {
    "the number of an attempt is used again": Bug(
        "_begin", "self._number + 1", "self._number", ONE, GOES_ON
    ),
    "an attempt goes on without a host that had a part": Bug(
        "_leave", "self._lost = self._lost or", "why_not =", ONE, EQUAL
    ),
    "a host that began the attempt in secret is not asked for its part": Bug(
        "_enter", "self._lost = self._lost or", "why_not =", BEGINNING, EQUAL
    ),
    "only owners are asked for gradients": Bug(
        "reduce_experts",
        "dict.fromkeys(hosts.members, Gather",
        "dict.fromkeys(hosts.keys_by_host(), Gather",
        IDLE,
        EQUAL,
    ),
    "a host comes back with the state of before": Bug(
        "enter", "CloseRun(run=plan.run),", "", GOING, EQUAL, RunHosts
    ),
    "a host that does not forget the run comes back": Bug(
        "enter", "and isinstance(answer, NotHere)", "", NOT_CLOSED, EQUAL, RunHosts
    ),
    "what a failed order may have left is not forgotten": Bug(
        "move",
        "self.left[host] = set(order.keys)",
        "self.left[host] = set()",
        GOING,
        EQUAL,
        RunHosts,
    ),
    "a host with an old state of a key becomes its owner": Bug(
        "move", "if host not in self.left", "if True", DRAINED, EQUAL, RunHosts
    ),
    "a host that may own more than it prepares is asked to commit": Bug(
        "reduce_experts",
        "if late := hosts.left.keys() & hosts.keys_by_host().keys():",
        "if late := set[str]():",
        MORE,
        "only a loss breaks a run",
    ),
    "an owner that has not committed stays one": Bug(
        "_leave", "self._hosts.owners = owners", "pass", ONE, "errors are meant"
    ),
    "a commit without an answer is not asked for again": Bug(
        "commit", "if gone:", "if False:", IDLE, SAFE
    ),
    "a run goes on after an interrupted commit": Bug(
        "commit", "self.broken = (\n", "why_not = (\n", NONE, "a number names one commit"
    ),
    "a run goes on without the state of a key": Bug(
        "_leave", "if lost := ownerless(owners):", "if lost := []:", NONE, "keys have owners"
    ),
    "what could not be copied is given up": Bug(
        "move",
        "if len(took) < len(hosts) or not hosts:",
        "if not took:",
        COPY,
        "keys have all their owners",
        RunHosts,
    ),
    "hosts that lost a key to others keep it": Bug(
        "move",
        "self.left.setdefault(host, set()).add(key)",
        "pass",
        IDLE,
        "hosts own what they should",
        RunHosts,
    ),
    "a host that has just come owns something at once": Bug(
        "follow",
        "hosts.dealt(known)",
        "hosts.dealt(hosts.members)",
        RESTARTS,
        "only a loss breaks a run",
    ),
    "hosts that leave become owners": Bug(
        "domains_of_owners",
        "if host not in self.leaving and",
        "if",
        IDLE,
        "hosts that are drained own nothing",
        PoolNow,
    ),
    "replicas keep the old weights": Bug(
        "commit",
        "yield self._hosts.renewals(self._next_version - 1)",
        "yield {}",
        ONE,
        "replicas are renewed",
    ),
    "owners share a domain": Bug(
        "next_owner",
        "domains[host] in taken, host",
        "False, host",
        ONE,
        "owners are in different domains",
        _Dealing,
    ),
    "owners that share a domain stay there": Bug(
        "kept",
        "return [host",
        "return staying or [host",
        ONE,
        "owners are in different domains",
        _Dealing,
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find(BUGS[name], WORLDS, SCENARIOS, SEEDS, monkeypatch)
