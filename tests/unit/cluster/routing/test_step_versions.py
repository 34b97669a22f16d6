"""A forward pass uses the same versions of weights from its first layer to its last."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import HostEntry, LayerPlacement, Placement, PlacementId, Replica
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.events import Accept, HostUp, Replied, RouterCommand, Send
from moesaic.cluster.routing.policy import RouterPolicy
from moesaic.cluster.versions import WeightVersions

FIRST, SECOND = LayerKey("m", 0), LayerKey("m", 1)
IDS = np.array([[0, 1]], dtype=np.int32)


def entry(host: str, incarnation: int = 1) -> HostEntry:
    return HostEntry(
        host=host, incarnation=incarnation, node="n", shm_address="", grpc_address=host
    )


def placement(epoch: int, *, at: str = "a", **versions: int) -> Placement:
    """Two layers of two experts on host ``at``; ``versions`` of expert 0 of a layer, e.g. l1=2."""
    layer = LayerPlacement(((Replica(at, 1.0),), (Replica(at, 1.0),)))
    named = {ExpertKey("m", int(name[1:]), 0): version for name, version in versions.items()}
    return Placement(
        PlacementId(1, epoch),
        {name: entry(name) for name in ("a", "b")},
        {FIRST: layer, SECOND: layer},
        versions=WeightVersions().updated(named),
    )


def following(first: Placement) -> Dispatcher:
    dispatcher = Dispatcher(RouterPolicy())
    dispatcher.place(first, 0.0)
    for host in ("a", "b"):
        dispatcher.handle(HostUp(host, 1), 0.0)
    return dispatcher


def sends(commands: list[RouterCommand]) -> list[Send]:
    return [command for command in commands if isinstance(command, Send)]


def call(dispatcher: Dispatcher, layer: LayerKey) -> Send:
    state, begun = dispatcher.begin(layer, IDS, max_rows=8, now=0.0)
    (send,) = sends(begun)
    dispatcher.handle(Replied(send.host, send.seq), 0.0)
    assert state.outcome is not None
    return send


def test_a_version_changes_between_two_passes_and_not_within_one() -> None:
    dispatcher = following(placement(1))
    dispatcher.begin_step(0.0)
    assert (call(dispatcher, FIRST).version, call(dispatcher, FIRST).other_versions) == (1, ())
    dispatcher.place(placement(2, l1=2), 0.0)
    assert call(dispatcher, SECOND).other_versions == ()
    assert dispatcher.placement is not None
    assert dispatcher.placement.id == (1, 1), "no host may evict the version before"
    assert dispatcher.received == (1, 2)
    dispatcher.end_step(0.0)
    assert dispatcher.placement.id == (1, 2)
    dispatcher.begin_step(0.0)
    assert call(dispatcher, FIRST).other_versions == ()
    assert call(dispatcher, SECOND).other_versions == ((0, 2),)


def test_the_other_layers_follow_a_newer_placement_within_a_pass() -> None:
    dispatcher = following(placement(1))
    dispatcher.begin_step(0.0)
    dispatcher.place(placement(2, at="b", l1=2), 0.0)
    assert call(dispatcher, FIRST).host == "b"
    assert call(dispatcher, SECOND).host == "a"
    # The same is true of a second one that arrives meanwhile, and of an older one.
    dispatcher.place(placement(4, l1=3), 0.0)
    dispatcher.place(placement(3, at="b", l1=4), 0.0)
    assert call(dispatcher, FIRST).host == "a"
    dispatcher.end_step(0.0)
    assert call(dispatcher, SECOND).other_versions == ((0, 3),)


def test_a_placement_without_new_versions_is_followed_within_a_pass() -> None:
    dispatcher = following(placement(1, l1=2))
    dispatcher.begin_step(0.0)
    dispatcher.place(placement(2, at="b", l1=2), 0.0)
    assert dispatcher.placement is not None
    assert dispatcher.placement.id == dispatcher.received == (1, 2)
    assert call(dispatcher, SECOND).host == "b"


def test_a_pass_inside_another_one_does_not_end_it() -> None:
    dispatcher = following(placement(1))
    dispatcher.begin_step(0.0)
    dispatcher.place(placement(2, l1=2), 0.0)
    dispatcher.begin_step(0.0)
    dispatcher.end_step(0.0)
    assert call(dispatcher, SECOND).other_versions == ()
    dispatcher.end_step(0.0)
    assert call(dispatcher, SECOND).other_versions == ((0, 2),)


def test_a_single_call_keeps_its_versions() -> None:
    dispatcher = following(placement(1))
    (send,) = sends(dispatcher.begin(SECOND, IDS, max_rows=8, now=0.0)[1])
    dispatcher.place(placement(2, l1=2), 0.0)
    assert dispatcher.received == (1, 2)
    assert dispatcher.follow_newest(0.0) == [], "the call is still running"
    dispatcher.handle(Replied(send.host, send.seq), 0.0)
    dispatcher.follow_newest(0.0)
    assert call(dispatcher, SECOND).other_versions == ((0, 2),)


def test_a_host_that_is_replaced_within_a_pass_has_lost_the_version_before() -> None:
    dispatcher = following(placement(1))
    dispatcher.begin_step(0.0)
    newer = placement(2, l1=2)
    dispatcher.place(replace(newer, hosts={**newer.hosts, "a": entry("a", 2)}), 0.0)
    assert sends(dispatcher.begin(SECOND, IDS, max_rows=8, now=0.0)[1]) == []


# ---- answers ------------------------------------------------------------------------------------


def test_an_answer_with_other_versions_than_asked_for_is_refused_and_sent_again() -> None:
    dispatcher = following(placement(1, l0=2))
    state, begun = dispatcher.begin(FIRST, IDS, max_rows=8, now=0.0)
    (send,) = sends(begun)
    assert (send.version, send.other_versions) == (1, ((0, 2),))
    for wrong in ((1, ()), (2, ((0, 2),)), (1, ((0, 3),)), (1, ((1, 2),))):
        commands = dispatcher.handle(Replied("a", send.seq, wrong), 1.0)
        assert not any(isinstance(command, Accept) for command in commands)
        assert state.outcome is None
        dispatcher.tick(2.0)  # the retry budget lets it go again
        send = next(flight.send for flight in state.in_flight.values())
    commands = dispatcher.handle(Replied("a", send.seq, (1, ((0, 2),))), 2.0)
    assert [c.send.seq for c in commands if isinstance(c, Accept)] == [send.seq]
    assert state.outcome is not None and state.outcome.ok


def test_a_late_answer_with_other_versions_is_dropped() -> None:
    dispatcher = following(placement(1))
    state, begun = dispatcher.begin(FIRST, IDS, max_rows=8, now=0.0)
    (send,) = sends(begun)
    dispatcher.tick(dispatcher.policy.attempt_s)
    assert send.seq in state.given_up
    assert not any(
        isinstance(command, Accept)
        for command in dispatcher.handle(Replied("a", send.seq, (7, ())), 5.0, more=True)
    )
    assert send.seq not in state.given_up
    assert state.outcome is None
