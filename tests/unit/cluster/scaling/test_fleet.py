"""Hosts that come and go under the controller's state machine, with random deaths, late machines
and changes of controllers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.commands import Publish
from moesaic.cluster.control.control import Control
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.placement import LayerKey, ModelShape
from moesaic.cluster.planner.capacity import capacity_shortage
from moesaic.cluster.planner.plan import FleetGroup, OperatorConstraints, PoolHost
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from tests.helpers.control_world import POLICY, ControlWorld, SimHost, counts, shape

# Only hands scale, where a test does not say otherwise.
BY_HAND = ScalePolicy(up_after_s=1e9, down_after_s=1e9)
PENDING_S = 60.0


class FleetWorld(ControlWorld):
    """Starts and ends hosts as a `Fleet` wants them."""

    def __init__(
        self,
        groups: list[FleetGroup],
        models: list[tuple[ModelShape, bool]],
        *,
        scale: ScalePolicy = BY_HAND,
    ) -> None:
        self.groups = groups
        self.scale_policy = scale
        self.kept: str | None = None
        self.machines_come = True
        self.started: list[str] = []
        self.late: frozenset[str] = frozenset()
        super().__init__(0, models)
        self.start_hosts()

    def new_control(self) -> Control:
        self.fleet = Fleet(
            self.groups,
            self.scale_policy,
            pending_s=PENDING_S,
            kept=json.loads(self.kept) if self.kept else None,
        )
        control = Control(self.fleet.pool_hosts(), term=self.term, policy=self.policy)
        self.fleet.take_over(control)
        return control

    def start_hosts(self) -> None:
        """What the cluster's owner does."""
        self.kept = json.dumps(self.fleet.snapshot())
        desired = self.fleet.desired()
        for name in self.hosts.keys() - desired.keys():
            self._end(name)
        for name in sorted(desired.keys() - self.hosts.keys()) if self.machines_come else ():
            assert name not in self.started, "a name is used again"
            self.started.append(name)
            self.hosts[name] = SimHost(name)

    def _end(self, name: str) -> None:
        host = self.hosts.pop(name)
        last = self.reported.pop(name, None)
        for key in last.experts() if last is not None else ():
            # As when it is frozen and cannot forget.
            assert any(seen.holds(key) for seen in self.reported.values()), "the last replica"
        if last == host.observe():
            assert self.late or not host.held, "ended with experts on it"
        for router in self.routers.values():
            if router.follows is not None and self.now - router.heard_at <= POLICY.lease_s:
                assert name not in router.follows.hosts, "ended under a router that knows it"

    def tick(self, late: frozenset[str] = frozenset(), seconds: float = 0.5) -> bool:
        size = self.fleet.version
        self.late = late
        acted = super().tick(late, seconds)
        self.fleet.tick(self.control, self.now)
        self.start_hosts()
        return acted or self.fleet.version != size

    def scale(self, count: int, group: int = 0) -> list[str]:
        """Gives the hosts that leave."""
        scaling = self.fleet.scale(self.control, group, count, who="test", now=self.now)
        self.start_hosts()
        return scaling.leaving

    def finish(self, rounds: int = 60) -> None:
        for _ in range(rounds):
            self.tick()
            for name in self.routers:
                self.report(name)
            for name, host in list(self.hosts.items()):
                while host.loading:
                    self.load_one(name)


def group(count: int = 2, **more: object) -> FleetGroup:
    values = {"count": count, "min_count": 1, "max_count": 6}
    return FleetGroup(**(values | more))  # pyright: ignore[reportArgumentType]


def started(*groups: FleetGroup, replicas: int = 1, **more: object) -> FleetWorld:
    models = [(shape("m", replicas=replicas), True)]
    world = FleetWorld(list(groups) or [group()], models, **more)  # pyright: ignore[reportArgumentType]
    world.finish()
    assert world.published
    return world


