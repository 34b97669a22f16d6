"""A late send goes to another replica too, within its budget, and the first answer counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesaic.cluster.placement import LayerPlacement, Placement, Replica
from moesaic.cluster.routing.events import Send
from moesaic.cluster.routing.hedging import Hedging, Latencies, TokenBucket
from moesaic.cluster.routing.host_health import HostHealth
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.cluster.worlds import KEY, SimHost, World, entry, placement

POLICY = RouterPolicy(deadline_s=30.0, attempt_s=2.0, hedge_min_s=0.001)
USUAL_S = 0.01


def one_token(experts: int = 2) -> np.ndarray:
    return np.arange(experts, dtype=np.int32)[None, :]


def world_of(policy: RouterPolicy = POLICY, hosts: int = 2, replicas: int = 2) -> World:
    """All hosts are up and have answered in ``USUAL_S`` so far."""
    world = World(placement(hosts, replicas), policy)
    for host in world.hosts.values():
        world.welcome(host)
    world.accustom(one_token(), USUAL_S)
    return world


def begin_on_one(world: World) -> tuple[SimHost, SimHost]:
    """A call that goes to one host: (that host, another one)."""
    while True:
        world.begin(one_token(1))
        (asked,) = [host for host in world.hosts.values() if host.inbox]
        return asked, next(host for host in world.hosts.values() if host is not asked)


def test_the_first_answer_counts_and_the_other_is_cancelled() -> None:
    world = world_of()
    asked, other = begin_on_one(world)
    world.pass_time(USUAL_S * 1.1)
    assert [send.attempt for send in other.inbox] == [1]
    world.answer(other, 0)
    assert world.outcome is not None
    assert world.outcome.ok
    assert asked.inbox[0].seq in asked.cancelled
    assert (world.dispatcher.hedges, world.dispatcher.hedge_wins) == (1, 1)
    world.check_whole()
    world.answer(asked, 0)
    world.check_whole()


def test_a_hedge_that_is_slower_is_cancelled() -> None:
    world = world_of()
    asked, other = begin_on_one(world)
    world.pass_time(USUAL_S * 1.1)
    late = other.inbox[0]
    world.answer(asked, 0)
    assert late.seq in other.cancelled
    assert world.dispatcher.hedge_wins == 0
    world.check_whole()


def test_a_host_that_was_overtaken_is_avoided_for_a_while_and_then_tried_again() -> None:
    world = world_of()
    asked, _ = begin_on_one(world)
    asked.frozen = True  # for calls, but not for probes
    world.pass_time(USUAL_S * 1.1)
    for host in world.hosts.values():
        if host is not asked:
            world.answer(host, 0)
    tried: list[float] = []
    since = world.now
    while world.now < since + 4.0:
        world.begin(one_token(1))
        for _ in range(20):
            if world.outcome is not None:
                break
            if asked.inbox and (not tried or asked.inbox[-1].seq not in asked.cancelled):
                tried.append(world.now - since)
            for host in world.hosts.values():
                while host.inbox and not host.frozen:
                    world.answer(host, 0)
            if world.outcome is None:
                world.pass_to_next()
        assert world.outcome is not None
        assert world.outcome.ok
        world.pass_time(0.02)
        if asked.pings:
            world.pong(asked)
    gaps = np.diff(sorted({round(t, 1) for t in tried}))
    assert len(tried) < 12
    assert gaps.max() > 1.0, "ever more rarely"


def test_a_host_that_does_not_answer_probes_is_not_tried_again() -> None:
    world = world_of()
    asked, other = begin_on_one(world)
    world.pass_time(USUAL_S * 1.1)
    world.answer(other, 0)
    for _ in range(400):
        world.begin(one_token(1))
        assert len(asked.inbox) == 1
        world.answer(other, 0)
        world.pass_time(0.02)
    world.pong(asked)
    world.begin(one_token(2))
    while not asked.inbox:
        world.answer(other, 0)
        world.begin(one_token(2))


def test_what_a_hedge_is_left_alone_with_is_hedged_again() -> None:
    """A late call goes to two hosts, one of them answers, and the other is frozen: the first host
    was told to forget the call, and nobody may wait for the frozen one's deadline."""
    world = world_of(hosts=3)
    first, second, third = world.hosts.values()
    even = (Replica(first.name, 1.0), Replica(second.name, 0.0))
    odd = (Replica(first.name, 1.0), Replica(third.name, 0.0))
    world.republish(LayerPlacement(tuple(odd if e % 2 else even for e in range(8))))
    world.begin(one_token(2))
    began = world.now
    assert [len(host.inbox) for host in (first, second, third)] == [1, 0, 0]
    world.pass_time(USUAL_S * 2.2)
    assert [len(host.inbox) for host in (first, second, third)] == [1, 1, 1]
    world.answer(second, 0)
    assert first.inbox[0].seq in first.cancelled
    while world.outcome is None:
        world.pass_to_next()
        if first.pings:
            world.pong(first)
        while first.inbox and first.inbox[0].seq not in first.cancelled:
            world.answer(first, 0)
    assert world.outcome.ok
    assert world.now - began < POLICY.attempt_s / 4
    world.check_whole()


