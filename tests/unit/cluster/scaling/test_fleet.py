"""Hosts that come and go under the controller's state machine, with random deaths, late machines
and changes of controllers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.placement import ModelShape
from moesaic.cluster.planner.capacity import capacity_shortage
from moesaic.cluster.planner.plan import OperatorConstraints, PoolHost
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from tests.helpers.cluster.control_world import counts, shape
from tests.helpers.cluster.fleet_world import PENDING_S, FleetWorld, group, stage, started
from tests.helpers.effort import tries

KINDS = (
    *("tick",) * 6,
    *("load",) * 4,
    *("report",) * 3,
    *("scale",) * 2,
    *("traffic", "fail", "kill", "restart", "restart", "drain", "machines", "take over"),
)


@settings(max_examples=tries(150), deadline=None, derandomize=True)
@given(data=st.data())
def test_any_history_of_sizes_keeps_every_expert_served(data: st.DataObject) -> None:
    world = FleetWorld([group(data.draw(st.integers(1, 3)))], [(shape("disk", experts=3), True)])
    world.tick()
    world.tick()
    if data.draw(st.booleans(), label="with a model in memory"):
        world.models.append((shape("memory", experts=2, layers=1), False))
        world.put_models_in_memory()
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        kind = data.draw(st.sampled_from(KINDS))
        # All may be dead and let go while new ones wait for machines.
        name = data.draw(st.sampled_from(sorted(world.hosts) or ["nobody"]))
        if name == "nobody":
            kind = "machines"
        if kind == "tick":
            late = data.draw(st.frozensets(st.sampled_from(sorted(world.hosts)), max_size=2))
            world.tick(late, data.draw(st.sampled_from([0.2, 1.0, 3.0])))
        elif kind == "load":
            world.load_one(name)
        elif kind == "report":
            world.report(data.draw(st.sampled_from(sorted(world.routers))))
        elif kind == "traffic":
            world.report("r0", counts(world, data.draw(st.integers(0, 5))))
        elif kind == "scale":
            # A drained host is none that others can leave their experts to.
            try:
                world.scale(data.draw(st.integers(1, 6)))
            except ValueError as error:
                assert "no host would be left" in str(error)
        elif kind == "fail":
            world.fail_load(name)
        elif kind == "kill":
            world.kill(name)
        elif kind == "restart":
            world.restart(name)
        elif kind == "drain":
            leaving = frozenset({name}) if data.draw(st.booleans()) else frozenset()
            world.constraints = OperatorConstraints(leaving=leaving)
            world.control.set_constraints(world.constraints)
        elif kind == "machines":
            world.machines_come = not world.machines_come
        else:
            world.take_over()
    world.machines_come = True
    world.constraints = OperatorConstraints()
    world.control.set_constraints(world.constraints)
    world.start_hosts()
    wanted = len(world.fleet.staying(0))
    world.settle()
    assert len(world.hosts) == wanted, "as many as were asked for, none on its way"
    assert world.hosts.keys() == world.control.view.hosts.keys()
    lost = world.lost()
    placement = world.control.placement
    assert placement is not None
    assert placement.hosts.keys() == world.hosts.keys()
    served = {
        key.expert(expert)
        for key, layer in placement.layers.items()
        for expert, replicas in enumerate(layer.replicas)
        if replicas
    }
    known = {key for key in world.every() if key.model in {k.model for k in placement.layers}}
    assert served == known - lost


def test_new_hosts_are_put_to_use_at_once_without_a_measured_load() -> None:
    world = started(group(2))
    world.scale(4)
    world.finish()
    assert stage(world) == "done"
    assert min(len(host.held) for host in world.hosts.values()) >= 2
    change = world.control.changes.all[-1]
    assert (change.who, change.phase.value) == ("controller", "done")


def test_spare_replicas_give_way_to_a_new_model_and_to_a_smaller_pool() -> None:
    world = started(group(2, slots=8))
    world.scale(4)
    world.finish()
    spare = sum(len(host.held) for host in world.hosts.values()) - 8
    assert spare > 0, "old hosts keep what new ones got"
    new = shape("n", experts=12)
    world.on_disk.add("n")
    world.control.add_model(new, on_disk=True)  # 32 slots for 8 and 24 experts
    world.finish()
    assert world.control.unplaced == ()
    assert world.control.missing() == {}
    with pytest.raises(ValueError, match="room for 24 replicas, but 32 are needed"):
        world.scale(3)
    smaller = started(group(2, slots=8))
    smaller.scale(4)
    smaller.finish()
    smaller.scale(1)
    smaller.finish()
    assert stage(smaller) == "done"
    assert smaller.control.missing() == {}


def test_one_new_host_among_many_is_put_to_use() -> None:
    models = [(shape("m", experts=128, layers=1), True)]
    world = FleetWorld([group(32, max_count=40)], models)
    world.finish()
    world.scale(33)
    world.finish()
    assert len(world.hosts["host-32"].held) >= 2


def test_scaling_is_idempotent() -> None:
    world = started(group(2))
    first = world.fleet.scale(world.control, 0, 3, who="a", now=world.now)
    again = world.fleet.scale(world.control, 0, 3, who="b", now=world.now)
    assert again is first
    world.finish()
    done = world.fleet.scale(world.control, 0, 3, who="b", now=world.now)
    assert (done.phase, done.coming, done.leaving) == ("done", [], [])


def test_what_cannot_hold_the_experts_is_refused() -> None:
    world = started(group(3, slots=4))
    with pytest.raises(ValueError, match="room for 4 replicas, but 8 are needed"):
        world.scale(1)
    with pytest.raises(ValueError, match="count: 7; choose a number from 1 to 6"):
        world.scale(7)
    with pytest.raises(ValueError, match="count: 0; choose a number from 1"):
        world.scale(0)
    with pytest.raises(ValueError, match=r"group: 2 does not exist; .* groups 0 to 0"):
        world.scale(1, group=2)
    with pytest.raises(ValueError, match="a model needs 2 replicas of each expert"):
        started(group(2), replicas=2).scale(1)
    with pytest.raises(ValueError, match="placement group"):
        started(group(2, fixed=True)).scale(1)


def test_a_host_without_a_machine_is_shown_with_its_reason_and_comes_later() -> None:
    world = started(group(2, needs="4 CPU"))
    world.machines_come = False
    world.scale(3)
    world.finish(4)
    assert stage(world) == "starting"
    assert world.fleet.waiting("host-2", world.now) == "requested 2 s ago"
    world.tick(seconds=PENDING_S)
    words = "requested 62 s ago; no machine has had room for it yet (4 CPU)"
    assert world.fleet.waiting("host-2", world.now) == words
    assert stage(world) == "no_room"
    scaling = world.fleet.scalings.all[-1]
    report = world.fleet.scaling_report(scaling, world.control, world.now)
    assert (report.under_way, report.obstacles) == (False, {"host-2": words})
    world.machines_come = True
    world.finish()
    assert world.fleet.waiting("host-2", world.now) is None
    assert world.hosts["host-2"].held


def test_a_pool_scales_with_its_load() -> None:
    scale = ScalePolicy(up_after_s=5, down_after_s=20, cooldown_s=10)
    world = started(group(2, min_count=2), scale=scale)

    def work(busy: float, rounds: int) -> None:
        """Every host that is there is busy for this part of its time."""
        for _ in range(rounds):
            world.tick(seconds=1.0)
            times = {name: HostTimes(calls=1, assignments=10, busy_s=busy) for name in world.hosts}
            for name in world.routers:
                world.report(name)
            number = world.published[-1].id
            world.control.hear(LoadReport(router="r0", placement_id=number, hosts=times), world.now)
            for name, host in list(world.hosts.items()):
                while host.loading:
                    world.load_one(name)

    work(0.9, 20)
    assert len(world.hosts) == 4
    event = world.fleet.scalings.all[-1]
    assert (event.who, event.count) == ("autoscaler", 4)
    assert "busy, above 75%" in event.why
    work(0.5, 60)
    assert len(world.hosts) == 4
    work(0.05, 200)
    assert len(world.hosts) == 2
    status = world.fleet.report(world.control, world.now, owner_age_s=0.0, problem=None)
    assert [(one.target_hosts, one.phase) for one in status.recent] == [
        (4, "done"),
        (3, "done"),
        (2, "done"),
    ]
    assert all(len(one.leaving_hosts) == 1 for one in status.recent[1:])


def test_another_controller_goes_on_with_the_same_hosts() -> None:
    world = started(group(2), group(1, slots=8))
    world.scale(3)
    world.finish()
    (leaving,) = world.scale(2)
    world.take_over()
    assert world.fleet.retired() == [leaving]
    world.finish()
    assert leaving not in world.hosts
    assert world.fleet.desired().keys() == world.hosts.keys()
    world.scale(2, group=1)
    assert "host-4" in world.hosts


def test_room_counts_the_bounds_of_each_host() -> None:
    one = ModelShape(model="m", experts={0: 8}, expert_bytes=10, replicas=1)
    bounded = PoolHost(name="a", slots=9, memory_bytes=55)
    assert "would have room for 5" in capacity_shortage([bounded], [one], redundancy=0)
    assert capacity_shortage([bounded, PoolHost(name="b", slots=3)], [one], redundancy=0) == ""
    assert capacity_shortage([bounded, PoolHost(name="b")], [one], redundancy=0) == ""
    same = [PoolHost(name=name, domain="rack", slots=99) for name in "ab"]
    assert (
        capacity_shortage(same, [one], redundancy=1)
        == "balance.redundancy 1 needs 2 failure domains"
    )
    assert capacity_shortage([], [one], redundancy=0) == "no host would be left"
