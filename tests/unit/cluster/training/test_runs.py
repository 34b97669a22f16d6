"""Training runs in the controller: leases, the versions that they bring, and what follows them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import ExpertKey, ExpertVersion
from moesaic.cluster.placement import VersionChange
from moesaic.cluster.planner.plan import OperatorConstraints, PoolHost
from moesaic.cluster.training.runs import RUN_LEASE_S
from moesaic.proto.errors import ClusterError, Superseded
from tests.helpers.cluster.control_world import POLICY
from tests.helpers.cluster.training_world import TrainingWorld
from tests.helpers.effort import tries

FIRST, OTHER = ExpertKey("m", 0, 0), ExpertKey("m", 1, 2)


# ---- the run ------------------------------------------------------------------------------------


def test_one_run_trains_at_a_time_and_numbers_go_on() -> None:
    world = TrainingWorld()
    first = world.begin("ann")
    assert (first.run, first.next_version) == (1, 2)
    world.now += 7.0
    with pytest.raises(ClusterError, match=r"run 1 \(ann\) that trains m lives, since 7 s"):
        world.begin("bob")
    world.control.training.end(first.run)
    second = world.begin("bob")
    assert (second.run, second.next_version) == (2, 3), "run 1 may have brought version 2 to hosts"
    with pytest.raises(Superseded, match=r"run 1 was followed by run 2 \(bob\)"):
        world.control.training.renew(1, world.now)
    world.control.training.end(1)
    assert world.alive is second, "an older run ends no newer one"


def test_a_run_lives_as_long_as_it_is_heard() -> None:
    world = TrainingWorld()
    run = world.begin()
    for _ in range(4):
        world.rounds(RUN_LEASE_S - 1.0)
        world.control.training.renew(run.run, world.now)
    world.rounds(RUN_LEASE_S + 1.0)
    assert world.control.training.alive is None
    assert world.control.training.expired
    with pytest.raises(ClusterError, match="run 1 does not live: nothing was heard of it"):
        world.control.training.renew(run.run, world.now)


def test_a_controller_that_was_frozen_ends_no_run_that_it_could_not_hear() -> None:
    world = TrainingWorld()
    world.begin()
    world.tick(seconds=3 * RUN_LEASE_S)
    assert world.control.training.alive is not None
    world.rounds(RUN_LEASE_S)
    assert world.control.training.alive is None


def test_what_cannot_be_trained_now() -> None:
    world = TrainingWorld(replicas=1)
    with pytest.raises(ClusterError, match=r"model 'm': it is not placed yet"):
        world.control.training.begin("m", {}, who="me", unix_s=0.0, now=world.now)
    world.update([FIRST], in_file=False)
    with pytest.raises(ClusterError, match="an update of its weights is under way"):
        world.begin()
    world.rounds(3.0)
    world.serve("m")
    world.rounds(POLICY.lease_s)
    (holder,) = [name for name, host in world.hosts.items() if ExpertVersion(FIRST, 2) in host.held]
    world.kill(holder)
    world.restart(holder)
    world.rounds(POLICY.lease_s)
    with pytest.raises(ClusterError, match="no host holds expert 0 of layer 0 of m"):
        world.begin()
    assert world.control.training.last_run == 0, "a refusal begins nothing"


def test_no_update_touches_a_model_while_a_run_trains_it() -> None:
    world = TrainingWorld()
    world.update([FIRST], in_file=False)
    world.rounds(3.0)
    world.serve("m")
    run = world.begin()
    for refused in (
        lambda: world.control.updates.begin("m", [FIRST], who="t", until=1e9),
        lambda: world.control.updates.begin_revert("m", who="t", until=1e9),
    ):
        with pytest.raises(ValueError, match=r"models\.m: run 1 trains it"):
            refused()
    world.control.training.end(run.run)
    assert world.control.updates.begin("m", [FIRST], who="t", until=1e9).number == 4


def test_a_new_controller_goes_on_with_the_run() -> None:
    world = TrainingWorld()
    run = world.begin("ann")
    version = world.step()
    world.own("h0", 3)
    world.take_over()
    world.rounds(POLICY.lease_s * 2)
    assert (world.alive.run, world.alive.who, world.alive.steps) == (run.run, "ann", 1)
    assert world.alive.next_version == version + 1
    assert world.hosts["h0"].owned == 3, "it lives, so nothing of it ends"
    with pytest.raises(ValueError, match="run 1 trains it"):
        world.control.updates.begin("m", [FIRST], who="t", until=1e9)
    world.step()
    world.rounds(RUN_LEASE_S)
    assert world.control.training.alive is None
    assert world.hosts["h0"].owned == 0
    assert world.begin().run == 2


# ---- its versions -------------------------------------------------------------------------------


def test_a_version_is_served_in_the_round_that_finds_it_everywhere() -> None:
    world = TrainingWorld()
    world.begin()
    before = world.published[-1]
    version = world.commit({"h0"})
    asked = world.publish(version)
    for _ in range(3):
        world.tick()
    assert asked.under_way, "h1 lacks it"
    assert world.published[-1] is before
    world.commit()
    world.tick()
    assert asked.served
    after = world.published[-1]
    assert after.versions.models == {"m": version}
    assert after.layers is before.layers
    assert isinstance(world.control.publisher.news(before.id), VersionChange)
    assert world.publish(version).served, "the answer was lost, and it asks again"


def test_the_version_before_goes_when_routers_have_acknowledged_and_nothing_else_happens() -> None:
    world = TrainingWorld()
    world.begin()
    world.rounds(POLICY.lease_s)
    asked = world.publish(world.commit())
    world.tick(seconds=0.01)
    assert asked.served
    assert world.control.training.old_versions() == {1}
    assert world.versions("h0", FIRST) == [1, 2]
    assert not world.control.is_quiet(world.now), "the next tick comes soon"
    world.report("r0")
    world.tick(seconds=0.01)
    assert world.versions("h0", FIRST) == [1, 2], "r1 may still ask for it"
    world.report("r1")
    world.tick(seconds=0.01)
    assert world.versions("h0", FIRST) == world.versions("h1", FIRST) == [2]
    assert world.control.training.old_versions() == frozenset()


def test_a_version_that_is_skipped_is_never_served_and_its_memory_is_freed() -> None:
    world = TrainingWorld()
    run = world.begin()
    first = world.commit()
    world.control.training.skip(run.run, first)
    world.control.training.skip(run.run, first)  # its answer was lost
    with pytest.raises(ClusterError, match=f"version {first} of m: the next one of run 1 is"):
        world.publish(first)
    world.rounds(POLICY.lease_s)
    assert world.versions("h0", FIRST) == [1]
    asked = world.publish(world.commit())
    world.rounds(1.0)
    assert asked.served
    assert asked.version == first + 1


def test_a_training_step_replaces_updates_of_single_experts() -> None:
    world = TrainingWorld()
    world.update([FIRST], in_file=True)
    world.rounds(3.0)
    world.serve("m")
    world.rounds(3.0)
    assert world.begin().next_version == 3
    assert world.step() == 3
    placed = world.published[-1].versions
    assert (placed.of(FIRST), placed.of(OTHER)) == (3, 3)
    assert not placed.experts
    world.control.training.end(1)
    with pytest.raises(ValueError, match="no update of its weights is in effect"):
        world.control.updates.begin_revert("m", who="t", until=1e9)
    number = world.control.updates.begin("m", [FIRST], who="t", until=1e9).number
    assert number == 5, "the run may have brought 4"


def test_at_the_deadline_those_that_have_it_suffice_and_the_others_load_it() -> None:
    world = TrainingWorld(3, replicas=2)
    world.begin()
    version = world.commit({"h0", "h1"})
    asked = world.publish(version, timeout_s=2.0)
    while asked.under_way:
        world.tick()  # no host loads anything
        for host in world.hosts.values():
            host.loading.clear()
    assert asked.served
    for layer in world.published[-1].layers.values():
        assert all(replicas for replicas in layer.replicas)
        assert not {r.host for replicas in layer.replicas for r in replicas} & {"h2"}
    world.rounds(10.0)
    wanted = world.control.wanted("h2")
    assert wanted
    assert all(world.versions("h2", key) == [version] for key in wanted)


def test_a_replica_that_the_run_did_not_renew_loads_the_version_before_it_is_served() -> None:
    world = TrainingWorld()
    world.begin()
    asked = world.publish(world.commit({"h0"}), timeout_s=20.0)
    world.rounds(3.0)
    assert asked.served
    layers = world.published[-1].layers.values()
    assert all(len(replicas) == 2 for layer in layers for replicas in layer.replicas)


def test_a_version_that_no_host_has_of_some_expert_is_not_served() -> None:
    world = TrainingWorld(2, replicas=1)
    world.begin()
    asked = world.publish(world.commit({"h0"}), timeout_s=2.0)
    world.rounds(4.0)
    assert not asked.served
    assert "version 2 of m: no host has it of expert" in asked.error
    assert world.published[-1].versions.of(FIRST) == 1
    # The same may be tried again.
    again = world.publish(world.commit(), timeout_s=2.0)
    world.tick()
    assert again.served


def test_a_host_that_dies_is_not_waited_for() -> None:
    world = TrainingWorld()
    world.begin()
    asked = world.publish(world.commit({"h0"}))
    world.kill("h1")
    world.tick()
    assert asked.served


def test_an_expert_without_a_host_is_waited_for_until_the_deadline() -> None:
    world = TrainingWorld(2, replicas=1)
    world.begin()
    asked = world.publish(world.commit(), timeout_s=1.0)
    world.kill("h1")
    world.tick()
    assert asked.under_way, "the host may come back"
    world.tick(seconds=1.0)
    assert "no host has it of expert" in asked.error


def test_only_the_next_number_is_published() -> None:
    world = TrainingWorld()
    world.begin()
    for wrong in (1, 3):
        with pytest.raises(ClusterError, match=rf"version {wrong} of m: the next one of .* is 2"):
            world.publish(wrong)


def test_versions_that_arrive_stay_however_long_it_takes_and_go_with_their_run() -> None:
    world = TrainingWorld()
    run = world.begin()
    version = world.commit()
    for _ in range(10):
        world.rounds(RUN_LEASE_S / 2)
        world.control.training.renew(run.run, world.now)
    assert world.versions("h0", FIRST) == [1, version]
    asked = world.publish(version, timeout_s=1e9)
    world.control.training.end(run.run)
    assert "run 1 does not live" in asked.error
    world.rounds(2.0)
    assert world.versions("h0", FIRST) == [1]
    assert world.published[-1].versions.of(FIRST) == 1


def test_what_an_earlier_run_left_is_neither_served_nor_kept() -> None:
    world = TrainingWorld()
    world.begin()
    left = world.commit()
    world.control.training.end(1)
    begun = world.begin()
    assert begun.next_version > left
    world.rounds(POLICY.lease_s + 1.0)
    assert world.versions("h0", FIRST) == [1]
    world.step()


# ---- replicas that come while it trains ---------------------------------------------------------


def drain(world: TrainingWorld, *names: str) -> None:
    world.constraints = OperatorConstraints(leaving=frozenset(names))
    world.control.set_constraints(world.constraints)


def test_a_new_replica_is_loaded_at_the_served_version_from_a_peer() -> None:
    world = TrainingWorld(2, replicas=1)
    world.begin()
    version = world.step()
    drain(world, "h1")
    world.rounds(5.0)
    assert not world.hosts["h1"].held
    assert all(world.versions("h0", key) == [version] for key in world.every())


def test_a_replica_whose_version_changes_while_it_loads_is_loaded_again() -> None:
    """The peer may have evicted the version: that is no failure of the host's."""
    world = TrainingWorld(2, replicas=1)
    world.begin()
    world.step()
    drain(world, "h1")
    for _ in range(3):
        while not world.hosts["h0"].loading:
            world.tick()
        one, peer = world.hosts["h0"].loading[0]
        assert peer is not None
        published = world.publish(world.commit())
        while one in world.hosts["h1"].held:
            world.tick(seconds=0.1)
            for name in world.routers:
                world.report(name)
        assert published.served
        world.load_one("h0")
        assert not world.hosts["h0"].loading, "the peer has evicted it"
    assert not [one for one in world.control.changes.all if one.errors]
    world.rounds(10.0)
    served = world.published[-1].versions.of(FIRST)
    assert all(world.versions("h0", key) == [served] for key in world.every())


