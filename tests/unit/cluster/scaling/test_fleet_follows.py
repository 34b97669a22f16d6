"""A fleet follows other groups, with random sequences of specs and changes of controllers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.planner.plan import FleetGroup
from moesaic.cluster.scaling.autoscaler import GroupState, PoolLoad, ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from moesaic.cluster.spec.deployment import Deployment, regrouped
from moesaic.cluster.spec.spec import Spec, parse_spec
from tests.helpers.cluster.control_world import shape
from tests.helpers.cluster.fleet_world import FleetWorld, group, started
from tests.helpers.effort import tries


def spec_of(hosts: list[dict[str, Any]]) -> Spec:
    return parse_spec({"hosts": hosts})


class FollowingWorld(FleetWorld):
    """A pool that follows specs, and whose controller reads what is stored."""

    def __init__(self, spec: Spec) -> None:
        groups = dict(enumerate(spec.hosts))
        self.deployment = Deployment(
            id="1", spec=spec, models=[], groups=groups, order=list(groups)
        )
        super().__init__([one.fleet for one in spec.hosts], [(shape("m", experts=3), True)])

    @property
    def fleet_groups(self) -> dict[int, FleetGroup]:
        return {number: one.fleet for number, one in self.deployment.groups.items()}

    def new_control(self) -> Any:
        self.groups = self.fleet_groups  # pyright: ignore[reportAttributeAccessIssue]
        control = super().new_control()
        self.fleet.order = tuple(self.deployment.order)
        self.fleet.follow(
            control, self.fleet_groups, self.deployment.order, who="controller", now=self.now
        )
        return control

    def follow(self, spec: Spec, *, dies: bool = False) -> None:
        """Store a deployment and follow it; with ``dies`` the next controller follows it."""
        groups, order = regrouped(self.deployment, spec)
        used = self.fleet.used_groups | set(order)
        groups = {number: one for number, one in groups.items() if number in used}
        self.deployment = Deployment(id="1", spec=spec, models=[], groups=groups, order=order)
        if dies:
            self.take_over()
        else:
            self.fleet.follow(self.control, self.fleet_groups, order, who="test", now=self.now)
        self.start_hosts()


def sizes(world: FleetWorld) -> list[int]:
    return [len(world.fleet.staying(number)) for number in world.fleet.order]


GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "count": st.integers(1, 3),
            "min_count": st.just(1),
            "max_count": st.integers(3, 4),
            "threads": st.integers(1, 2),
            "speed": st.sampled_from([1.0, 2.0]),
        }
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=tries(60), deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_specs_ends_with_the_hosts_of_the_last(data: st.DataObject) -> None:
    world = FollowingWorld(spec_of(data.draw(GROUPS)))
    for _ in range(data.draw(st.integers(1, 5), label="steps")):
        step = data.draw(st.sampled_from(["follow", "follow", "dies", "scale", "take over"]))
        if step in ("follow", "dies"):
            spec = spec_of(data.draw(GROUPS))
            before = {
                number: (world.deployment.groups[number].count, len(world.fleet.staying(number)))
                for number in world.deployment.order
            }
            world.follow(spec, dies=step == "dies")
            for place, number in enumerate(world.deployment.order):
                wanted, there = spec.hosts[place], len(world.fleet.staying(number))
                count, had = before.get(number, (0, 0))
                expected = had if count == wanted.count else wanted.count
                assert there == min(max(expected, wanted.least), wanted.most)
                for host in world.fleet.staying(number):
                    assert world.control.view.hosts[host].speed == wanted.speed
        elif step == "scale":
            place = data.draw(st.integers(0, len(world.deployment.order) - 1))
            world.scale(data.draw(st.integers(1, 3)), place)
        else:
            there = sizes(world)
            world.take_over()
            assert sizes(world) == there, "another controller changes no size"
        world.finish(data.draw(st.integers(0, 30)))
    world.finish(80)
    assert not world.fleet.retired()
    assert set(world.fleet.desired().values()) <= set(world.deployment.order)
    assert set(world.hosts) == set(world.fleet.desired())
    assert not world.lost()


def test_a_controller_that_starts_anew_keeps_the_size_that_an_operator_chose() -> None:
    """`moesaic scale` goes below `min_count`, which is for the autoscaler."""
    world = FollowingWorld(spec_of([{"count": 2}]))
    world.finish()
    world.scale(1)
    world.finish()
    assert sizes(world) == [1]
    world.take_over()
    assert sizes(world) == [1]


def test_a_group_in_the_middle_goes_and_the_others_keep_their_hosts() -> None:
    three = [{"count": 1, "threads": n} for n in (1, 2, 3)]
    world = FollowingWorld(spec_of(three))
    world.finish()
    world.follow(spec_of([three[0], three[2]]))
    world.finish(80)
    assert sorted(world.hosts) == ["host-0", "host-2"]
    assert world.deployment.order == (0, 2)
    with pytest.raises(ValueError, match="the groups 0 to 1"):
        world.fleet.scale(world.control, 2, 1, who="test", now=world.now)


def test_groups_that_are_alike_are_told_apart_by_their_places() -> None:
    same = {"count": 1, "max_count": 4}
    world = FollowingWorld(spec_of([same, same | {"count": 2}, same | {"count": 3}]))
    world.finish()
    world.follow(spec_of([same, same | {"count": 2}]))
    world.finish(80)
    assert sizes(world) == [1, 2]


def test_the_autoscaler_follows_the_times_of_another_policy() -> None:
    """As `Sizing.follow` lets it: the same fleet, another policy."""
    world = started(group(2), scale=ScalePolicy(up_after_s=1e9, down_after_s=1e9))
    fleet: Fleet = world.fleet
    fleet.autoscaler.follow(ScalePolicy(up_after_s=1.0, down_after_s=1e9, cooldown_s=0.0))
    state = GroupState(
        min_count=1,
        max_count=6,
        cost_per_hour=1.0,
        speed=1.0,
        up=2,
        pending=0,
        stuck=0,
        leaving=0,
        keep="",
    )
    found = [
        fleet.autoscaler.decide([state], PoolLoad(1.0, 0.0), world.now + second)
        for second in range(10)
    ]
    assert any(found), "the pool has been busy for ten seconds, and the policy says one"
