"""Calls for gradients: each part stays with the host that it was sent to."""

from __future__ import annotations

import pytest

from moesaic.cluster.routing.layer_call import BACKWARD
from tests.unit.cluster.routing.test_dispatch import connected, ids


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
