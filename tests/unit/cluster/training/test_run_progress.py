"""What a run tells of itself, and what the controller plans with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesaic.cluster.expert_keys import SHARED, TRUNK, ExpertKey, LayerKey
from moesaic.cluster.load.training_times import TrainingTimes
from moesaic.cluster.training.contributions import Attempt
from moesaic.cluster.training.host_memory import TrainedBytes
from moesaic.cluster.training.progress import HostOwns, RunParts, RunProgress, RunTelling
from moesaic.cluster.training.run_plan import RunPlan, Trained
from moesaic.cluster.training.step_bytes import GRPC_BYTES_PER_S, SHARED_BYTES_PER_S
from tests.helpers.cluster.training_world import TrainingWorld

SMALL = TrainedBytes(200, 400, 400, 400, 800)
BLOCK = TrainedBytes(0, 0, 0, 100, 200)
LARGE = TrainedBytes(400, 800, 800, 800, 1600)
PLAN = RunPlan(
    run=1,
    model="m",
    optimizer="AdamW",
    settings={},
    tensors={
        ExpertKey("m", 0, 0): Trained(groups={}, memory=SMALL),
        ExpertKey("m", 0, 2): Trained(groups={}, memory=LARGE),  # expert 1 is frozen
        ExpertKey("m", 1, 0): Trained(groups={}, memory=SMALL),
        ExpertKey("m", 0, SHARED): Trained(groups={}, memory=BLOCK),
        ExpertKey("m", TRUNK, 0): Trained(groups={}, memory=BLOCK),
    },
    redundancy=1,
)
OWNERS = {
    ExpertKey("m", 0, 0): ("a", "b"),
    ExpertKey("m", 0, 2): ("a", "b"),
    ExpertKey("m", 1, 0): ("b",),
    ExpertKey("m", 0, SHARED): ("a", "b"),
    ExpertKey("m", TRUNK, 0): ("a",),
}


def test_owners_by_layer_and_what_they_keep_by_host() -> None:
    found = RunParts.of(PLAN, OWNERS)
    assert found.redundancy == 1
    assert found.owners == {
        LayerKey("m", 0): (("a", "b"), (), ("a", "b")),
        LayerKey("m", 1): (("b",),),
    }
    assert found.owners[LayerKey("m", 0)][0] is found.owners[LayerKey("m", 0)][2]
    # Master, gradient and state; 16 bytes for each of 100, 200 and 25 parameters.
    assert found.owned == {
        "a": HostOwns(4, 1600 + 3200 + 2 * 400),
        "b": HostOwns(4, 1600 + 3200 + 1600 + 400),
    }
    assert found.largest == LARGE


def test_a_pace_is_the_mean_of_the_last_steps_and_parts_are_made_once() -> None:
    steps: Any = SimpleNamespace(plan=PLAN, owners=OWNERS, attempt=Attempt(1, 0, 2), unprotected=3)
    telling = RunTelling(steps)
    first = telling.progress(2)
    assert first[:5] == (2, 2, 3, None, None)
    telling.began(10.0)
    telling.summed(600)
    assert telling.progress(2)[3:5] == (None, None)
    telling.stepped(13.0)
    assert telling.progress(2)[3:5] == (3.0, 200.0)
    for step in range(8):
        telling.summed(100)
        telling.stepped(14.0 + step)
    told = telling.progress(2)
    assert told[3:5] == (1.0, 100.0)
    assert told.parts is first.parts
    steps.owners = dict(OWNERS)
    assert telling.progress(2).parts is not first.parts


def test_times_go_on_over_restarts_and_what_was_before_does_not_count() -> None:
    times = TrainingTimes()
    times.note("a", 1, 100.0, 10.0)
    times.note("a", 1, 101.0, 12.0)
    assert times.of("a") == 3.0
    times.note("a", 2, 5.0, 1.0)
    assert (times.backward_s["a"], times.owner_s["a"]) == (6.0, 3.0)
    times.forget("a")
    times.note("a", 1, 50.0, 0.0)
    assert times.of("a") == 9.0
    assert times.of("b") == 0.0


# ---- in the controller ---------------------------------------------------------------------------


def training(*, step_s: float | None = 2.0) -> TrainingWorld:
    world = TrainingWorld(2, replicas=1)
    run = world.begin()
    parts = RunParts(
        redundancy=1,
        owners={LayerKey("m", 0): (("h0",), ("h1",))},
        owned={"h0": HostOwns(1, 1600)},
        largest=SMALL,
    )
    told = RunProgress(1, 1, 0, step_s, 100.0, parts)
    world.control.training.renew(run.run, world.now, told)
    return world


def test_plans_count_what_a_run_tells_from_its_first_step_on() -> None:
    assert TrainingWorld().control.plan_for(0.0).upkeep is None
    assert training(step_s=None).control.plan_for(0.0).upkeep is None
    world = training()
    found = world.control.plan_for(world.now).upkeep
    assert found is not None
    # Two owners fetch the gradient, and the weights come back.
    assert (found.elsewhere_bytes, found.at_owner_bytes) == (2 * 400 + 200, 400)
    assert found.step_s == 2.0
    assert found.bytes_per_s == SHARED_BYTES_PER_S
    busy_EH = found.busy(LayerKey("m", 0), 3, ["h0", "h1"])
    assert busy_EH is not None
    dear, cheap = 1000 / SHARED_BYTES_PER_S / 2, 400 / SHARED_BYTES_PER_S / 2
    assert np.allclose(busy_EH, [[cheap, dear], [dear, cheap], [dear, dear]], atol=0)
    assert found.busy(LayerKey("other", 0), 3, ["h0"]) is None
    world.hosts["h1"].node = "another"
    world.rounds(1.0)
    found = world.control.plan_for(world.now).upkeep
    assert found is not None
    assert found.bytes_per_s == GRPC_BYTES_PER_S
    world.control.training.end(1)
    assert world.control.plan_for(world.now).upkeep is None


def test_backward_halves_make_hosts_slower_for_plans() -> None:
    world = training()
    world.report("r0", {LayerKey("m", 0): np.ones(3, dtype=np.int64)})  # 1000 in a second
    speed = world.control.plan_for(world.now).hosts[0].speed
    world.hosts["h0"].backward_s = 3.0
    world.rounds(1.0)
    assert world.control.plan_for(world.now).hosts[0].speed == pytest.approx(speed / 4)


def test_a_run_leaves_hosts_no_more_room_than_their_machines_have() -> None:
    world = training()
    expert_bytes = world.control.models["m"].expert_bytes
    wanted = {name: len(world.control.wanted(name)) for name in ("h0", "h1")}
    assert {host.memory_bytes for host in world.control.plan_for(world.now).hosts} == {None}
    for host in world.hosts.values():
        host.free_bytes = 8000  # for both: ten replicas of 800 bytes
    world.rounds(1.0)
    limits = {host.name: host.memory_bytes for host in world.control.plan_for(world.now).hosts}
    assert limits == {name: (count + 5) * expert_bytes for name, count in wanted.items()}
    assert wanted["h0"]
    world.control.training.end(1)
    assert {host.memory_bytes for host in world.control.plan_for(world.now).hosts} == {None}
