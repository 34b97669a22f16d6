"""The router's state machine under random interleavings of everything that may happen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.placement import LayerPlacement, Replica
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.events import Connect, Disconnect, HostUp, Ponged, Probe, Send
from moesaic.cluster.routing.host_health import HostState
from moesaic.cluster.routing.layer_call import BACKWARD, EXACT_BACKWARD, FORWARD
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.cluster.worlds import KEY, World, placement
from tests.helpers.effort import tries

POLICY = RouterPolicy(deadline_s=30.0, attempt_s=1.0, window=4, split_rows=2)


KINDS = (
    *("answer", "answer", "answer", "twice", "refuse", "lose", "welcome", "pong"),
    *("freeze", "thaw", "kill", "cut", "restart", "time", "wake", "shuffle"),
)


def ids(tokens: int, top_k: int, experts: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
    return np.stack(rows).astype(np.int32)


def connected(hosts: int, replicas: int, policy: RouterPolicy = POLICY) -> World:
    world = World(placement(hosts, replicas), policy)
    for host in world.hosts.values():
        world.welcome(host)
    return world


@settings(max_examples=tries(300), deadline=None)
@given(data=st.data())
def test_no_choice_is_lost_doubled_or_wrong(data: st.DataObject) -> None:
    hosts = data.draw(st.integers(1, 4), label="hosts")
    replicas = data.draw(st.integers(1, hosts), label="replicas")
    world = connected(hosts, replicas)
    tokens = data.draw(st.integers(1, 12), label="tokens")
    top_k = data.draw(st.integers(1, 4), label="top_k")
    if data.draw(st.booleans(), label="knows when an answer is late"):
        world.accustom(ids(tokens, top_k, seed=tokens), 0.05)
    for host in world.hosts.values():
        if data.draw(st.booleans(), label="not connected yet"):
            world.cut(host)
    at_once = data.draw(st.integers(1, 3), label="calls at once")
    for seed in range(at_once):
        begin(world, data, tokens, top_k, seed)
    for _ in range(data.draw(st.integers(0, 40), label="steps")):
        if world.is_idle:
            break
        if data.draw(st.integers(0, 9)) == 0 and len(world.calls) < 20:
            begin(world, data, tokens, top_k, len(world.calls))
        step(world, data)
    world.settle()
    world.check_whole()
    if world.now < POLICY.deadline_s:
        for call in world.calls.values():
            assert call.state.outcome is not None
            assert set(call.state.outcome.lost.tolist()) <= call.refused_for_good


def begin(world: World, data: st.DataObject, tokens: int, top_k: int, seed: int) -> None:
    kind = data.draw(st.sampled_from([FORWARD, BACKWARD, EXACT_BACKWARD]))
    max_rows = data.draw(st.integers(1, 5))
    before = [call for call in world.calls.values() if call.answers]
    if kind is BACKWARD and before and data.draw(st.booleans()):
        first = data.draw(st.sampled_from(before))
        ids_TK = first.ids_N.reshape(-1, first.state.top_k)
        world.begin(ids_TK, max_rows=max_rows, kind=kind, like=first.answers)
    else:
        world.begin(ids(tokens, top_k, seed=tokens + seed), max_rows=max_rows, kind=kind)


def step(world: World, data: st.DataObject) -> None:
    """One thing that may happen in a pool."""
    host = world.hosts[data.draw(st.sampled_from(sorted(world.hosts)))]
    answers = host.connected and host.welcomed and not host.frozen
    kind = data.draw(st.sampled_from(KINDS))
    if kind in ("answer", "twice") and answers and host.inbox:
        index = data.draw(st.integers(0, len(host.inbox) - 1))
        world.answer(host, index, twice=kind == "twice")
    elif kind == "refuse" and answers and host.inbox:
        code = data.draw(st.sampled_from(["NotHere", "Busy", "Expired", "CallError"]))
        world.refuse(host, data.draw(st.integers(0, len(host.inbox) - 1)), code)
    elif kind == "lose" and host.inbox:
        world.lose(host, data.draw(st.integers(0, len(host.inbox) - 1)))
    elif kind == "welcome" and host.connected and not host.welcomed and not host.frozen:
        world.welcome(host)
    elif kind == "pong" and answers and host.pings:
        world.pong(host)
    elif kind in ("freeze", "thaw"):
        host.frozen = kind == "freeze"
    elif kind == "kill" and host.alive:
        world.kill(host)
    elif kind == "cut":
        world.cut(host)
    elif kind == "restart" and not host.alive:
        world.restart(host)
    elif kind == "time":
        world.pass_time(data.draw(st.floats(0.001, 3.0)))
    elif kind == "wake":
        world.pass_to_next()
    elif kind == "shuffle":
        layer = world.placement.layers[KEY]
        world.republish(LayerPlacement(tuple(tuple(reversed(r)) for r in layer.replicas)))


def test_another_replica_takes_over_when_a_host_dies() -> None:
    world = connected(2, 2)
    world.begin(ids(8, 2))
    victim = next(host for host in world.hosts.values() if host.inbox)
    world.kill(victim)
    survivor = next(host for host in world.hosts.values() if host.alive)
    while survivor.inbox:
        world.answer(survivor, 0)
    assert world.now == 0.0
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_a_frozen_host_costs_one_deadline_and_no_more() -> None:
    world = connected(2, 2)
    frozen = world.hosts["h0"]
    frozen.frozen = True
    for call in range(5):
        world.begin(ids(8, 2, seed=call))
        for _ in range(20):
            if world.outcome is not None:
                break
            while world.hosts["h1"].inbox:
                world.answer(world.hosts["h1"], 0)
            if world.outcome is None:
                world.pass_to_next()
        world.check_whole()
        assert world.outcome is not None
        assert world.outcome.ok
    assert world.now < 1.5 * POLICY.attempt_s
    assert world.dispatcher.ejections == 1
    assert frozen.pings > 0


def test_an_ejected_host_comes_back_and_its_slots_stay_quarantined_until_its_pong() -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(2, 2))
    late = host.inbox[0]
    world.pass_time(POLICY.attempt_s + 0.01)
    health = world.dispatcher.hosts["h0"]
    assert health.state is HostState.EJECTED
    world.tell(Ponged("h0", 0))
    assert health.state is HostState.UP
    assert len(host.inbox) == 2, "the assignments were sent again"
    assert late.seq in health.occupied, "that answers no probe behind it: it may still be written"
    world.lose(host, 0)
    world.pong(host)
    assert late.seq not in health.occupied, "now nobody writes to it any more"
    world.answer(host, 0)
    assert not health.occupied
    world.check_whole()


def test_slots_of_lost_answers_come_back_although_the_host_stays_up() -> None:
    policy = replace(POLICY, attempt_s=0.2, window=2)
    world = connected(1, 1, policy)
    host = world.hosts["h0"]
    for call in range(6):
        world.begin(ids(2, 2, seed=call))
        world.lose(host, 0)
        while world.outcome is None:
            world.pass_to_next()
            if host.pings:
                world.pong(host)
            while host.inbox:
                world.answer(host, 0)
        assert world.outcome.ok
        world.check_whole()
    assert world.now < 6 * 2 * policy.attempt_s


def test_a_late_answer_counts_if_nobody_else_has_its_choices() -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(3, 2))
    world.pass_time(POLICY.attempt_s + 0.01)
    world.answer(host, 0)
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_without_a_replica_choices_wait_until_the_deadline_and_are_named() -> None:
    world = connected(2, 1)
    chosen = ids(4, 2)
    world.kill(world.hosts["h0"])
    world.begin(chosen)
    while world.hosts["h1"].inbox:
        world.answer(world.hosts["h1"], 0)
    assert [world.outcome] == [None]
    while world.outcome is None:
        world.pass_to_next()
    assert world.now == pytest.approx(POLICY.deadline_s, abs=0.1)
    held_by_dead = {
        e for e, r in enumerate(world.placement.layers[KEY].replicas) if r[0][0] == "h0"
    }
    lost = {int(world.last.ids_N[n]) for n in world.outcome.lost}
    assert lost == held_by_dead & set(chosen.reshape(-1).tolist())
    world.check_whole()


def test_a_call_without_choices_of_a_layer_that_is_not_placed_counts_nothing() -> None:
    router = Dispatcher(POLICY)
    for _ in range(2):
        call, _ = router.begin(KEY, ids(1, 0), max_rows=64, now=0.0)
        assert call.outcome is not None
        assert call.outcome.ok
    router.place(placement(1, 1), 0.0)
    router.begin(KEY, ids(2, 2), max_rows=64, now=0.0)
    assert router.meter.take("r", None, None).counts[KEY].sum() == 4


def test_a_restarted_host_is_used_as_soon_as_it_is_placed() -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(4, 2))
    world.kill(host)
    world.pass_time(2.0)
    world.restart(host)
    world.welcome(host)
    world.answer(host, 0)
    assert world.outcome is not None
    assert world.outcome.ok


def test_a_refusal_that_is_no_hosts_fault_ends_its_own_choices_only() -> None:
    world = connected(2, 2)
    world.begin(ids(4, 2))
    refusing, other = world.hosts["h0"], world.hosts["h1"]
    refused = refusing.inbox[0].assignments.tolist()
    world.refuse(refusing, 0, "CallError")
    assert not refusing.inbox, "nobody is asked again"
    while other.inbox:
        world.answer(other, 0)
    outcome = world.outcome
    assert outcome is not None
    assert outcome.error is not None
    assert outcome.error.code == "CallError"
    assert outcome.lost.tolist() == refused
    world.check_whole()


def test_an_expert_that_is_not_here_costs_only_its_own_choices() -> None:
    """A refusal does not say which expert of a send it means: the host is asked for each alone."""
    world = connected(1, 1)
    host = world.hosts["h0"]
    chosen = ids(6, 2)
    world.begin(chosen)
    world.refuse(host, 0, "NotHere")
    assert all(np.unique(send.ids_tk[send.ids_tk >= 0]).size == 1 for send in host.inbox)
    gone = int(chosen[0, 0])
    while host.inbox:
        if gone in host.inbox[0].ids_tk:
            world.refuse(host, 0, "NotHere")
        else:
            world.answer(host, 0)
    assert [world.outcome] == [None], "it may come back until the deadline"
    while world.outcome is None:
        world.pass_to_next()
    assert {int(world.last.ids_N[n]) for n in world.outcome.lost} == {gone}
    world.check_whole()


@pytest.mark.parametrize("experts", [1, 2], ids=["avoids it", "asks for each expert alone"])
def test_a_refusal_from_before_a_placement_says_nothing_about_it(experts: int) -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(1, experts))
    world.run(world.dispatcher.place(placement(1, 1, epoch=2), world.now))
    world.refuse(host, 0, "NotHere")
    assert len(host.inbox) == 1, "the host may have been given what it lacked"
    world.answer(host, 0)
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_an_abandoned_call_leaves_no_slot_taken() -> None:
    world = connected(2, 2)
    call = world.begin(ids(8, 2)).state
    world.run(world.dispatcher.abandon(call, world.now))
    assert all(not health.occupied for health in world.dispatcher.hosts.values())
    assert world.dispatcher.abandon(call, world.now) == []
    world.begin(ids(8, 2, seed=1))
    world.settle()
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_a_call_that_is_cancelled_leaves_the_others_alone() -> None:
    world = connected(2, 2)
    first, second = world.begin(ids(8, 2)), world.begin(ids(8, 2, seed=1))
    world.run(world.dispatcher.cancel(first.state, world.now))
    assert first.state.outcome is not None
    assert first.state.outcome.lost.size == 16
    assert all(host.connected for host in world.hosts.values())
    world.settle()
    assert second.state.outcome is not None
    assert second.state.outcome.ok
    assert world.dispatcher.cancel(first.state, world.now) == []


def test_an_abandoned_call_makes_the_others_send_again() -> None:
    world = connected(2, 2)
    first, second = world.begin(ids(8, 2)), world.begin(ids(8, 2, seed=1))
    world.run(world.dispatcher.abandon(first.state, world.now))
    assert not any(host.connected for host in world.hosts.values())
    world.settle()
    assert second.state.outcome is not None
    assert second.state.outcome.ok
    world.check_whole()


def test_calls_share_a_window_and_the_earlier_one_sends_first() -> None:
    world = connected(1, 1, replace(POLICY, window=2))
    first, second = world.begin(ids(3, 1), max_rows=1), world.begin(ids(3, 1, seed=1), max_rows=1)
    (host,) = world.hosts.values()
    assert [send.call for send in host.inbox] == [first.state.number] * 2
    world.answer(host, 0)
    assert [send.call for send in host.inbox] == [first.state.number] * 2
    world.answer(host, 0)
    world.answer(host, 0)
    assert first.state.outcome is not None
    assert {send.call for send in host.inbox} == {second.state.number}
    world.settle()
    world.check_whole()


def test_choices_of_nobody_are_dropped_when_the_placement_comes() -> None:
    dispatcher = Dispatcher(POLICY)
    chosen = np.array([[3, 8], [8, 8]], dtype=np.int32)
    assert dispatcher.begin(KEY, chosen, max_rows=64, now=0.0)[1] == []
    dispatcher.place(placement(1, 1), 0.0)
    sends = [c for c in dispatcher.handle(HostUp("h0", 1), 0.0) if isinstance(c, Send)]
    assert [send.assignments.tolist() for send in sends] == [[0]]


def test_a_busy_host_is_asked_again_after_a_while() -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(1, 1))
    world.refuse(host, 0, "Busy")
    assert not host.inbox
    world.pass_to_next()
    assert len(host.inbox) == 1
    assert world.now == pytest.approx(POLICY.busy_s, abs=1e-3)


def test_a_host_that_stays_busy_is_asked_ever_more_rarely() -> None:
    world = connected(1, 1)
    host = world.hosts["h0"]
    world.begin(ids(1, 1))
    asked = 0
    while world.now < 5.0:
        if host.inbox:
            asked += 1
            world.refuse(host, 0, "Busy")
        world.pass_to_next()
    assert asked < 25, "20 retries are free, more come at 0.5 s each"
    world.settle()
    world.check_whole()


def test_retries_beyond_the_budget_are_held_back_and_failing_over_is_not() -> None:
    policy = replace(POLICY, retry_burst=1.0, retry_per_s=1.0, retry_share=0.0, busy_max_s=0.005)
    world = connected(2, 2, policy)
    world.begin(ids(1, 1))
    sent = []
    for _ in range(4):
        while not any(host.inbox for host in world.hosts.values()):
            world.pass_to_next()
        sent.append(world.now)
        host = next(host for host in world.hosts.values() if host.inbox)
        assert host.inbox[0].attempt == len(sent) - 1
        world.refuse(host, 0, "Busy")
    gaps = np.diff(sent)
    assert gaps[0] < 0.1, "one was saved up"
    assert gaps[1:] == pytest.approx([1.0, 1.0], abs=0.05)
    while not any(host.inbox for host in world.hosts.values()):
        world.pass_to_next()
    victim = next(host for host in world.hosts.values() if host.inbox)
    before = world.now
    world.kill(victim)
    world.settle()
    assert world.now == before


def test_an_older_placement_is_ignored() -> None:
    world = connected(2, 1)
    assert world.dispatcher.place(placement(2, 2, epoch=1), world.now) == []
    assert world.dispatcher.placement is world.placement


def test_an_answer_of_another_incarnation_ends_the_connection() -> None:
    world = World(placement(1, 1), POLICY)
    commands = world.dispatcher.handle(HostUp("h0", 99), world.now)
    assert Disconnect("h0") in commands
    assert world.dispatcher.hosts["h0"].state is HostState.DOWN


def test_a_host_that_never_welcomes_is_tried_again() -> None:
    world = World(placement(1, 1), POLICY)
    world.pass_time(POLICY.connect_s + 0.01)
    assert world.dispatcher.hosts["h0"].state is HostState.DOWN
    commands = world.dispatcher.tick(world.now + POLICY.reconnect_s + 0.01)
    assert [type(command) for command in commands] == [Connect]


def test_probes_become_rarer() -> None:
    world = connected(1, 1)
    world.begin(ids(1, 1))
    world.pass_time(POLICY.attempt_s + 0.01)
    gaps, last = [], world.now
    for _ in range(8):
        world.now = world.dispatcher.wake_at(world.now) + 1e-6
        if any(isinstance(c, Probe) for c in world.dispatcher.tick(world.now)):
            gaps.append(world.now - last)
            last = world.now
    assert np.all(np.diff(gaps) > -1e-3)
    assert max(gaps) <= POLICY.probe_max_s + 0.01


def test_shares_split_a_large_call_and_rotate_small_ones() -> None:
    dispatcher = Dispatcher(RouterPolicy(split_rows=4))
    first = placement(2, 2, experts=1)
    layer = LayerPlacement(((Replica("h0", 0.75), Replica("h1", 0.25)),))
    shaped = type(first)(first.id, first.hosts, {KEY: layer})
    dispatcher.place(shaped, 0.0)
    for host in shaped.hosts:
        dispatcher.handle(HostUp(host, 1), 0.0)
    sends = [
        c
        for c in dispatcher.begin(KEY, np.zeros((256, 1), np.int32), max_rows=512, now=0.0)[1]
        if isinstance(c, Send)
    ]
    rows = {send.host: send.token_t.size for send in sends}
    assert rows == {"h0": 192, "h1": 64}