def test_a_host_that_is_avoided_is_asked_when_another_one_is_late() -> None:
    world = world_of()
    asked, other = begin_on_one(world)
    world.dispatcher.hosts[other.name].avoid_until = world.now + POLICY.avoid_max_s
    world.pass_time(USUAL_S * 1.1)
    assert len(other.inbox) == 1
    world.answer(other, 0)
    assert asked.inbox[0].seq in asked.cancelled
    world.check_whole()


def test_without_another_replica_nothing_is_hedged() -> None:
    world = world_of(replicas=1)
    asked, other = begin_on_one(world)
    world.pass_time(10 * USUAL_S)
    assert not other.inbox
    world.answer(asked, 0)
    world.check_whole()


def test_nothing_is_hedged_before_it_is_known_what_is_late() -> None:
    world = World(placement(2, 2), POLICY)
    for host in world.hosts.values():
        world.welcome(host)
    _, other = begin_on_one(world)
    world.pass_time(POLICY.attempt_s * 0.9)
    assert not other.inbox


def test_hedges_are_a_small_part_of_all_sends() -> None:
    """Every call is slow at once: that is no reason to double the work."""
    no_retries = replace(POLICY, retry_share=0.0, retry_per_s=1e-9, retry_burst=0.0)
    world = world_of(replace(no_retries, hedge_burst=2.0))
    sends = 0
    for _ in range(400):
        world.begin(one_token(1))
        sends += sum(len(host.inbox) for host in world.hosts.values())
        world.pass_time(30 * USUAL_S)
        for host in world.hosts.values():
            while host.inbox:
                world.answer(host, 0)
        world.check_whole()
    assert world.dispatcher.hedges <= 2 + POLICY.hedge_share * (sends + 16 * 2)


def test_a_host_that_stands_still_is_overtaken_even_when_hedges_are_spent() -> None:
    world = world_of(replace(POLICY, hedge_burst=0.0, hedge_share=0.0))
    asked, other = begin_on_one(world)
    world.pass_time(3 * USUAL_S)
    assert not other.inbox
    while world.outcome is None and world.now < POLICY.attempt_s:
        world.pass_to_next()
        while other.inbox:
            world.answer(other, 0)
    assert world.outcome is not None
    assert world.now < 20 * USUAL_S + 16 * USUAL_S
    assert asked.inbox, "it never answered"
    world.check_whole()


def test_what_takes_longer_from_now_on_is_not_late_any_more() -> None:
    world = world_of()
    for _ in range(300):
        world.begin(one_token(1))
        asked = next(host for host in world.hosts.values() if host.inbox)
        world.pass_time(30 * USUAL_S)
        world.answer(asked, 0)
        for host in world.hosts.values():
            while host.inbox:
                world.answer(host, 0)
    before = world.dispatcher.hedges
    for _ in range(50):
        world.begin(one_token(1))
        world.pass_time(30 * USUAL_S * 0.99)
        for host in world.hosts.values():
            while host.inbox:
                world.answer(host, 0)
    assert world.dispatcher.hedges == before


def spread_of_two() -> Placement:
    """Experts 0 and 1 on h0; the other replica of each on a host of its own."""
    layer = LayerPlacement(
        (
            (Replica("h0", 1.0), Replica("h1", 0.0)),
            (Replica("h0", 1.0), Replica("h2", 0.0)),
        )
    )
    base = placement(3, 1)
    return Placement(base.id, {name: entry(name) for name in ("h0", "h1", "h2")}, {KEY: layer})


def hedged_in_two() -> tuple[World, list[Send]]:
    world = World(spread_of_two(), POLICY)
    for host in world.hosts.values():
        world.welcome(host)
    world.accustom(one_token(), USUAL_S)
    world.begin(one_token())
    assert len(world.hosts["h0"].inbox) == 1
    world.pass_time(USUAL_S * 1.1)
    parts = [world.hosts[name].inbox[0] for name in ("h1", "h2")]
    assert [part.assignments.tolist() for part in parts] == [[0], [1]]
    return world, parts


def test_a_hedge_may_go_to_several_hosts_and_then_counts_part_by_part() -> None:
    world, _ = hedged_in_two()
    world.answer(world.hosts["h1"], 0)
    assert world.hosts["h0"].inbox[0].seq in world.hosts["h0"].cancelled
    world.answer(world.hosts["h0"], 0)
    assert world.accepted == [0], "the late one has a choice that was answered"
    world.answer(world.hosts["h2"], 0)
    world.check_whole()


