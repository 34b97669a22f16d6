"""Which hosts leave a smaller pool, and when each of them may go."""

from __future__ import annotations

import pytest

from moesaic.cluster.control.commands import Publish
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import LoadReport
from moesaic.cluster.planner.plan import OperatorConstraints
from tests.helpers.cluster.control_world import POLICY, shape
from tests.helpers.cluster.fleet_world import FleetWorld, group, stage, started


def test_the_host_with_the_fewest_experts_leaves_and_the_newest_of_equals() -> None:
    world = started(group(3, slots=8))
    world.hosts["host-1"].held = set(sorted(world.hosts["host-1"].held)[:1])
    world.control.policy = POLICY
    world.tick()
    assert world.scale(2) == ["host-1"]
    world.finish()
    assert sorted(world.hosts) == ["host-0", "host-2"]
    assert world.scale(3) == []
    world.finish()
    # Names go on.
    assert sorted(world.hosts) == ["host-0", "host-2", "host-3"]


def test_one_that_is_not_up_leaves_first_then_one_that_is_drained() -> None:
    world = started(group(3, slots=8))
    world.machines_come = False
    world.scale(4)
    assert world.scale(3) == ["host-3"]
    world.finish()
    assert stage(world) == "done"
    world.constraints = OperatorConstraints(leaving=frozenset({"host-0"}))
    world.control.set_constraints(world.constraints)
    world.tick()
    assert world.scale(2) == ["host-0"]
    world.finish()
    assert world.control.constraints.leaving == frozenset()


def test_scaling_up_again_takes_back_what_was_leaving() -> None:
    world = started(group(3))
    (leaving,) = world.scale(2)
    world.tick()
    world.scale(3)
    assert world.fleet.scalings.all[-1].coming == [leaving]
    world.finish()
    assert leaving in world.hosts
    assert len(world.started) == 3, "nothing new was started"
    assert [one.phase for one in world.fleet.scalings.all] == ["superseded", "done"]
    placement = world.control.placement
    assert placement is not None
    assert leaving in placement.hosts


def test_a_host_that_leaves_waits_for_the_slowest_router() -> None:
    world = started(group(2))
    (leaving,) = world.scale(1)
    for _ in range(20):
        world.tick(seconds=0.2)
        world.report("r0")
        if world.now - world.routers["r1"].heard_at < POLICY.lease_s:
            assert leaving in world.hosts, "r1 still follows an old placement"
        for name, host in world.hosts.items():
            while host.loading:
                world.load_one(name)
    for _ in range(40):
        world.tick(seconds=0.5)
        world.report("r0")
    assert leaving not in world.hosts, "r1 was silent for a lease"


def test_a_host_that_froze_while_it_left_is_let_go() -> None:
    world = started(group(2))
    (leaving,) = world.scale(1)

    def run(rounds: int) -> None:
        for _ in range(rounds):
            world.tick(frozenset({leaving}))
            for name in world.routers:
                world.report(name)
            for name, host in world.hosts.items():
                while name != leaving and host.loading:
                    world.load_one(name)

    run(8)
    assert leaving in world.hosts
    assert world.hosts[leaving].held
    run(20)
    assert leaving not in world.hosts
    assert stage(world) == "done"


def test_a_host_that_froze_stays_while_it_may_hold_the_last_replica() -> None:
    world = started(group(3), replicas=2)
    follows = world.published[-1].id
    (leaving,) = world.scale(2)
    for _ in range(4):
        world.tick(frozenset({leaving}), seconds=POLICY.host_timeout_s / 2)
        # A router that does not follow yet keeps it.
        world.control.hear(LoadReport(router="r0", placement_id=follows), world.now)
    assert leaving not in world.control.view.observations
    assert leaving in world.hosts
    del world.reported[leaving]
    for name in world.hosts.keys() - {leaving}:
        world.kill(name)
    for _ in range(20):
        world.tick(frozenset({leaving}))
        for name in world.routers:
            world.report(name)
    assert leaving in world.hosts, "no other host has its experts now"
    for name in world.hosts:
        world.restart(name)
    for _ in range(40):
        world.tick(frozenset({leaving}))
        for name in world.routers:
            world.report(name)
        for name, host in world.hosts.items():
            while name != leaving and host.loading:
                world.load_one(name)
    assert leaving not in world.hosts


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_host_that_died_while_it_left_waits_for_its_next_process(comes_back: bool) -> None:
    """The next process may take over the memory, and with it the last replica of an expert."""
    world = started(group(2))
    (leaving,) = world.scale(1)
    held = set(world.hosts[leaving].held)
    assert held

    def run(rounds: int) -> None:
        for _ in range(rounds):
            world.tick(seconds=POLICY.host_timeout_s / 10)
            for name in world.routers:
                world.report(name)

    world.kill(leaving)
    run(8)
    assert leaving in world.hosts
    if comes_back:
        world.restart(leaving)
        world.hosts[leaving].held = held
    run(8)
    assert (leaving in world.hosts) == comes_back


