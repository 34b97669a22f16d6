"""The autoscaler under a fake clock: it follows the load, never flaps, and keeps its limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.load.meter import HostTimes
from moesaic.cluster.scaling.autoscaler import (
    Autoscaler,
    BusyMeter,
    Decision,
    GroupState,
    PoolLoad,
    ScalePolicy,
)

POLICY = ScalePolicy(
    scale_up_above=0.75, scale_down_below=0.35, up_after_s=10.0, down_after_s=60.0, cooldown_s=30.0
)
STEP_S = 2.0


def group(up: int = 2, *, least: int = 1, most: int = 8, **more: object) -> GroupState:
    values = {"min_count": least, "max_count": most, "cost_per_hour": 1.0, "speed": 1.0, "up": up}
    return GroupState(**(values | more))  # pyright: ignore[reportArgumentType]


class Pool:
    """Hosts that come and go at once, and work that is spread over them evenly."""

    def __init__(self, *groups: GroupState, policy: ScalePolicy = POLICY) -> None:
        self.groups = list(groups)
        self.scaler = Autoscaler(policy)
        self.now = 50.0
        self.decisions: list[tuple[float, Decision]] = []

    @property
    def capacity(self) -> float:
        return sum(group.up * group.speed for group in self.groups)

    def step(self, work: float, *, waiting: float = 0.0) -> list[Decision]:
        """``work`` in hosts of speed 1 that would be busy all the time."""
        self.now += STEP_S
        load = PoolLoad(min(1.0, work / self.capacity), waiting)
        decisions = self.scaler.decide(self.groups, load, self.now)
        for one in decisions:
            self.decisions.append((self.now, one))
            self.groups[one.group] = replace(self.groups[one.group], up=one.count)
        return decisions

    def run(self, seconds: float, work: float, **more: float) -> list[Decision]:
        found: list[Decision] = []
        for _ in range(int(seconds / STEP_S)):
            found += self.step(work, **more)
        return found


def test_too_busy_for_long_enough_adds_as_many_as_bring_it_to_the_middle() -> None:
    pool = Pool(group(3))
    assert pool.run(8, 2.7) == []
    (decision,) = pool.run(10, 2.7)
    # 2.7 hosts' work at 55 % each.
    assert decision.count == 5
    assert decision.reason == "hosts are 90% busy, above 75%, for 10 s"
    assert pool.run(600, 2.7) == []


def test_a_short_peak_changes_nothing() -> None:
    pool = Pool(group(3))
    for _ in range(20):
        assert pool.run(6, 3.0) == []
        assert pool.run(20, 1.5) == []


def test_idle_for_long_enough_removes_one_at_a_time() -> None:
    pool = Pool(group(4))
    pool.run(300, 0.5)
    counts = [decision.count for _, decision in pool.decisions]
    # One host with all of the work would be 50 % busy.
    assert counts == [3, 2, 1]
    times = [now for now, _ in pool.decisions]
    assert min(np.diff(times)) >= POLICY.cooldown_s


def test_no_host_leaves_where_the_others_would_be_too_busy_without_it() -> None:
    # 32 % busy is below the mark; one host alone would be 64 % busy.
    pool = Pool(group(2))
    assert pool.run(1000, 0.64) == []


def test_calls_that_wait_longer_than_they_are_computed_add_hosts() -> None:
    pool = Pool(group(2))
    (decision,) = pool.run(14, 1.0, waiting=3.0)
    assert decision.count == 3
    assert decision.reason == "calls wait 3.0 times as long as their computation takes, for 10 s"


def test_minimum_and_maximum_are_kept_and_what_is_held_back_is_said() -> None:
    pool = Pool(group(2, least=2, most=3))
    pool.run(500, 3.0)
    assert pool.groups[0].up == 3
    assert "max_count" in pool.scaler.held
    pool.run(1000, 0.0)
    assert pool.groups[0].up == 2


def test_a_group_of_fixed_size_is_left_alone() -> None:
    pool = Pool(group(2, least=2, most=2))
    assert pool.run(500, 2.0) + pool.run(500, 0.0) == []


def test_at_most_twice_as_many_at_once() -> None:
    pool = Pool(
        group(1, most=100), policy=replace(POLICY, scale_up_above=0.4, scale_down_below=0.1)
    )
    (decision,) = pool.run(14, 1.0)
    assert decision.count == 2


def test_the_cost_limit_holds_hosts_on_their_way_out_included() -> None:
    policy = replace(POLICY, max_cost_per_hour=5.0)
    pool = Pool(group(3, cost_per_hour=1.0, leaving=1), policy=policy)
    (decision,) = pool.run(14, 3.0)
    assert decision.count == 4
    pool.run(200, 9.0)
    assert pool.groups[0].up == 4
    assert "costs more than 5 an hour" in pool.scaler.held


def test_the_cheapest_speed_comes_first_and_the_dearest_leaves_first() -> None:
    slow = group(2, cost_per_hour=1.0, speed=1.0)
    fast = group(1, cost_per_hour=2.0, speed=4.0)
    pool = Pool(slow, fast)
    assert [decision.group for decision in pool.run(20, 5.5)] == [1]
    assert next(decision.group for decision in pool.run(200, 0.1)) == 0


def test_hosts_on_their_way_are_waited_for() -> None:
    pool = Pool(group(2, pending=2))
    assert pool.run(200, 1.9) == []
    assert pool.scaler.held == "enough hosts are already starting"


def test_where_no_machine_has_room_another_group_helps_out() -> None:
    pool = Pool(group(2, pending=2, stuck=2), group(1, cost_per_hour=9.0))
    assert {decision.group for decision in pool.run(20, 2.9)} == {1}


def test_a_host_leaves_only_when_no_other_does_and_the_experts_have_room() -> None:
    pool = Pool(group(3, leaving=1))
    assert pool.run(500, 0.1) == []
    pool = Pool(group(3, keep="the hosts would have room for 3 replicas, but 8 are needed"))
    assert pool.run(500, 0.1) == []
    assert pool.scaler.held.endswith("the hosts would have room for 3 replicas, but 8 are needed")


def test_a_rest_is_kept_behind_a_change_by_hand() -> None:
    pool = Pool(group(2))
    pool.run(8, 2.0)
    pool.scaler.rest(pool.now)
    assert pool.run(POLICY.cooldown_s - STEP_S, 2.0) == []
    assert pool.run(2 * STEP_S, 2.0) != []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1 << 16),
    start=st.integers(1, 8),
    work=st.floats(0.1, 6.0),
    noise=st.floats(0.0, 0.4),
)
def test_a_noisy_load_that_stays_never_makes_it_flap(
    seed: int, start: int, work: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    pool = Pool(group(start, most=16))
    for _ in range(int(2 * 3600 / STEP_S)):
        pool.step(max(0.0, work * (1 + noise * rng.normal())))
    counts = [start, *(decision.count for _, decision in pool.decisions)]
    turns = np.diff(np.sign(np.diff(counts)))
    # It may pass the right number once while it looks for it, and stays then.
    assert np.count_nonzero(turns) <= 1, counts
    assert len(pool.decisions) <= 8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_load_keeps_every_limit(data: st.DataObject) -> None:
    limit = data.draw(st.none() | st.floats(3.0, 20.0))
    groups = []
    for _ in range(data.draw(st.integers(1, 3))):
        least, up, most = sorted(data.draw(st.tuples(*[st.integers(1, 6)] * 3)))
        cost = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
        speed = data.draw(st.sampled_from([0.5, 1.0, 4.0]))
        groups.append(group(up, least=least, most=most, cost_per_hour=cost, speed=speed))
    pool = Pool(*groups, policy=replace(POLICY, max_cost_per_hour=limit))
    cost = sum(g.up * g.cost_per_hour for g in pool.groups)
    for work in data.draw(st.lists(st.floats(0, 30), max_size=8)):
        for _ in range(60):
            before = len(pool.decisions)
            pool.step(work)
            now_cost = sum(g.up * g.cost_per_hour for g in pool.groups)
            assert limit is None or now_cost <= max(limit, cost) + 1e-9
            cost = now_cost
            assert all(g.min_count <= g.up <= g.max_count for g in pool.groups)
            assert len(pool.decisions) == before or all(d.reason for _, d in pool.decisions)
    rests = np.diff(sorted({now for now, _ in pool.decisions}))
    assert not rests.size or rests.min() >= POLICY.cooldown_s


def test_busy_is_measured_between_two_looks() -> None:
    meter = BusyMeter()
    totals = {"a": HostTimes(busy_s=100.0, batch_s=100.0, queued_s=7.0)}
    assert meter.measure(totals, {"a": 1.0, "b": 1.0}, 10.0) is None
    totals["a"].busy_s, totals["a"].queued_s = 103.0, 25.0
    totals["a"].batch_s = 109.0  # three calls in each computation
    assert meter.measure(totals, {"a": 1.0, "b": 1.0}, 11.0) is None
    # a: 3 of 4 seconds; b did nothing, and is three times as fast.
    load = meter.measure(totals, {"a": 1.0, "b": 3.0}, 14.0)
    assert load == PoolLoad(0.75 / 4, 2.0)
    totals["a"].busy_s = 203.0
    load = meter.measure(totals, {"a": 1.0}, 18.0)
    assert load == PoolLoad(1.0, 0.0), "what is told late is not more than there was time"
    assert meter.measure(totals, {}, 22.0) is None


def test_marks_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="low, high"):
        ScalePolicy(scale_down_below=0.8, scale_up_above=0.7)
