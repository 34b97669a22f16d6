"""The controller's state machine under random deaths, late reports, slow loads, slow routers,
shifting traffic and operators' constraints."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.host_speed import SILENT
from moesaic.cluster.control.pool_view import PoolView
from moesaic.cluster.expert_keys import ExpertKey, LayerKey, first_versions
from moesaic.cluster.placement import Placement, PlacementId
from moesaic.cluster.planner.plan import OperatorConstraints, PoolHost
from tests.helpers.cluster.control_world import (
    POLICY,
    ControlWorld,
    SimHost,
    counts,
    finish,
    shape,
    started,
)
from tests.helpers.effort import tries

# ---- random histories ---------------------------------------------------------------------------

KINDS = (
    *("tick",) * 5,
    *("load",) * 4,
    *("report",) * 2,
    *("traffic",) * 2,
    *("fail", "kill", "restart", "restart", "constrain", "planner", "take over"),
    *("update", "serve", "serve", "revert"),
)


@settings(max_examples=tries(200), deadline=None, derandomize=True)
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
        elif kind == "update":
            keys = sorted(key for key in world.every() if key.model == "disk")
            experts = data.draw(st.lists(st.sampled_from(keys), min_size=1, unique=True))
            world.update(experts, in_file=data.draw(st.booleans()))
        elif kind in ("serve", "revert"):
            getattr(world, kind)("disk")
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
    held = {
        (one, name) for name, host in world.hosts.items() for one in host.held if one.key in known
    }
    named = {
        (placement.versions.served(key.expert(expert)), replica.host)
        for key, layer in placement.layers.items()
        for expert, replicas in enumerate(layer.replicas)
        for replica in replicas
    }
    assert held == named, "nothing is held that is not served"
    assert {one.key for one, _ in named} == known - lost
    assert not {name for _, name in named} & world.constraints.leaving
    assert not world.tick(), "a quiet pool needs no decision"


# ---- one thing at a time ------------------------------------------------------------------------


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
    assert set(missing.values()) == {
        "lost: its model was attached from memory, and no file has its weights"
    }


def test_a_new_controller_serves_at_once_what_hosts_hold() -> None:
    world = started(3, replicas=1)
    world.kill("h2")
    lost = {key for key in world.every() if key in world.control.wanted("h2")}
    world.take_over()
    world.tick()
    assert world.published[-1].id.term != 2, "a model that is not whole does not appear"
    world.hosts["h0"].held |= set(first_versions(lost))
    world.tick()
    assert world.published[-1].id.term == 2
    assert not world.control.settled, "h2 may still come back"


def test_a_model_that_does_not_fit_changes_nothing() -> None:
    world = started(slots=10)
    with pytest.raises(ValueError, match=r"models\.big\.replicas"):
        world.control.add_model(shape("big", replicas=3), on_disk=True)
    with pytest.raises(ValueError, match=r"models\.big: the hosts have no room for \d+"):
        world.control.add_model(shape("big", experts=40), on_disk=True)
    assert {key.model for host in world.hosts for key in world.control.wanted(host)} == {"m"}
    finish(world, 5)
    assert not world.tick()


def test_numbers_of_a_new_term_are_above_all_of_an_old_one() -> None:
    assert PlacementId(2, 1) > PlacementId(1, 10**9)


def test_a_hosts_report_says_what_its_device_can_hold() -> None:
    view = PoolView([PoolHost(name="h0", memory_bytes=90)], host_timeout_s=5.0)
    seen = SimHost("h0").observe()
    for device_bytes, room in ((70, 70), (200, 90), (None, 90)):  # None: it came back on a CPU
        view.note({"h0": replace(seen, device_bytes=device_bytes)}, 0.0)
        assert view.hosts["h0"].room_bytes == room
