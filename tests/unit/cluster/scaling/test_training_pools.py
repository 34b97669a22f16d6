"""A pool follows the load of a training run, and keeps what the run's owners need."""

from __future__ import annotations

import pytest

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.meter import HostTimes, LoadReport
from moesaic.cluster.scaling.autoscaler import (
    Autoscaler,
    BusyMeter,
    GroupState,
    PoolLoad,
    ScalePolicy,
)
from moesaic.cluster.training.host_memory import TrainedBytes
from moesaic.cluster.training.progress import HostOwns, RunParts, RunProgress
from moesaic.cluster.training.room import TrainingHost, replicas_with_room, shortage_without
from tests.helpers.cluster.fleet_world import FleetWorld, group, stage, started

SCALE = ScalePolicy(up_after_s=5, down_after_s=20, cooldown_s=10)
# One version, a gradient, its sum, the master, the state: an expert of 100 parameters in bfloat16.
EXPERT = TrainedBytes(200, 400, 400, 400, 800)


class TrainingPool:
    """A fleet whose hosts work for a run."""

    def __init__(self, world: FleetWorld) -> None:
        self.world = world
        layers = {} if world.control.placement is None else world.control.placement.layers
        self.run = world.control.training.begin("m", layers, who="me", unix_s=0, now=world.now)
        self.step_s: float | None = None
        self.redundancy = 0

    @property
    def hosts(self) -> int:
        return len(self.world.hosts)

    def work(
        self, seconds: int, *, backward: float = 0.0, owner: float = 0.0, lent: float = 0.0
    ) -> None:
        """Let every host work for these parts of the time; the run goes on telling of itself."""
        world = self.world
        for _ in range(seconds):
            for host in world.hosts.values():
                host.backward_s += backward
                host.owner_s += owner
            if world.control.training.alive is not None:
                world.control.training.renew(self.run.run, world.now, self.tells())
            world.tick(seconds=1.0)
            for name in world.routers:
                world.report(name)
            times = {name: HostTimes(lent_s=lent) for name in world.hosts}
            number = world.published[-1].id
            world.control.hear(LoadReport(router="r0", placement_id=number, hosts=times), world.now)
            for name, host in list(world.hosts.items()):
                while host.loading:
                    world.load_one(name)

    def tells(self) -> RunProgress:
        owned = {name: HostOwns(1, 1600) for name in self.world.hosts}
        parts = RunParts(redundancy=self.redundancy, owners={}, owned=owned, largest=EXPERT)
        return RunProgress(1, 1, 0, self.step_s, None, parts)


def pool(hosts: int = 2, **more: object) -> TrainingPool:
    found = TrainingPool(started(group(hosts, **more)))
    found.world.fleet.autoscaler.follow(SCALE)
    return found


@pytest.mark.parametrize(
    "load", [{"backward": 0.9}, {"owner": 0.9}, {"lent": 0.9}, {"backward": 0.6, "owner": 0.3}]
)
def test_a_pool_grows_with_what_hosts_do_for_a_run_and_shrinks_when_that_ends(
    load: dict[str, float],
) -> None:
    trained = pool(2, min_count=2)
    trained.step_s = 4.0
    trained.work(14, **load)
    assert trained.hosts == 4
    assert "busy, above 75%" in trained.world.fleet.scalings.all[-1].why
    trained.work(60, **{kind: part / 2 for kind, part in load.items()})
    assert trained.hosts == 4
    trained.world.control.training.end(trained.run.run)
    trained.work(200)
    assert trained.hosts == 2


def test_before_the_first_step_is_done_nothing_is_known() -> None:
    trained = pool(3)
    trained.work(100)
    trained.work(100, backward=0.9)
    assert trained.hosts == 3
    assert trained.world.fleet.autoscaler.held == "the training run has not done a step yet"
    trained.step_s = 4.0
    trained.work(20, backward=0.9)
    assert trained.hosts > 3


def test_a_part_of_a_step_is_neither_a_busy_nor_an_idle_time() -> None:
    trained = pool(3)
    trained.step_s = 100.0
    for _ in range(4):
        trained.work(50, backward=0.9)
        trained.work(50)  # the trunk computes, or a checkpoint is written
    assert trained.hosts == 3
    # What lasts for whole steps counts.
    trained.work(300)
    assert trained.hosts < 3