def stage(world: FleetWorld) -> str:
    return world.fleet.scalings.all[-1].phase


KINDS = (
    *("tick",) * 6,
    *("load",) * 4,
    *("report",) * 3,
    *("scale",) * 2,
    *("traffic", "fail", "kill", "restart", "restart", "drain", "machines", "take over"),
)


@settings(max_examples=150, deadline=None, derandomize=True)
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
    with pytest.raises(ValueError, match="room for 24 experts, and 32 need it"):
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
    assert leaving in world.hosts, "nobody else has its experts now"
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


def test_a_host_that_a_new_controller_never_saw_stays_while_it_may_hold_the_last_replica() -> None:
    world = FleetWorld([group(3)], [(shape("m"), True), (shape("n"), True)])
    world.finish()
    (leaving,) = world.scale(2)
    only = set(world.hosts[leaving].held)
    assert {key.model for key in only} == {"m", "n"}
    world.take_over()

    def rounds(number: int, loaded: set[str]) -> None:
        for _ in range(number):
            world.tick(frozenset({leaving}))
            for name in world.routers:
                world.report(name)
            for name, host in list(world.hosts.items()):
                while host.loading and host.loading[0][0].model in loaded:
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
    with pytest.raises(ValueError, match="there would be room for 4 experts, and 8 need it"):
        world.scale(1)
    with pytest.raises(ValueError, match="count: 7 is not in 1 to 6"):
        world.scale(7)
    with pytest.raises(ValueError, match="count: 0 is not in 1"):
        world.scale(0)
    with pytest.raises(ValueError, match="group: 2 is not in 0 to 0"):
        world.scale(1, group=2)
    with pytest.raises(ValueError, match="models want 2 replicas of each expert"):
        started(group(2), replicas=2).scale(1)
    with pytest.raises(ValueError, match="placement group"):
        started(group(2, fixed=True)).scale(1)


def test_a_host_without_a_machine_is_shown_with_its_reason_and_comes_later() -> None:
    world = started(group(2, needs="4 CPU"))
    world.machines_come = False
    world.scale(3)
    world.finish(4)
    assert stage(world) == "starting"
    assert world.fleet.waiting("host-2", world.now) == "asked for 2 s ago"
    world.tick(seconds=PENDING_S)
    words = "asked for 62 s ago; no machine has had room for it yet (4 CPU)"
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


def test_a_report_of_a_removed_host_is_not_taken_in() -> None:
    world = started(group(2))
    (leaving,) = world.scale(1)
    late = {leaving: world.hosts[leaving].observe()}
    world.finish()
    commands = world.control.tick(late, world.now)
    assert not [one for one in commands if isinstance(one, Publish)]
    assert leaving not in world.control.view.observations


def test_room_counts_the_bounds_of_each_host() -> None:
    one = ModelShape(model="m", experts={0: 8}, expert_bytes=10, replicas=1)
    bounded = PoolHost(name="a", slots=9, memory_bytes=55)
    assert capacity_shortage([bounded], [one], redundancy=0).startswith("there would be room for 5")
    assert capacity_shortage([bounded, PoolHost(name="b", slots=3)], [one], redundancy=0) == ""
    assert capacity_shortage([bounded, PoolHost(name="b")], [one], redundancy=0) == ""
    same = [PoolHost(name=name, domain="rack", slots=99) for name in "ab"]
    assert (
        capacity_shortage(same, [one], redundancy=1)
        == "balance.redundancy 1 needs 2 failure domains"
    )
    assert capacity_shortage([], [one], redundancy=0) == "no host would be left"


def test_layers_of_the_target_name_only_hosts_that_stay() -> None:
    world = started(group(3))
    leaving = world.scale(1)
    world.finish()
    placement = world.control.placement
    assert placement is not None
    layer = placement.layers[LayerKey("m", 0)]
    named = {name for expert in range(4) for name in layer.hosts(expert)}
    assert named.isdisjoint(leaving)