@pytest.mark.parametrize("first", ["h1", "h2"])
def test_a_part_of_a_hedge_that_is_lost_is_sent_again_once_the_other_counts(first: str) -> None:
    world, _ = hedged_in_two()
    lost = "h2" if first == "h1" else "h1"
    world.refuse(world.hosts[lost], 0, "Expired")
    assert not world.hosts[lost].inbox, "the first send still carries its choice"
    world.answer(world.hosts[first], 0)
    assert world.outcome is None
    world.settle()
    world.check_whole()


def test_when_the_first_send_is_lost_its_hedges_stand_alone() -> None:
    world, _ = hedged_in_two()
    world.kill(world.hosts["h0"])
    world.answer(world.hosts["h1"], 0)
    assert world.outcome is None
    world.answer(world.hosts["h2"], 0)
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_late_is_what_nearly_all_of_its_size_were_not() -> None:
    latencies = Latencies(0.99, 0.0)
    assert latencies.late_after_s("m", 8) == float("inf")
    for n in range(128):
        latencies.learn("m", 8, 0.010 + n * 1e-5)
    assert latencies.late_after_s("m", 8) == pytest.approx(0.01126, abs=2e-4)
    assert latencies.late_after_s("m", 2) == latencies.late_after_s("m", 8)
    assert latencies.late_after_s("m", 32) == 4 * latencies.late_after_s("m", 8)
    assert latencies.late_after_s("other", 8) == float("inf")


def test_a_budget_saves_up_to_a_bound_and_can_be_owed() -> None:
    budget = TokenBucket(share=0.5, per_s=2.0, most=2.0)
    assert budget.spend(2, 0.0)
    assert not budget.spend(1, 0.0)
    budget.earn(2)
    assert budget.spend(1, 0.0)
    assert budget.owe(1, 0.0) == pytest.approx(0.5)
    assert budget.owe(1, 0.5) == pytest.approx(0.5)
    assert budget.spend(2, 10.0)
    assert not budget.spend(1, 10.0)


def test_a_late_send_of_a_layer_that_is_not_placed_any_more_keeps_nobody_busy() -> None:
    world = world_of()
    begin_on_one(world)
    world.replace(Placement(world._next(), world.placement.hosts, {}))
    world.pass_time(USUAL_S * 1.1)
    assert world.dispatcher.wake_at(world.now) > world.now


def test_a_placement_without_any_replica_makes_choices_wait() -> None:
    world = world_of()
    asked, _ = begin_on_one(world)
    world.republish(LayerPlacement(tuple(() for _ in range(8))))
    world.cut(asked)
    world.pass_time(USUAL_S * 1.1)
    assert world.outcome is None
    world.republish(placement(2, 2).layers[KEY])
    world.settle()
    world.check_whole()


def test_a_late_call_is_paid_for_once_on_however_many_hosts_its_replicas_stand() -> None:
    spent = TokenBucket(share=0.0, per_s=1e-9, most=0.0)
    hedging = Hedging(Latencies(0.99, 0.005), TokenBucket(share=0.0, per_s=0.0, most=2.0), spent)
    assert [hedging._allow("m", 100, 0.1, now) for now in (1.0, 2.0, 3.0)] == [True, True, False]


def test_a_host_that_is_overtaken_again_is_avoided_for_as_long_as_trying_it_would_cost() -> None:
    health = HostHealth(entry("a"), RouterPolicy())
    # A tenth once; then four times what its call waited, twice as before, and five at most.
    for now, until in ((10.0, 10.1), (12.0, 14.0), (20.0, 24.0), (30.0, 35.0)):
        health.lost_to_hedge(now, 0.5)
        assert health.avoid_until == pytest.approx(until)
    health.in_time()
    health.lost_to_hedge(40.0, 0.5)
    assert health.avoid_until == pytest.approx(40.1)


def test_a_debt_that_time_does_not_repay_is_owed_for_ever() -> None:
    budget = TokenBucket(share=0.5, per_s=0.0, most=1.0)
    assert budget.owe(1, 0.0) == 0.0
    assert budget.owe(1, 0.0) == float("inf")
    budget.earn(2)
    assert budget.owe(0, 1.0) == 0.0


def test_without_a_budget_of_retries_a_refused_call_is_lost_at_its_deadline() -> None:
    world = world_of(replace(POLICY, retry_share=0.0, retry_per_s=0.0, retry_burst=0.0))
    asked, other = begin_on_one(world)
    world.refuse(asked, 0, "Busy")
    world.pass_time(POLICY.deadline_s * 0.9)
    assert not other.inbox
    assert world.outcome is None
    world.pass_time(POLICY.deadline_s * 0.2)
    assert world.outcome is not None
    assert world.outcome.lost.tolist() == [0]
