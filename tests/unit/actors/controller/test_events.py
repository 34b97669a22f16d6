"""What the controller logs of the pool: every event once, whatever the ticks between."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from moesaic.actors.controller.events import Events
from moesaic.actors.controller.host_actors import HostActors
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.planner.plan import FleetGroup, OperatorConstraints
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from moesaic.cluster.training.runs import RUN_LEASE_S
from tests.helpers.cluster.control_world import ControlWorld
from tests.helpers.cluster.fleet_world import started
from tests.helpers.cluster.training_world import TrainingWorld
from tests.unit.cluster.control.test_idle_models import SleepyWorld

Caught = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def all_events(caplog: Caught) -> None:
    caplog.set_level(logging.INFO, logger="moesaic")


def told(caplog: Caught) -> list[str]:
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def watched(world: ControlWorld, events: Events, step: Callable[[], object]) -> None:
    """Let the events look after each tick, as the controller does."""
    tick = world.tick

    def both(*arguments: Any, **named: Any) -> bool:
        acted = tick(*arguments, **named)
        events.tick()
        return acted

    world.tick = both  # type: ignore[method-assign]
    try:
        step()
    finally:
        del world.tick  # type: ignore[method-assign]


def test_a_pool_that_is_scaled_down(caplog: Caught) -> None:
    world = started(FleetGroup(count=3, min_count=1, max_count=6))
    events = Events(world.control, world.fleet)
    events.tick()
    assert [one.split()[0] for one in told(caplog)] == ["placement"]
    (leaver,) = world.scale(2)
    watched(world, events, world.finish)
    said = told(caplog)
    assert said[0] == "group 0 goes from 3 to 2 hosts"
    assert f"host {leaver} is being drained" in said
    order = [said.index(f"host {leaver} {what}") for what in ("is drained", "has left the pool")]
    assert order == sorted(order)
    assert said.count("scaling 1 ends: done") == 1
    assert any(one.startswith("change ") and "begins" in one for one in said)
    watched(world, events, world.finish)
    assert told(caplog) == []


def test_a_host_that_is_drained_and_used_again(caplog: Caught) -> None:
    world = started()
    events = Events(world.control, world.fleet)
    name = min(world.hosts)
    for leaving, expected in ((frozenset({name}), "is drained"), (frozenset(), "is used again")):
        world.constraints = OperatorConstraints(leaving=leaving)
        world.control.set_constraints(world.constraints)
        watched(world, events, world.finish)
        assert told(caplog).count(f"host {name} {expected}") == 1


def test_a_change_has_who_and_why(caplog: Caught) -> None:
    world = started()
    events = Events(world.control, world.fleet)
    asked = world.control.plan_for(world.now, budget=1)
    change = world.control.apply(asked.run(), world.now, who="ann", why="asked for")
    watched(world, events, world.finish)
    ids = [
        (vars(record)["initiator"], vars(record)["reason"], vars(record)["phase"])
        for record in caplog.records
        if vars(record).get("change") == change.id
    ]
    assert ids == [("ann", "asked for", "done")] * 2, "it began and ended between two looks"


def test_a_model_that_sleeps_and_wakes(caplog: Caught) -> None:
    world = SleepyWorld()
    fleet = Fleet([], ScalePolicy(), pending_s=1.0)
    events = Events(world.control, fleet)
    watched(world, events, lambda: world.finish(20, seconds=2.0))
    assert [one for one in told(caplog) if "model" in one] == [
        "model sleepy falls asleep: it had no request"
    ]
    world.ask(waits=True)
    events.tick()
    assert "model sleepy wakes up" in told(caplog)


# ---- hosts ---------------------------------------------------------------------------------------


class Report:
    """What the log needs of a `HostReport`."""

    def __init__(self, incarnation: int, adopted: int = 0) -> None:
        self.loading, self.pid, self.adopted = 0, 7, adopted
        self.entry = HostEntry(
            host="h", incarnation=incarnation, node="n", shm_address="", grpc_address=""
        )


def test_a_host_comes_falls_silent_dies_and_is_replaced(caplog: Caught) -> None:
    hosts: Any = HostActors("moesaic-test")
    steps: list[tuple[Callable[[], None], list[str]]] = [
        (lambda: hosts.reported("h", Report(1)), ["host h is up"]),
        (lambda: hosts.late("h"), ["host h does not answer"]),
        (lambda: hosts.reported("h", Report(1)), ["host h answers again"]),
        (lambda: hosts.died("h", restarting=True), ["host h has died; it is restarting"]),
        # It restarts, and now and then the question is answered by nobody.
        (lambda: hosts.late("h"), []),
        (lambda: hosts.died("h", restarting=True), []),
        (
            lambda: hosts.reported("h", Report(2)),
            ["host h is replaced: it starts again, without experts"],
        ),
        # Ray may have started it again before anyone asked.
        (
            lambda: hosts.reported("h", Report(3, adopted=5)),
            ["host h is replaced: it starts again, with 5 experts"],
        ),
    ]
    for step, expected in steps:
        step()
        again = told(caplog)
        step()
        assert (again, told(caplog)) == (expected, [])


@pytest.mark.parametrize("lost", [False, True])
def test_a_run_that_ends_and_one_that_is_not_heard(caplog: Caught, lost: bool) -> None:
    world = TrainingWorld()
    events = Events(
        world.control,
        Fleet([FleetGroup(count=2, min_count=1, max_count=2)], ScalePolicy(), pending_s=1.0),
    )
    world.begin("ann")
    events.tick()
    assert "run 1 (ann) that trains m begins" in told(caplog)
    if lost:
        watched(world, events, lambda: world.rounds(RUN_LEASE_S + 1.0))
    else:
        world.control.training.end(1)
        events.tick()
    level, why = (logging.WARNING, "nothing was heard of it for 30 s") if lost else (20, "it was")
    (ended,) = [one for one in caplog.records if "has ended" in one.getMessage()]
    assert ended.levelno == level
    assert f"run 1 (ann) that trains m has ended: {why}" in ended.getMessage()
