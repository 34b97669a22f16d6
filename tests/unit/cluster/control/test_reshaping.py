"""A running pool follows another spec: a model that left never comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.control import Control
from moesaic.cluster.control.reshaping import follow, remove_model
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.planner.constraints import with_min_replicas, with_pin
from tests.helpers.cluster.control_world import POLICY, ControlWorld, counts, finish, shape
from tests.helpers.effort import tries


def with_two(hosts: int = 2) -> ControlWorld:
    world = ControlWorld(hosts, [(shape("m"), True), (shape("gone", experts=6, layers=3), True)])
    finish(world)
    return world


def remove(world: ControlWorld, model: str) -> None:
    """What the controller does when no trunk of the model is left."""
    world.models = [(one, on_disk) for one, on_disk in world.models if one.model != model]
    world.on_disk.discard(model)
    remove_model(world.control, model)
    world.keep_updates()
    # The simulated pool knows that hosts may evict the last replicas of a model that is asleep.
    world.control.idle_models.keep_asleep([model])


def held_models(world: ControlWorld) -> set[str]:
    return {one.key.model for host in world.hosts.values() for one in host.held}


def test_the_experts_of_a_model_that_left_are_evicted() -> None:
    world = with_two()
    assert held_models(world) == {"m", "gone"}
    remove(world, "gone")
    finish(world, 60)
    assert held_models(world) == {"m"}
    assert world.control.placement is not None
    assert {key.model for key in world.control.placement.layers} == {"m"}


def test_a_roll_back_to_before_the_removal_leaves_the_model_out() -> None:
    world = with_two()
    control = world.control
    change = control.apply(control.plan_for(world.now).run(), world.now, who="t", why="t")
    remove(world, "gone")
    finish(world, 60)
    control.roll_back(change, world.now)
    finish(world, 60)
    assert held_models(world) == {"m"}


def test_a_roll_back_knows_that_another_model_has_the_name_by_now() -> None:
    """The layers of a change from before are those of the model that had the name then."""
    world = with_two()
    control = world.control
    change = control.apply(control.plan_for(world.now).run(), world.now, who="t", why="t")
    remove(world, "gone")
    finish(world, 60)
    control.idle_models.forget("gone")
    another = shape("gone", experts=2, layers=1)
    world.models.append((another, True))
    world.on_disk.add("gone")
    control.add_model(another, on_disk=True, fits=True)
    finish(world, 60)
    control.roll_back(change, world.now)
    world.planner_is_slow = True  # nothing corrects the target meanwhile
    finish(world, 10)
    own = {layer: range(experts) for layer, experts in another.experts.items()}
    for host in world.hosts.values():
        for one, _ in [*((one, None) for one in host.held), *host.loading]:
            key = one.key
            assert key.model != "gone" or key.expert in own.get(key.layer, ()), f"{key}: no such"
    for placement in world.published[-3:]:
        layers = {key.layer for key in placement.layers if key.model == "gone"}
        assert layers <= own.keys()


@pytest.mark.parametrize("when", ["it is gone", "another has its name"])
def test_a_late_report_of_a_model_that_left_says_nothing(when: str) -> None:
    """Its trunk, a program or the router service tells of calls from before."""
    world = with_two()

    def report() -> None:
        number = world.published[-1].id
        counted = {LayerKey("gone", 0): 100 * np.arange(6)}
        times = {"h0": HostTimes(calls=1, assignments=1000, busy_s=1.0)}
        heard = LoadReport(router="r0", placement_id=number, counts=counted, hosts=times)
        world.control.hear(heard, world.now)

    remove(world, "gone")
    finish(world, 60)
    world.control.idle_models.forget("gone")
    if when == "it is gone":
        report()
    world.models.append((shape("gone", experts=2, layers=1), True))
    world.on_disk.add("gone")
    world.control.add_model(world.models[-1][0], on_disk=True, fits=True)
    if when != "it is gone":
        report()
    finish(world, 60)
    assert world.control.at_target
    assert held_models(world) == {"m", "gone"}


def test_constraints_on_a_model_leave_with_it() -> None:
    world = with_two()
    control, key = world.control, ExpertKey("gone", 0, 0)
    wanted = with_pin(control.constraints, key, "h0")
    wanted = with_min_replicas(wanted, ExpertKey("m", 0, 1), 2, control.view.hosts)
    control.set_constraints(wanted)
    finish(world)
    remove(world, "gone")
    assert not control.constraints.pins
    assert control.constraints.min_replicas == {ExpertKey("m", 0, 1): 2}


def test_updates_of_a_model_leave_with_it_also_for_a_later_controller() -> None:
    """Nobody has stored the updates since; the model comes again as its files say."""
    world = with_two()
    key = ExpertKey("gone", 0, 0)
    world.update([key], in_file=False)
    finish(world)
    world.serve("gone")
    finish(world)
    assert world.control.view.versions.of(key) > 1
    remove(world, "gone")
    finish(world, 60)
    assert held_models(world) == {"m"}
    world.take_over()
    finish(world)
    world.models.append((shape("gone", experts=6, layers=3), True))
    world.on_disk.add("gone")
    world.control.add_model(world.models[-1][0], on_disk=True, fits=True)
    finish(world, 60)
    assert not world.control.missing()


def test_another_policy_counts_from_now_on() -> None:
    world = with_two()
    control: Control = world.control
    policy = replace(POLICY, every_s=77.0, lease_s=9.0, host_timeout_s=3.0, retry_s=5.0)
    follow(control, policy)
    assert (control.rebalance_timer.every_s, control.publisher.lease_s) == (77.0, 9.0)
    assert control.view.host_timeout_s == 3.0
    finish(world)
    assert control.at_target


@settings(max_examples=tries(40), deadline=None, derandomize=True)
@given(data=st.data())
def test_models_come_and_go_in_any_order_and_the_others_stay_placed(data: st.DataObject) -> None:
    world = ControlWorld(3, [(shape("m", replicas=2), True)])
    finish(world)
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        step = data.draw(st.sampled_from(["comes", "goes", "traffic", "kill", "waits"]))
        there = {one.model for one, _ in world.models}
        name = data.draw(st.sampled_from(["a", "b"]))
        if step == "comes" and name not in there | held_models(world):
            one = shape(name, experts=data.draw(st.integers(1, 5)))
            world.control.idle_models.forget(name)
            world.models.append((one, True))
            world.on_disk.add(name)
            world.control.add_model(one, on_disk=True, fits=True)
        elif step == "goes" and name in there:
            remove(world, name)
        elif step == "traffic":
            world.report("r0", counts(world, data.draw(st.integers(0, 5))))
        elif step == "kill":
            host = data.draw(st.sampled_from(sorted(world.hosts)))
            if sum(one.alive for one in world.hosts.values()) == len(world.hosts):
                world.kill(host)
        finish(world, data.draw(st.integers(0, 20)))
        for name in world.hosts:
            world.restart(name)
        placed = world.control.placement
        assert placed is not None
        assert {0, 1} <= {key.layer for key in placed.layers if key.model == "m"}
    finish(world, 80)
    assert held_models(world) == {one.model for one, _ in world.models}
    assert not world.lost()