def test_a_run_that_lasts_for_as_long_as_its_steps_is_all_that_is_waited_for() -> None:
    scaler = Autoscaler(SCALE)
    groups = [GroupState(min_count=1, max_count=4, cost_per_hour=1, speed=1, up=2)]
    decided = [
        now
        for now in range(100)
        if scaler.decide(groups, PoolLoad(0.1, 0.0), float(now), step_s=30.0)
    ]
    assert decided[0] == 60


def test_calls_that_wait_are_helped_within_a_step() -> None:
    scaler = Autoscaler(SCALE)
    groups = [GroupState(min_count=1, max_count=4, cost_per_hour=1, speed=1, up=2)]
    load = PoolLoad(0.5, 3.0)
    decided = [now for now in range(100) if scaler.decide(groups, load, float(now), step_s=90.0)]
    assert decided[0] == SCALE.up_after_s


def test_hosts_stay_whose_owned_tensors_the_others_have_no_memory_for() -> None:
    trained = pool(2, min_count=1)
    trained.step_s = 1.0
    for host in trained.world.hosts.values():
        host.free_bytes = 2000
    trained.work(100)
    assert trained.hosts == 2
    held = trained.world.fleet.autoscaler.held
    assert "the others take over 0.0 GB that the training run keeps there" in held
    with pytest.raises(ValueError, match="count: 1 hosts of group 0 are too few: the others take"):
        trained.world.scale(1)
    for host in trained.world.hosts.values():
        host.free_bytes = 10**6
    trained.work(60)
    assert trained.hosts == 1


def test_a_run_keeps_as_many_failure_domains_as_it_wants() -> None:
    trained = pool(2, min_count=1)
    trained.step_s, trained.redundancy = 1.0, 1
    trained.work(100)
    assert trained.hosts == 2
    with pytest.raises(ValueError, match="redundancy 1, which needs 2 failure domains"):
        trained.world.scale(1)


def test_a_host_that_owns_tensors_is_waited_for() -> None:
    trained = pool(2, min_count=1)
    trained.step_s = 1.0
    for name, host in trained.world.hosts.items():
        host.run, host.owned = trained.run.run, 3
        assert name in trained.world.fleet.desired()
    trained.work(60)
    assert trained.hosts == 2
    assert stage(trained.world) == "draining"
    (leaving,) = trained.world.fleet.retired()
    trained.world.hosts[leaving].owned = 0  # the run has handed it over
    trained.work(10)
    assert trained.hosts == 1


# ---- the parts -----------------------------------------------------------------------------------


def test_times_of_hosts_count_beside_those_of_routers() -> None:
    meter, trained_s = BusyMeter(), {"a": 10.0}
    totals = {"a": HostTimes(busy_s=1.0)}
    assert meter.measure(totals, {"a": 1.0}, 0.0, trained_s.__getitem__) is None
    totals["a"].busy_s, totals["a"].lent_s, trained_s["a"] = 2.0, 1.0, 12.0
    assert meter.measure(totals, {"a": 1.0}, 8.0, trained_s.__getitem__) == PoolLoad(0.5, 0.0)


def parts(redundancy: int = 0) -> RunParts:
    owned = {"a": HostOwns(2, 3200), "b": HostOwns(1, 1600)}
    owners = {LayerKey("m", 0): (("a",), ("a",), ("b",))}
    return RunParts(redundancy=redundancy, owners=owners, owned=owned, largest=EXPERT)


def test_room_is_shared_by_the_hosts_of_a_machine() -> None:
    # A replica keeps two versions and a gradient: 800 bytes.
    hosts = {
        "a": TrainingHost("n", "a", 8000),
        "b": TrainingHost("n", "b", 7999),
        "c": TrainingHost("o", "c", 799),
        "d": TrainingHost("p", "d", None),
    }
    assert replicas_with_room(parts(), hosts) == {"a": 5, "b": 4, "c": 0}


def test_what_leaves_has_to_fit_beside_what_is_there() -> None:
    one = {"b": TrainingHost("n", "b", 4800)}
    # What `a` owns, 3,200 bytes, and two replicas of 800.
    assert shortage_without(parts(), {"a"}, 2, one) == ""
    assert "go to the machine of b" in shortage_without(parts(), {"a"}, 3, one)
    two = one | {"c": TrainingHost("o", "c", None)}
    assert shortage_without(parts(), {"a"}, 4, two) == ""
    assert shortage_without(parts(), {"a"}, 0, {}) == "no host would be left"
    assert "redundancy 1" in shortage_without(parts(1), {"a"}, 0, one)
    assert shortage_without(parts(1), {"a"}, 0, two) == ""
