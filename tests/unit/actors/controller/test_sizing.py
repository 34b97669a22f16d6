"""The controller's part in the pool's size, on a clock that the test sets."""

from __future__ import annotations

from moesaic.actors.controller.sizing import Sizing
from moesaic.cluster.control.control import Control
from moesaic.cluster.control.policy import ControlPolicy
from moesaic.cluster.planner.plan import FleetGroup
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from tests.helpers.cluster.fake_clock import FakeClock


async def test_a_provisioner_that_asks_no_more_is_a_problem_until_it_asks_again() -> None:
    clock = FakeClock()
    fleet = Fleet([FleetGroup(count=2, min_count=1, max_count=2)], ScalePolicy(), pending_s=1.0)
    control = Control(fleet.pool_hosts(), term=1, policy=ControlPolicy())
    sizing = Sizing(control, fleet, "n", lambda: None, clock)
    clock.now += 15.0
    assert sizing.status(clock()).problem is None
    clock.now += 15.0
    problem = sizing.status(clock()).problem
    assert problem is not None
    assert "has started and ended no hosts for 30 s" in problem
    await sizing.desired(None, 0.0)
    assert sizing.status(clock()).problem is None
