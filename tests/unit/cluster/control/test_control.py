"""The controller's state machine under random deaths, late reports, slow loads, slow routers,
shifting traffic and operators' constraints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.control import ControlPolicy
from moesaic.cluster.control.host_speed import SILENT
from moesaic.cluster.control.loading import Loader
from moesaic.cluster.placement import ExpertKey, LayerKey, Placement, PlacementId
from moesaic.cluster.planner.plan import OperatorConstraints, PoolHost
from moesaic.cluster.reports.placing import ChangePhase
from tests.helpers.control_world import POLICY, ControlWorld, counts, shape


def test_a_budget_in_bytes_is_as_many_replicas_as_are_sure_to_fit() -> None:
    models = [replace(shape("m"), expert_bytes=300), replace(shape("n"), expert_bytes=1000)]
    assert ControlPolicy(budget=0.5).moves(100, models) == 50
    assert ControlPolicy(budget_bytes=4999).moves(100, models) == 4
    assert ControlPolicy(budget_bytes=999).moves(100, models) == 1
    assert ControlPolicy(budget_bytes=999).moves(100, models[:1]) == 3
    world = ControlWorld(2, [(models[0], True)], policy=replace(POLICY, budget_bytes=700))
    world.tick()
    for name in world.hosts:
        while world.hosts[name].loading:
            world.load_one(name)
    world.report("r0", counts(world, 0))
    world.tick(seconds=2.0)
    world.tick(seconds=2.0)
    assert world.control.plan_for(world.now).policy.budget == 2


# ---- random histories ---------------------------------------------------------------------------

KINDS = (
    *("tick",) * 5,
    *("load",) * 4,
    *("report",) * 2,
    *("traffic",) * 2,
    *("fail", "kill", "restart", "restart", "constrain", "planner", "take over"),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_history_keeps_every_expert_served_and_ends_whole(data: st.DataObject) -> None:
    hosts = data.draw(st.integers(1, 4), label="hosts")
    counts_ = st.integers(1, hosts)
    models = [(shape("disk", replicas=data.draw(counts_), experts=3), True)]
    world = ControlWorld(hosts, models)
    world.tick()
    world.tick()
    if data.draw(st.booleans(), label="with a model in memory"):
        models.append((shape("memory", replicas=data.draw(counts_), experts=2, layers=1), False))
        world.put_models_in_memory()
    for _ in range(data.draw(st.integers(0, 60), label="steps")):
        kind = data.draw(st.sampled_from(KINDS))
        name = data.draw(st.sampled_from(sorted(world.hosts)))
        router = data.draw(st.sampled_from(sorted(world.routers)))
        if kind == "tick":
            late = data.draw(st.frozensets(st.sampled_from(sorted(world.hosts)), max_size=2))
            world.tick(late, data.draw(st.sampled_from([0.2, 1.0, 3.0])))
        elif kind == "load":
            world.load_one(name)
        elif kind == "report":
            world.report(router)
        elif kind == "traffic":
            world.report(router, counts(world, data.draw(st.integers(0, 5))))
        elif kind == "planner":
            world.planner_is_slow = not world.planner_is_slow
            world.answer()
        elif kind == "fail":
            world.fail_load(name)
        elif kind == "kill":
            world.kill(name)
        elif kind == "restart":
            world.restart(name)
        elif kind == "constrain":
            leaving = frozenset({name}) if hosts > 1 and data.draw(st.booleans()) else frozenset()
            world.constraints = OperatorConstraints(
                min_replicas={ExpertKey("disk", 0, 0): data.draw(counts_)}, leaving=leaving
            )
            world.control.set_constraints(world.constraints)
        else:
            world.take_over()
    world.settle()
    lost = world.lost()
    placement = world.control.placement
    assert placement is not None
    assert {h: e.incarnation for h, e in placement.hosts.items()} == {
        name: host.incarnation for name, host in world.hosts.items()
    }
    known = {key for key in world.every() if key.model in {k.model for k in placement.layers}}
    held = {(key, name) for name, host in world.hosts.items() for key in host.held if key in known}
    named = {
        (key.expert(expert), replica.host)
        for key, layer in placement.layers.items()
        for expert, replicas in enumerate(layer.replicas)
        for replica in replicas
    }
    assert held == named, "nothing is held that is not served"
    assert {key for key, _ in named} == known - lost
    assert not {name for _, name in named} & world.constraints.leaving
    assert not world.tick(), "a quiet pool needs no decision"


# ---- one thing at a time ------------------------------------------------------------------------


def started(hosts: int = 2, *, replicas: int = 2, **more: object) -> ControlWorld:
    world = ControlWorld(hosts, [(shape("m", replicas=replicas), True)], **more)  # pyright: ignore[reportArgumentType]
    policy = world.control.policy
    world.settle()
    world.control.policy = policy
    assert world.published
    return world


def finish(world: ControlWorld, rounds: int = 30, *, late: frozenset[str] = frozenset()) -> None:
    """Ticks, loads and routers' reports, with the balancer as the world's policy has it."""
    for _ in range(rounds):
        world.tick(late)
        for name in world.routers:
            world.report(name)
        for name, host in world.hosts.items():
            while host.loading:
                world.load_one(name)


def test_a_model_appears_when_every_expert_of_it_can_be_computed() -> None:
    world = ControlWorld(2, [(shape("m"), True)])
    world.tick()
    world.tick()
    for name in world.hosts:
        for _ in range(3):
            world.load_one(name)
    world.tick()
    assert world.published == []
    for name in world.hosts:
        world.load_one(name)
    world.tick()
    assert [tuple(p.id) for p in world.published] == [(1, 1)]


def test_nothing_is_planned_before_all_hosts_have_reported_or_are_given_up() -> None:
    world = ControlWorld(2, [(shape("m"), True)])
    world.kill("h1")
    assert not world.tick()
    assert not world.control.settled
    world.tick(seconds=POLICY.host_timeout_s + 1)
    assert world.control.settled
    assert len(world.control.wanted("h0")) == 8


def test_a_dead_host_leaves_the_placement_and_comes_back_with_its_new_incarnation() -> None:
    world = started()
    world.kill("h0")
    world.tick()
    assert set(world.published[-1].hosts) == {"h1"}
    assert len(world.control.unprotected()) == 8
    world.restart("h0")
    world.tick()
    assert world.published[-1].hosts["h0"].incarnation == 2
    assert world.published[-1].layers[LayerKey("m", 0)].hosts(0) == ("h1",), "not loaded yet"
    world.settle()
    assert world.control.unprotected() == []


def test_a_host_that_stays_away_is_planned_around() -> None:
    world = started(3, replicas=1)
    world.kill("h0")
    for _ in range(3):
        world.tick(seconds=POLICY.host_timeout_s)
    assert not world.control.wanted("h0")
    finish(world)
    assert not world.control.missing()


def shares_of(placement: Placement, host: str) -> list[float]:
    """Of each expert that stands on ``host``, the part that goes there."""
    return [
        share
        for layer in placement.layers.values()
        for replicas in layer.replicas
        for name, share in replicas
        if name == host
    ]


def test_a_silent_host_stays_in_the_placement_and_its_traffic_goes_to_others() -> None:
    """It may answer routers all the same, or come back at any moment: nothing moves at once."""
    world = started(3, replicas=2)
    before = world.published[-1]
    assert sum(shares_of(before, "h0")) > 1
    finish(world, late=frozenset({"h0"}))
    while_silent = world.published[-1]
    assert while_silent.hosts == before.hosts
    assert len(shares_of(while_silent, "h0")) == len(shares_of(before, "h0"))
    assert max(shares_of(while_silent, "h0")) < 1e-3
    assert not any(host.loading for host in world.hosts.values())
    finish(world)
    assert world.published[-1].layers == before.layers


def test_a_host_that_came_back_gets_traffic_when_it_has_loaded_most_of_its_experts() -> None:
    world = started(3, replicas=2)
    before = world.published[-1]
    world.kill("h0")
    world.tick()
    world.restart("h0")

    for _ in range(3):
        world.tick()
    assert len(world.hosts["h0"].loading) > 2
    assert world.control.speed_factors() == {"h0": SILENT}
    finish(world)
    assert world.control.speed_factors() == {}
    assert world.published[-1].layers == before.layers


def test_all_hosts_silent_at_once_change_nothing() -> None:
    world = started(3, replicas=2)
    before = len(world.published)
    for _ in range(5):
        assert not world.tick(frozenset(world.hosts))
    assert len(world.published) == before


def test_experts_in_memory_come_back_from_a_peer_or_are_named_as_lost() -> None:
    world = ControlWorld(2, [(shape("two", replicas=2), False), (shape("one"), False)])
    world.tick()
    world.put_models_in_memory()
    world.tick()
    gone = {key for key in world.control.wanted("h1") if key.model == "one"}
    world.kill("h1")
    world.tick()
    world.restart("h1")
    world.tick()
    assert {peer and peer.target for _, peer in world.hosts["h1"].loading} == {"h0@1"}
    world.settle()
    missing = world.control.missing()
    assert set(missing) == gone
    assert set(missing.values()) == {"lost: its model was in memory"}


def test_a_new_controller_serves_at_once_what_hosts_hold() -> None:
    world = started(3, replicas=1)
    world.kill("h2")
    lost = {key for key in world.every() if key in world.control.wanted("h2")}
    world.take_over()
    world.tick()
    assert world.published[-1].id.term != 2, "a model that is not whole does not appear"
    world.hosts["h0"].held |= lost
    world.tick()
    assert world.published[-1].id.term == 2
    assert not world.control.settled, "h2 may still come back"


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    world = started(slots=10)
    with pytest.raises(ValueError, match=r"models\.big\.replicas"):
        world.control.add_model(shape("big", replicas=3), on_disk=True)
    with pytest.raises(ValueError, match=r"models\.big: .* find no room"):
        world.control.add_model(shape("big", experts=40), on_disk=True)
    assert {key.model for host in world.hosts for key in world.control.wanted(host)} == {"m"}
    finish(world, 5)
    assert not world.tick()


def hot(world: ControlWorld) -> dict[LayerKey, np.ndarray]:
    return {LayerKey("m", layer): np.array([9000, 100, 100, 100]) for layer in range(2)}


def test_a_hot_expert_gets_a_replica_without_anybody_asking() -> None:
    world = started(2, replicas=1, slots=8)
    for _ in range(10):
        world.report("r0", hot(world))
        finish(world, 1)
    finish(world)
    placement = world.published[-1]
    assert set(placement.layers[LayerKey("m", 0)].hosts(0)) == {"h0", "h1"}
    change = world.control.changes.find(None)
    assert change is not None
    assert (change.who, change.phase) == ("balancer", ChangePhase.DONE)
    assert not world.control.pending()


def test_a_change_says_behind_its_end_what_it_brought() -> None:
    world = started(2, replicas=1, slots=8)
    for _ in range(40):
        world.report("r0", hot(world))
        finish(world, 1)
    change = world.control.changes.all[0]
    report = change.report(world.now, pending_moves=0)
    measured = report.measured
    assert measured is not None
    # One host had 9000 + 100 of 9300 assignments; halves are the best there is.
    assert measured.balancedness_unchanged.mean == pytest.approx(9300 / 2 / 9100, abs=1e-3)
    assert measured.balancedness_changed.mean == pytest.approx(1.0, abs=0.02)
    assert report.balancedness_predicted is not None
    assert measured.balancedness_changed.mean == pytest.approx(
        report.balancedness_predicted.mean, abs=0.02
    )
    assert measured.window_s >= POLICY.every_s
    # The world's reports name one host, with a thousand assignments every half second.
    assert measured.host_assignments_per_s_after == {"h0": 2000.0}


def test_a_change_without_load_behind_it_has_no_effect_to_show() -> None:
    world = started(2, replicas=1, slots=8)
    world.control.set_constraints(OperatorConstraints(min_replicas={ExpertKey("m", 0, 0): 2}))
    finish(world, 40)
    report = world.control.changes.all[0].report(world.now, pending_moves=5)
    assert (report.phase, report.measured) == ("done", None)
    assert report.pending_moves == 0, "what is pending now is not of a change that has ended"


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
    assert set(victim) <= world.hosts["h1"].held, "r1 still asks for them"
    pass_lease(world)
    world.report("r0")
    world.report("r1")
    world.tick()
    assert not world.hosts["h1"].held


def test_a_silent_router_holds_evictions_up_no_longer_than_its_lease() -> None:
    world = started(2, replicas=1)
    pass_lease(world)
    world.report("r1")
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1"})))
    for _ in range(4):
        world.tick(seconds=0.1)
        for host in world.hosts.values():
            while host.loading:
                world.load_one(host.name)
    assert world.hosts["h1"].held
    pass_lease(world)
    world.tick(seconds=1.0)
    assert not world.hosts["h1"].held


def test_a_controller_that_was_frozen_gives_routers_time_to_say_that_they_live() -> None:
    world = started(2, replicas=1)
    pass_lease(world)
    world.report("r0")
    world.report("r1")
    world.control.set_constraints(OperatorConstraints(leaving=frozenset({"h1"})))
    for _ in range(4):
        world.tick(seconds=0.1)
        for host in world.hosts.values():
            while host.loading:
                world.load_one(host.name)
    world.tick(seconds=3 * POLICY.lease_s)
    assert world.hosts["h1"].held, "nobody was heard, because nobody listened"
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


def test_a_load_that_fails_again_is_given_up_and_the_state_shown_is_true() -> None:
    world = started(2, replicas=1, slots=8)
    for _ in range(30):
        world.report("r0", hot(world))
        world.report("r1")
        world.tick()
        for name in world.hosts:
            world.fail_load(name)
    change = world.control.changes.all[0]
    assert "broken" in change.errors[0]
    assert change.phase is ChangePhase.FAILED
    for placement in world.published:
        assert all(len(e) == 1 for la in placement.layers.values() for e in la.replicas)


def test_a_change_can_be_rolled_back() -> None:
    world = started(2, replicas=1, slots=8)
    before = world.published[-1].layers
    for _ in range(10):
        world.report("r0", hot(world))
        finish(world, 1)
    assert world.published[-1].layers != before
    change = world.control.changes.all[0]
    world.control.roll_back(change, world.now)
    finish(world, 15)
    assert change.phase is ChangePhase.ROLLED_BACK
    hosts = {k: [la.hosts(e) for e in range(4)] for k, la in world.published[-1].layers.items()}
    assert hosts == {k: [la.hosts(e) for e in range(4)] for k, la in before.items()}
    assert world.evicted > 0


def test_a_plan_that_was_asked_for_before_a_rollback_is_of_no_use_behind_it() -> None:
    world = started(2, replicas=1, slots=8)
    for _ in range(10):
        world.report("r0", hot(world))
        finish(world, 1)
    change = world.control.changes.all[0]
    asked = world.control.plan_for(world.now)
    found = asked.run()
    world.control.roll_back(change, world.now)
    wanted = {host: world.control.wanted(host) for host in world.hosts}
    world.control.planned(asked, found, world.now)
    assert {host: world.control.wanted(host) for host in world.hosts} == wanted


def test_numbers_of_a_new_term_are_above_all_of_an_old_one() -> None:
    assert PlacementId(2, 1) > PlacementId(1, 10**9)


def test_what_only_memory_held_and_is_lost_keeps_no_change_under_way() -> None:
    world = ControlWorld(3, [(shape("disk"), True), (shape("memory"), False)])
    world.settle()
    world.put_models_in_memory()
    world.settle()
    world.kill("h1")
    for _ in range(20):
        world.tick()
    world.settle()
    assert {key.model for key in world.control.missing()} == {"memory"}
    assert world.control.pending() == 0
    assert world.control.changes.all[-1].phase is not ChangePhase.LOADING


def test_a_target_with_more_than_a_hosts_slots_is_loaded_all_the_same() -> None:
    """An even part of what models need is less when hosts come back."""
    world = ControlWorld(2, [(shape("m", replicas=2, experts=16, layers=1), True)])
    world.settle()
    loader = Loader(world.control.view, bytes_per_s=1e9, batch_bytes=1 << 20, retry_s=1.0)
    loader.on_disk.add("m")
    loader.slots["h0"] = 8
    held = world.hosts["h0"].held
    wanted = sorted(held)
    lost = wanted[:3]
    held -= set(lost)
    world.control.view.note({"h0": world.hosts["h0"].observe()}, world.now)
    found = loader.next("h0", wanted, models=world.control.models, appeared=["m"], now=world.now)
    assert found is not None
    assert list(found.keys) == lost


def test_background_loads_are_spread_over_the_time_that_they_may_take() -> None:
    world = ControlWorld(2, [(shape("m", replicas=2, experts=16, layers=1), True)])
    world.settle()
    loader = Loader(world.control.view, bytes_per_s=8.0, batch_bytes=1 << 20, retry_s=1.0)
    loader.on_disk.add("m")
    held = world.hosts["h0"].held
    wanted = sorted(held)
    held -= set(wanted[:4])
    world.control.view.note({"h0": world.hosts["h0"].observe()}, world.now)

    def ask(after_s: float) -> int:
        found = loader.next(
            "h0", wanted, models=world.control.models, appeared=["m"], now=world.now + after_s
        )
        return 0 if found is None else len(found.keys)

    # Experts of one byte: two in a quarter of a second.
    assert [ask(after_s) for after_s in (0.0, 0.2, 0.26, 0.3)] == [2, 0, 2, 0]
