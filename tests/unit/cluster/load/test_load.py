"""What routers count, and the rates that the controller makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadMeter, LoadReport
from moesaic.cluster.load.tracker import LoadTracker
from moesaic.cluster.placement import ModelShape, Placement, PlacementId, initial_placement
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.policy import RouterPolicy

KEY = LayerKey("m", 0)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@given(st.lists(st.lists(st.integers(-1, 7), max_size=20), max_size=5))
def test_every_choice_of_a_real_expert_counts_once(calls: list[list[int]]) -> None:
    meter = LoadMeter()
    for call in calls:
        meter.count(KEY, ids(*call), experts=5)
    meter.count(KEY, ids(-(2**31), 2**31 - 1), experts=5)
    every = [one for call in calls for one in call]
    found = meter.take("r", None, None).counts
    assert found[KEY].tolist() == [every.count(expert) for expert in range(5)]
    assert meter.take("r", None, None).counts == {}


def test_a_router_counts_when_a_call_begins_and_not_when_it_is_sent_again() -> None:
    dispatcher = Dispatcher(RouterPolicy())
    layers = initial_placement([ModelShape(model="m", experts={0: 2})], ["h0"])
    dispatcher.place(Placement(id=PlacementId(1, 1), hosts={}, layers=layers), 0.0)
    assignments = np.array([[0, 1], [1, -1], [1, 2]], dtype=np.int32)
    dispatcher.begin(KEY, assignments, max_rows=8, now=0.0)
    for moment in range(1, 5):
        dispatcher.tick(float(moment))
    assert dispatcher.meter.take("r", None, None).counts[KEY].tolist() == [1, 3]


def tell(tracker: LoadTracker, *counts: int, router: str = "r") -> None:
    report = LoadReport(router=router, placement_id=None, counts={KEY: np.array(counts)})
    tracker.hear(report)


def test_rates_are_per_second_and_of_all_routers_together() -> None:
    tracker = LoadTracker()
    assert not tracker.advance(0.0)
    for second in range(1, 200):
        tell(tracker, 10, 0)
        tell(tracker, 5, 1, router="other")
        assert tracker.advance(float(second))
    for horizon in range(3):
        assert tracker.rate(KEY, horizon) == pytest.approx([15, 1], rel=0.02)
    assert tracker.forecast()[KEY] == pytest.approx([15, 1], rel=0.05)


def test_a_drift_shows_in_the_short_rate_and_goes_on_in_the_forecast() -> None:
    tracker = LoadTracker()
    tracker.advance(0.0)
    for second in range(1, 301):
        tell(tracker, 400 - second, 100 + second)
        tracker.advance(float(second))
    short, long = tracker.rate(KEY, 0), tracker.rate(KEY, 2)
    assert short is not None
    assert long is not None
    assert 400 > short[1] > 380 > 300 > long[1]
    assert tracker.shifted_at is None
    forecast = tracker.forecast()[KEY]
    assert forecast[1] > short[1], "the trend goes on"
    assert forecast[0] >= 0


def test_a_shift_is_seen_at_once_and_what_was_before_is_forgotten() -> None:
    tracker = LoadTracker()
    tracker.advance(0.0)
    for second in range(1, 301):
        tell(tracker, *((80, 20) if second <= 270 else (20, 80)))
        tracker.advance(float(second))
        if second == 271:
            assert tracker.shifted_at == 271
            assert tracker.rate(KEY, 0) == pytest.approx([20, 80])
    assert tracker.shifted_at == 271
    assert tracker.forecast()[KEY] == pytest.approx([20, 80]), "no trend leads through a shift"
    usual = tracker.rate(KEY, 2)
    assert usual is not None
    assert usual[0] > 70, "what is usual stays"


@pytest.mark.parametrize("experts", [8, 32, 256])
@pytest.mark.parametrize("assignments", [2, 8, 64, 512, 4096])
def test_chance_is_no_shift(assignments: int, experts: int) -> None:
    """All windows are drawn from the same distribution, few assignments of many experts too."""
    rng = np.random.default_rng(assignments)
    part_E = rng.dirichlet(np.ones(experts))
    tracker = LoadTracker()
    tracker.advance(0.0)
    for second in range(1, 301):
        tell(tracker, *rng.multinomial(assignments, part_E))
        tracker.advance(float(second))
    assert tracker.shifted_at is None


def test_who_was_idle_has_not_shifted() -> None:
    tracker = LoadTracker()
    tracker.advance(0.0)
    for second in range(1, 60):
        if second % 20 == 0:
            tell(tracker, 700, 300)
        tracker.advance(float(second))
    assert tracker.shifted_at is None


def test_idle_pools_cool_down() -> None:
    tracker = LoadTracker()
    tracker.advance(0.0)
    tell(tracker, 100, 50)
    tracker.advance(1.0)
    for second in range(2, 100):
        tracker.advance(float(second))
    short = tracker.rate(KEY, 0)
    assert short is not None
    assert (short < 0.1).all()


def test_hosts_work_is_measured_over_all_answers() -> None:
    tracker = LoadTracker()
    assert tracker.assignments_per_busy_s() is None
    for host, assignments in (("a", 300), ("b", 100)):
        times = {host: HostTimes(calls=1, assignments=assignments, queued_s=0.1, busy_s=0.5)}
        tracker.hear(LoadReport(router="r", placement_id=None, hosts=times))
    assert tracker.assignments_per_busy_s() == pytest.approx(400)
