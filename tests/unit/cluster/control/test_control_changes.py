"""What a change of the placement does and reports, from its budget to its end or its rollback."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from moesaic.cluster.control.changes import ChangeHistory
from moesaic.cluster.control.control import ControlPolicy
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.planner.plan import OperatorConstraints
from moesaic.cluster.reports.placing import ChangePhase
from tests.helpers.cluster.control_world import POLICY, ControlWorld, counts, finish, shape, started


def hot(world: ControlWorld) -> dict[LayerKey, np.ndarray]:
    return {LayerKey("m", layer): np.array([9000, 100, 100, 100]) for layer in range(2)}


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


def test_the_next_controller_tells_of_the_changes_and_numbers_its_own_after_them() -> None:
    world = started(2, replicas=1, slots=8)
    for _ in range(40):
        world.report("r0", hot(world))
        finish(world, 1)
    first = world.control.changes
    told = first.reports(world.now, pending_moves=0)
    assert told[-1].measured is not None
    assert first.marks() == [(one.id, one.phase, one.measured is not None) for one in told]
    loading = told[-1].model_copy(update={"id": told[-1].id + 1, "phase": ChangePhase.LOADING})
    kept = [*first.snapshot(world.now), loading.model_dump(mode="json")]

    later = ChangeHistory()
    later.restore(json.loads(json.dumps(kept)), 5.0, passed_s=20.0)
    assert later.marks() == []
    *same, ended = later.reports(6.0, pending_moves=3)
    assert [one.model_copy(update={"age_s": 0.0}) for one in same] == [
        one.model_copy(update={"age_s": 0.0}) for one in told
    ]
    assert same[0].age_s == pytest.approx(told[0].age_s + 21.0)
    assert (ended.phase, ended.under_way) == (ChangePhase.SUPERSEDED, False)
    plan = first.all[-1].plan
    assert later.begin(plan, {}, 6.0, who="me", why="asked for").id == ended.id + 1
    assert later.find(ended.id) is None
    # A third controller knows them all.
    third = ChangeHistory()
    third.restore(later.snapshot(7.0), 0.0, passed_s=0.0)
    assert [one.id for one in third.reports(0.0, pending_moves=0)] == [
        *(one.id for one in told),
        ended.id,
        ended.id + 1,
    ]