def test_a_host_that_restarts_has_the_served_version_from_a_peer() -> None:
    world = TrainingWorld()
    world.begin()
    version = world.step()
    world.kill("h1")
    world.restart("h1")
    world.rounds(3.0)
    assert all(world.versions("h1", key) == [version] for key in world.every())


# ---- afterwards ---------------------------------------------------------------------------------


def test_a_trained_model_never_sleeps_and_is_volatile() -> None:
    world = TrainingWorld(idle_s=10.0)
    run = world.begin()
    world.rounds(20.0)
    assert not world.control.idle_models.asleep, "a run trains it"
    world.control.training.renew(run.run, world.now)
    assert world.control.weights.volatile(world.control.models["m"]) == []
    version = world.step()
    world.control.training.end(run.run)
    world.rounds(20.0)
    assert not world.control.idle_models.asleep, "no file has its weights"
    assert world.control.weights.volatile(world.control.models["m"]) == [
        ExpertVersion(key, version) for key in sorted(world.every())
    ]
    for name in world.hosts:
        world.kill(name)
        world.restart(name)
    world.rounds(3.0)
    lost = f"lost: only hosts' memory had version {version}"
    assert world.control.missing() == dict.fromkeys(sorted(world.every()), lost)


def test_a_model_that_was_not_changed_sleeps_after_its_run() -> None:
    world = TrainingWorld(idle_s=10.0)
    world.begin()
    world.control.training.end(1)
    world.rounds(20.0)
    assert world.control.idle_models.asleep == {"m"}


