"""Calls for gradients: each part stays with the host that it was sent to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from moesaic.cluster.placement import LayerPlacement, PlacementId
from moesaic.cluster.routing.events import Send
from moesaic.cluster.routing.layer_call import BACKWARD, EXACT_BACKWARD, ROWS_TOGETHER
from tests.helpers.cluster.worlds import KEY, World
from tests.unit.cluster.routing.test_dispatch import POLICY, connected, ids


def test_a_backward_call_is_neither_hedged_nor_answered_late() -> None:
    world = connected(2, 2)
    world.accustom(ids(8, 2), 0.05)
    call = world.begin(ids(8, 2), kind=BACKWARD)
    late = [host for host in world.hosts.values() if host.inbox]
    for _ in range(10):
        if world.dispatcher.ejections:
            break
        world.pass_to_next()
    assert world.dispatcher.hedges == 0
    assert world.dispatcher.ejections, "each part has missed its deadline"
    before = len(call.accepted)
    for host in late:
        world.answer(host, 0)
    assert len(call.accepted) == before, "its answer came too late"
    world.settle()
    world.check_whole()


@pytest.mark.parametrize("code", ["Busy", "Expired", "Corrupted"])
def test_a_part_of_a_backward_call_goes_to_its_own_host_again(code: str) -> None:
    """The host has the gradients of what it answered, and knows a part by its number."""
    world = connected(2, 2)
    call = world.begin(ids(8, 2), kind=BACKWARD)
    host = next(host for host in world.hosts.values() if host.inbox)
    first = host.inbox[0]
    counts = world.dispatcher.meter.take("r", None, None).counts
    world.refuse(host, 0, code)
    while not host.inbox:
        world.pass_to_next()
    again = host.inbox[-1]
    assert (again.part, again.assignments.tolist()) == (first.part, first.assignments.tolist())
    assert again.seq != first.seq
    world.settle()
    assert call.state.outcome is not None
    assert not call.state.outcome.lost.size
    assert not counts, "its tokens were counted on their way there"


@pytest.mark.parametrize("ends", ["kill", "NotHere"])
def test_a_backward_call_loses_what_its_host_had(ends: str) -> None:
    world = connected(2, 2)
    call = world.begin(ids(8, 2), kind=BACKWARD)
    lost, other = (host for host in world.hosts.values() if host.inbox)
    part = lost.inbox[0].assignments.tolist()
    if ends == "kill":
        world.kill(lost)
    else:
        world.refuse(lost, 0, ends)
    while other.inbox:
        world.answer(other, 0)
    outcome = call.state.outcome
    assert outcome is not None
    assert outcome.lost.tolist() == part
    assert outcome.error is not None
    assert outcome.error.code == ("HostLost" if ends == "kill" else "NotHere")


def answered(world: World, ids_TK: np.ndarray, max_rows: int = 64) -> list[Send]:
    """A forward call that was answered, as it was sent in the end."""
    call = world.begin(ids_TK, max_rows=max_rows)
    world.settle()
    return call.answers


def places(sends: Sequence[Send]) -> set[tuple[str, tuple[int, ...]]]:
    return {(send.host, tuple(send.assignments.tolist())) for send in sends}


@pytest.mark.parametrize("calls_between", [0, 1, 3])
def test_a_backward_call_goes_where_its_forward_call_went(calls_between: int) -> None:
    """Otherwise each call of a layer takes other replicas; here some pieces wait for room."""
    ids_TK = ids(24, 3)
    world = connected(3, 2, replace(POLICY, window=1))
    forward = answered(world, ids_TK, max_rows=3)
    assert len(forward) > len(world.hosts)
    for _ in range(calls_between):
        answered(world, ids_TK, max_rows=3)
    backward = world.begin(ids_TK, max_rows=3, kind=BACKWARD, like=forward)
    world.settle()
    world.check_whole()
    assert places(backward.answers) == places(forward)
    parts = [send.part for send in backward.answers]
    assert sorted(parts) == list(range(backward.state.parts))
    others = [answered(world, ids_TK, max_rows=3) for _ in range(2)]
    assert any(places(other) != places(forward) for other in others)


@pytest.mark.parametrize("change", ["host", "process", "versions", "experts", "rows", "busy"])
def test_parts_whose_hosts_cannot_take_them_are_chosen_anew(change: str) -> None:
    ids_TK = ids(8, 2)
    world = connected(2, 2)
    forward = answered(world, ids_TK)
    one = world.hosts["h0"]
    layer = world.placement.layers[KEY]
    if change == "host":
        world.cut(one)
    elif change == "process":
        world.kill(one)
        world.restart(one)
        while not one.connected:
            world.pass_to_next()
        world.welcome(one)
    elif change == "versions":
        newer = world.placement.versions.trained("m", 2)
        number = PlacementId(1, world.placement.id.epoch + 1)
        world.replace(replace(world.placement, id=number, versions=newer))
    elif change == "experts":
        left = (tuple(r for r in replicas if r.host != "h0") for replicas in layer.replicas)
        world.republish(LayerPlacement(tuple(left)))
    elif change == "busy":
        world.begin(ids_TK, kind=BACKWARD)
        world.refuse(one, 0, "Busy")
    backward = world.begin(ids_TK, 1 if change == "rows" else 64, kind=BACKWARD, like=forward)
    first = [send for host in world.hosts.values() for send in host.inbox]
    first = [send for send in first if send.call == backward.state.number]
    if change == "rows":
        assert all(send.token_t.size == 1 for send in first)
    elif change == "versions":
        assert {send.version for send in first} == {2}
    elif change == "process":
        assert {send.incarnation for send in first if send.host == "h0"} == {2}
    else:
        assert {send.host for send in first} == {"h1"}
    world.settle()
    world.check_whole()
    assert backward.state.outcome is not None
    assert backward.state.outcome.ok


@pytest.mark.parametrize("ends", ["kill", "experts"])
def test_parts_that_were_not_sent_yet_are_not_lost_with_their_host(ends: str) -> None:
    ids_TK = ids(8, 2)
    world = connected(2, 2, replace(POLICY, window=1))
    forward = answered(world, ids_TK, max_rows=2)
    backward = world.begin(ids_TK, 2, kind=BACKWARD, like=forward)
    one = world.hosts["h0"]
    sent = one.inbox[0].assignments.tolist()
    assert sum(send.host == "h0" for send in forward) > 1
    if ends == "kill":
        world.kill(one)
        lost = sent
    else:
        layer = world.placement.layers[KEY]
        left = (tuple(r for r in replicas if r.host != "h0") for replicas in layer.replicas)
        world.republish(LayerPlacement(tuple(left)))
        lost = []
    world.settle()
    assert backward.state.outcome is not None
    assert backward.state.outcome.lost.tolist() == lost


def rows_together(sends: Sequence[Send]) -> set[tuple[int, ...]]:
    """The assignments of one expert in one send, for each of both."""
    return {
        tuple(send.assignment_tk[send.ids_tk == expert].tolist())
        for send in sends
        for expert in np.unique(send.ids_tk[send.ids_tk >= 0])
    }


@pytest.mark.parametrize(("tokens", "max_rows"), [(40, 64), (40, 7), (600, 512)])
@pytest.mark.parametrize("window", [1, 4])
def test_which_rows_of_an_expert_are_together_depends_on_no_host(
    tokens: int, max_rows: int, window: int
) -> None:
    """Also where some of them wait for room, a host is busy, and each call takes other replicas."""
    ids_TK, chunk = ids(tokens, 3), min(max_rows, ROWS_TOGETHER)
    chunk_TK = np.arange(tokens)[:, None] // chunk
    wanted = {
        tuple(np.flatnonzero((ids_TK == expert) & (chunk_TK == at)).tolist())
        for expert in range(8)
        for at in range(chunk_TK.max() + 1)
    } - {()}
    for hosts, replicas in ((1, 1), (3, 1), (3, 3), (4, 2)):
        world = connected(hosts, replicas, replace(POLICY, window=window))
        for _ in range(3):
            call = world.begin(ids_TK, max_rows=max_rows, kind=EXACT_BACKWARD)
            for busy in [host for host in world.hosts.values() if host.inbox][:1]:
                world.refuse(busy, 0, "Busy")
            world.settle()
            world.check_whole()
            assert rows_together(call.answers) == wanted