def test_a_host_that_a_new_controller_never_saw_stays_while_it_may_hold_the_last_replica() -> None:
    world = FleetWorld([group(3)], [(shape("m"), True), (shape("n"), True)])
    world.finish()
    (leaving,) = world.scale(2)
    only = set(world.hosts[leaving].held)
    assert {key.model for key, _ in only} == {"m", "n"}
    world.take_over()

    def rounds(number: int, loaded: set[str]) -> None:
        for _ in range(number):
            world.tick(frozenset({leaving}))
            for name in world.routers:
                world.report(name)
            for name, host in list(world.hosts.items()):
                while host.loading and host.loading[0][0].key.model in loaded:
                    world.load_one(name)

    rounds(20, {"m"})
    assert {layer.model for layer in world.published[-1].layers} == {"m"}
    assert leaving in world.hosts
    rounds(40, {"m", "n"})
    assert leaving not in world.hosts
    assert only <= {key for host in world.hosts.values() for key in host.held}


def test_a_host_whose_experts_find_no_room_serves_on_and_leaves_when_there_is_some() -> None:
    world = started(group(3, slots=4))
    held = {name: len(host.held) for name, host in world.hosts.items()}
    assert sum(held.values()) >= 8
    (leaving,) = world.scale(2)
    (dead,) = world.hosts.keys() - {leaving, "host-0" if leaving != "host-0" else "host-1"}
    world.finish(1)
    world.kill(dead)
    for _ in range(20):
        world.tick(seconds=1.0)
        for name in world.routers:
            world.report(name)
        for name, host in list(world.hosts.items()):
            while host.loading:
                world.load_one(name)
    assert stage(world) == "no_room"
    words = world.control.drain_blockers()[leaving]
    assert "no other host has room for" in words
    placement = world.control.placement
    assert placement is not None
    assert all(all(replicas) for layer in placement.layers.values() for replicas in layer.replicas)
    # It dies too, and comes back: what has no other place is loaded there again.
    world.kill(leaving)
    world.finish(2)
    world.restart(leaving)
    world.finish(20)
    assert world.hosts[leaving].held
    world.restart(dead)
    world.finish()
    assert leaving not in world.hosts
    assert world.control.drain_blockers() == {}


def test_a_host_whose_report_is_old_is_not_let_go() -> None:
    world = FleetWorld([group(2)], [(shape("m"), True)])
    world.tick()
    world.tick()  # loads have begun, behind what the hosts reported
    (leaving,) = world.scale(1)
    world.load_one(leaving)
    for _ in range(3):
        world.tick(frozenset({leaving}), seconds=1.5)
        assert leaving in world.hosts
    world.finish()
    assert leaving not in world.hosts


def test_a_host_that_died_while_it_left_is_let_go() -> None:
    world = started(group(2))
    (leaving,) = world.scale(1)
    world.tick()
    world.kill(leaving)
    world.finish()
    assert list(world.hosts) == [{"host-0": "host-1", "host-1": "host-0"}[leaving]]
    assert stage(world) == "done"


def test_a_report_of_a_removed_host_is_not_taken_in() -> None:
    world = started(group(2))
    (leaving,) = world.scale(1)
    late = {leaving: world.hosts[leaving].observe()}
    world.finish()
    commands = world.control.tick(late, world.now)
    assert not [one for one in commands if isinstance(one, Publish)]
    assert leaving not in world.control.view.observations


def test_layers_of_the_target_name_only_hosts_that_stay() -> None:
    world = started(group(3))
    leaving = world.scale(1)
    world.finish()
    placement = world.control.placement
    assert placement is not None
    layer = placement.layers[LayerKey("m", 0)]
    named = {name for expert in range(4) for name in layer.hosts(expert)}
    assert named.isdisjoint(leaving)


def test_a_host_that_owns_trained_tensors_leaves_when_the_run_has_taken_them() -> None:
    world = started(group(3, slots=8))
    placement = world.control.placement
    assert placement is not None
    run = world.control.training.begin("m", placement.layers, who="me", unix_s=0.0, now=world.now)
    for name, owned in (("host-0", 5), ("host-1", 2), ("host-2", 90)):
        world.hosts[name].run, world.hosts[name].owned = run.run, owned
    world.tick()
    (leaver,) = world.scale(2)
    assert leaver == "host-1", "it has least to hand over"
    world.finish(20)
    assert leaver in world.hosts
    assert stage(world) == "draining", "room is not what it waits for"
    report = world.fleet.scaling_report(world.fleet.scalings.all[-1], world.control, world.now)
    assert report.obstacles[leaver].startswith("owns 2 tensors of the run that trains m")
    world.control.training.renew(run.run, world.now)
    world.hosts[leaver].owned = 0
    world.finish(20)
    assert leaver not in world.hosts
