"""Old replicas stay until no router that lives can ask for them."""

from __future__ import annotations

from moesaic.cluster.expert_keys import first_versions
from moesaic.cluster.placement import PlacementId
from moesaic.cluster.planner.plan import OperatorConstraints, PoolHost
from tests.helpers.cluster.control_world import POLICY, ControlWorld, started


def pass_lease(world: ControlWorld) -> None:
    """In several ticks: time in which the controller itself was frozen does not count."""
    for _ in range(4):
        world.tick(seconds=POLICY.lease_s / 4)


def test_old_replicas_stay_until_every_live_router_follows_the_new_placement() -> None:
    world = started(2, replicas=1, slots=4)
    pass_lease(world)
    victim = world.control.wanted("h1")
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1"})))
    world.pool = [PoolHost(name=f"h{n}", slots=16) for n in range(2)]
    world.control.view.hosts = {host.name: host for host in world.pool}
    for _ in range(4):
        world.tick()
        for host in world.hosts.values():
            while host.loading:
                world.load_one(host.name)
        world.report("r0")
        world.routers["r1"].heard_at = world.now  # it lives, and goes on with what it has
        world.control.publisher.acknowledged("r1", PlacementId(1, 1), world.now)
    assert not {
        r.host for la in world.published[-1].layers.values() for e in la.replicas for r in e
    } & {"h1"}
    assert set(first_versions(victim)) <= world.hosts["h1"].held, "r1 still asks for them"
    pass_lease(world)
    world.report("r0")
    world.report("r1")
    world.tick()
    assert not world.hosts["h1"].held


def drain_h1(world: ControlWorld) -> None:
    """Let the other hosts load what h1 holds, while no router reports."""
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1"})))
    for _ in range(4):
        world.tick(seconds=0.1)
        for host in world.hosts.values():
            while host.loading:
                world.load_one(host.name)


def test_a_silent_router_holds_evictions_up_no_longer_than_its_lease() -> None:
    world = started(2, replicas=1)
    pass_lease(world)
    world.report("r1")
    drain_h1(world)
    assert world.hosts["h1"].held
    pass_lease(world)
    world.tick(seconds=1.0)
    assert not world.hosts["h1"].held


def test_a_controller_that_was_frozen_gives_routers_time_to_say_that_they_live() -> None:
    world = started(2, replicas=1)
    pass_lease(world)
    world.report("r0")
    world.report("r1")
    drain_h1(world)
    world.tick(seconds=3 * POLICY.lease_s)
    assert world.hosts["h1"].held, "the controller was frozen and could hear no router"
    world.report("r0")
    world.report("r1")
    pass_lease(world)
    world.tick()
    assert not world.hosts["h1"].held


def test_a_controller_whose_rounds_are_slow_evicts_all_the_same() -> None:
    world = started(2, replicas=1)
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1"})))
    for _ in range(8):
        world.tick(seconds=2 * POLICY.lease_s)
        for name, host in world.hosts.items():
            while host.loading:
                world.load_one(name)
        world.report("r0")
        world.report("r1")
    assert not world.hosts["h1"].held
