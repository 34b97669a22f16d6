"""What a change brought: the load behind its end, under the shares before and after."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.cluster.control.change_impact import ImpactMeter, balancedness_under
from moesaic.cluster.control.changes import Change, ChangeHistory
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.load.tracker import LoadTracker
from moesaic.cluster.placement import LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.planner.plan import Plan, PoolHost

KEY = LayerKey("m", 0)
HOSTS = [PoolHost(name="a"), PoolHost(name="b")]
# Expert 0 on a, expert 1 on b; then expert 0 on both.
BEFORE = {KEY: LayerPlacement(((Replica("a", 1.0),), (Replica("b", 1.0),)))}
AFTER = {KEY: LayerPlacement(((Replica("a", 0.75), Replica("b", 0.25)), (Replica("b", 1.0),)))}
PLAN = Plan(
    layers=AFTER,
    moves=(),
    drops=(),
    before={KEY: 0.5},
    after={KEY: 1.0},
    unplaced=(),
    unprotected=(),
    lacking_bytes=0,
)


def test_balancedness_of_a_load_under_given_shares() -> None:
    loads = {KEY: np.array([8, 0])}
    assert balancedness_under(BEFORE, loads, HOSTS) == {KEY: 0.5}
    # 6 on a, 2 on b: the mean of 4, divided by 6.
    assert balancedness_under(AFTER, loads, HOSTS)[KEY] == pytest.approx(4 / 6)
    fast = [PoolHost(name="a", speed=3.0), PoolHost(name="b", speed=1.0)]
    assert balancedness_under(AFTER, loads, fast)[KEY] == pytest.approx(1.0)


def test_layers_without_load_or_of_another_form_are_left_out() -> None:
    assert balancedness_under(BEFORE, {}, HOSTS) == {}
    assert balancedness_under(BEFORE, {KEY: np.array([0, 0])}, HOSTS) == {}
    assert balancedness_under(BEFORE, {KEY: np.array([1, 2, 3])}, HOSTS) == {}
    assert balancedness_under(BEFORE, {KEY: np.array([1, 2])}, []) == {}


class World:
    """Ticks of half a second, and a load in each."""

    def __init__(self, window_s: float = 4.0) -> None:
        self.meter = ImpactMeter(window_s)
        self.changes, self.loads, self.now = ChangeHistory(), LoadTracker(), 0.0
        self.standing = Placement(id=PlacementId(1, 1), hosts={}, layers=BEFORE)

    def run(self, seconds: float, *counts: int) -> None:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            times = {"a": HostTimes(assignments=counts[0]), "b": HostTimes(assignments=counts[1])}
            report = LoadReport(
                router="r", placement_id=None, counts={KEY: np.array(counts)}, hosts=times
            )
            self.loads.hear(report)
            self.tick()

    def tick(self) -> None:
        self.meter.tick(self.changes.find(None), self.standing, self.loads, HOSTS, self.now)

    def begin(self) -> Change:
        return self.changes.begin(PLAN, BEFORE, self.now, who="w", why="y")

    def end(self) -> None:
        self.standing = Placement(id=PlacementId(1, 2), hosts={}, layers=AFTER)
        self.changes.done(self.now)


def test_only_what_is_counted_behind_the_end_is_measured() -> None:
    world = World()
    world.run(20, 0, 100)
    change = world.begin()
    world.run(5, 0, 100)
    world.end()
    world.tick()
    assert change.impact is None
    world.run(4, 8, 0)
    assert change.impact is not None
    assert change.impact.seconds == pytest.approx(4.0)
    assert change.impact.before == {KEY: 0.5}
    assert change.impact.after[KEY] == pytest.approx(4 / 6)
    # As if there were one choice for each that was counted.
    assert change.impact.assignments_per_s_before == {"a": 0.0, "b": 200.0}
    assert change.impact.assignments_per_s_after == {"a": 16.0, "b": 0.0}
    found = change.impact
    world.run(20, 0, 9)
    assert change.impact is found, "measured once"


def test_the_next_change_ends_the_measuring() -> None:
    world = World()
    world.run(10, 1, 1)
    first = world.begin()
    world.end()
    world.run(2, 8, 0)
    second = world.begin()
    world.end()
    world.tick()
    assert first.impact is not None
    assert first.impact.seconds == pytest.approx(1.5)
    third = world.begin()
    world.end()
    world.tick()
    assert second.impact is None, "no second has passed"
    world.run(10, 1, 1)
    assert third.impact is not None


def test_a_change_that_is_under_way_or_rolled_back_is_not_measured() -> None:
    world = World()
    world.run(5, 1, 1)
    change = world.begin()
    world.run(20, 1, 1)
    assert change.impact is None
    world.changes.rolled_back(change, world.now)
    world.run(20, 1, 1)
    assert change.impact is None
    assert change.report(world.now, pending_moves=0).measured is None


def test_load_that_comes_long_behind_a_change_is_not_its_effect() -> None:
    world = World()
    world.run(10, 1, 1)
    change = world.begin()
    world.end()
    world.run(20, 0, 0)
    world.run(20, 8, 0)
    assert change.impact is None


def test_a_change_that_is_rolled_back_while_it_is_measured_has_no_effect() -> None:
    world = World()
    world.run(10, 1, 1)
    change = world.begin()
    world.end()
    world.run(2, 8, 0)
    world.changes.rolled_back(change, world.now)
    world.run(20, 8, 0)
    world.begin()
    world.tick()
    assert change.impact is None