def test_hosts_forget_a_run_that_does_not_live_when_they_answer_again() -> None:
    world = TrainingWorld(3)
    world.begin()
    for name in world.hosts:
        world.own(name)
    world.control.training.end(1)
    world.tick(late=frozenset({"h2"}))
    assert [world.hosts[name].run for name in ("h0", "h1", "h2")] == [0, 0, 1]
    world.begin()
    world.own("h0")
    world.tick()
    assert [world.hosts[name].run for name in ("h0", "h1", "h2")] == [2, 0, 0]


def test_a_drained_host_waits_until_the_run_has_taken_what_it_owns() -> None:
    world = TrainingWorld(3, replicas=1)
    world.begin()
    world.own("h1", 7)
    drain(world, "h1")
    world.rounds(5.0)
    assert not world.hosts["h1"].held
    assert not world.control.view.empty("h1")
    assert world.control.drain_obstacles() == {
        "h1": "owns 7 tensors of the run that trains m; the run hands them over between steps"
    }
    assert not world.control.drain_blockers(), "it is not for want of room"
    world.own("h1", 0)
    world.rounds(1.0)
    assert world.control.view.empty("h1")
    assert not world.control.drain_obstacles()


# ---- any history --------------------------------------------------------------------------------

KINDS = (
    *("tick",) * 6,
    *("load",) * 3,
    *("report",) * 3,
    *("begin", "commit", "commit", "commit some", "publish", "publish", "renew", "end"),
    *("own", "kill", "restart", "restart", "drain", "update", "serve", "take over", "silence"),
)


