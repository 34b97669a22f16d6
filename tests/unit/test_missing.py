"""Rows that lack experts wait, fail or go without, each as its request wants."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.cluster.health import RouterPolicy
from moesaic.cluster.missing import SHORT_WAIT_S, WAIT, Dropped, MissingExpert, RowWishes
from tests.helpers.worlds import World, placement

FAIL = MissingExpert(mode="fail")
DROP = MissingExpert(mode="drop", most_dropped=0.3)
POLICY = RouterPolicy(deadline_s=30.0, attempt_s=1.0)


def test_patience_is_the_routers_deadline_or_short_or_what_was_said() -> None:
    soon = MissingExpert(wait_s=2.0)
    groups = [(1, WAIT), (2, FAIL), (1, DROP), (1, soon), (1, MissingExpert(wait_s=99.0))]
    wishes = RowWishes(groups, 8, 30.0)
    short = SHORT_WAIT_S
    assert wishes.patience_T.tolist() == [30.0, short, short, short, 2.0, 30.0, 30.0, 30.0]


def test_a_batch_that_is_not_the_groups_waits_as_a_whole() -> None:
    assert RowWishes([(4, FAIL)], 3, 30.0).patience_T.tolist() == [30.0] * 3


def test_only_a_small_part_of_the_gate_weights_is_dropped() -> None:
    weights = np.array([[0.8, 0.2], [0.6, 0.4], [0.8, 0.2], [0.0, 0.0]], dtype=np.float32)
    wishes = RowWishes([(2, DROP), (1, FAIL), (1, DROP)], 4, 30.0)
    dropped, lost = wishes.judge(np.array([1, 3, 5, 7]), weights.reshape(-1), 2)
    assert dropped == pytest.approx({0: 0.2})
    assert lost == [1, 2, 3]


def test_the_cap_holds_for_all_missing_experts_of_a_token_together() -> None:
    wishes = RowWishes([(1, DROP)], 1, 30.0)
    weights = np.array([0.6, 0.2, 0.2], dtype=np.float32)
    assert wishes.judge(np.array([1]), weights, 3).dropped == pytest.approx({0: 0.2})
    assert wishes.judge(np.array([1, 2]), weights, 3).lost == [0]


def test_what_was_dropped_adds_up() -> None:
    assert Dropped(0.0, 0).and_then(0.2).and_then(0.1) == Dropped(0.2, 2)


def one_dead_host() -> World:
    world = World(placement(2, 1), POLICY)
    for host in world.hosts.values():
        world.welcome(host)
    world.kill(world.hosts["h0"])
    return world


def test_impatient_rows_are_lost_early_and_hold_nobody_up() -> None:
    world = one_dead_host()
    layer = next(iter(world.placement.layers.values()))
    gone, here = (next(e for e in range(8) if layer.hosts(e) == (name,)) for name in ("h0", "h1"))
    ids_TK = np.array([[gone, here], [here, gone], [here, here]], dtype=np.int32)
    world.begin(ids_TK, patience_T=np.array([0.5, 0.1, 30.0]))
    while world.hosts["h1"].inbox:
        world.answer(world.hosts["h1"], 0)
    while world.dispatcher.outcome is None:
        world.pass_to_next()
    assert world.now == pytest.approx(0.5, abs=0.01)
    assert world.dispatcher.outcome.lost.tolist() == [0, 3]
    world.check_whole()


def test_a_patient_row_gets_its_expert_when_it_is_back() -> None:
    world = one_dead_host()
    layer = next(iter(world.placement.layers.values()))
    gone = next(e for e in range(8) if layer.hosts(e) == ("h0",))
    world.begin(np.array([[gone], [gone]], dtype=np.int32), patience_T=np.array([0.1, 30.0]))
    world.pass_time(5.0)
    assert world.dispatcher.outcome is None
    world.settle()
    assert world.dispatcher.outcome is not None
    assert world.dispatcher.outcome.lost.tolist() == [0]
    world.check_whole()