@settings(max_examples=tries(200), deadline=None, derandomize=True)
@given(data=st.data())
def test_any_history_serves_one_content_under_each_number_and_ends_whole(
    data: st.DataObject,
) -> None:
    """`ControlWorld` and `TrainingWorld` check each round; this checks what remains."""
    hosts = data.draw(st.integers(1, 3), label="hosts")
    replicas = data.draw(st.integers(1, hosts), label="replicas")
    world = TrainingWorld(hosts, replicas=replicas, experts=2, layers=1)
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        kind = data.draw(st.sampled_from(KINDS))
        name = data.draw(st.sampled_from(sorted(world.hosts)))
        trains = world.control.training.alive is not None
        if kind == "tick":
            late = data.draw(st.frozensets(st.sampled_from(sorted(world.hosts)), max_size=1))
            world.tick(late, data.draw(st.sampled_from([0.2, 1.0, 3.0])))
        elif kind == "load":
            world.load_one(name)
        elif kind == "report":
            world.report(data.draw(st.sampled_from(sorted(world.routers))))
        elif kind == "update":
            world.try_to_update()
        elif kind == "serve":
            world.serve("m")
        elif kind in ("kill", "restart"):
            getattr(world, kind)(name)
        elif kind == "drain":
            drain(world, *({name} if hosts > 1 and data.draw(st.booleans()) else ()))
        elif kind == "take over":
            world.take_over()
        elif kind == "silence":
            for _ in range(8):
                world.tick(seconds=5.0)
        elif kind in ("begin", "renew"):
            world.try_to(kind)
        elif trains:
            if kind == "end":
                world.control.training.end(world.alive.run)
                world.keep_updates()
            elif kind == "own":
                world.own(name, data.draw(st.integers(0, 2)))
            elif kind == "publish":
                world.try_to(kind)
            else:
                world.commit(None if kind == "commit" else {name})
    world.control.training.end(world.control.training.last_run)
    world.settle()
    placement = world.control.placement
    assert placement is not None
    served = placement.versions
    numbers = [p.versions.of(key) for p in world.published for key in world.every()]
    assert all(version >= 1 for version in numbers)
    held = {(one, name) for name, host in world.hosts.items() for one in host.held}
    named = {
        (served.served(key.expert(expert)), replica.host)
        for key, layer in placement.layers.items()
        for expert, replicas_ in enumerate(layer.replicas)
        for replica in replicas_
    }
    assert held == named, "nothing is held that is not served"
    assert {one.key for one, _ in named} == world.every() - world.lost()
    assert not {host.run for host in world.hosts.values()} - {0}, "no host keeps a run that ended"


def test_a_pool_with_a_new_host_gives_it_experts_though_it_owns_something_first() -> None:
    world = TrainingWorld(2, replicas=1)
    world.begin()
    host = PoolHost(name="h2", slots=None)
    world.control.members.add(host)
    world.pool.append(host)
    world.hosts["h2"] = type(world.hosts["h0"])("h2")
    world.own("h2", 2)
    world.control.loads.assignments_per_busy_s = lambda *_: 1e6  # type: ignore[method-assign]
    world.rounds(5.0)
    assert world.hosts["h2"].held
