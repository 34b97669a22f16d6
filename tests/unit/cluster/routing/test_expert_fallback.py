"""Rows that lack experts wait, fail or go without, each as its request wants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.routing.expert_fallback import (
    BatchExpertOptions,
    DroppedExperts,
    keep_top_experts,
)
from moesaic.cluster.routing.expert_options import SHORT_WAIT_S, WAIT, ExpertOptions, MissingExpert
from moesaic.cluster.routing.policy import RouterPolicy
from tests.helpers.cluster.worlds import World, placement

FAIL = MissingExpert(mode="fail")
DROP = MissingExpert(mode="drop", most_dropped=0.3)
POLICY = RouterPolicy(deadline_s=30.0, attempt_s=1.0)


@pytest.mark.parametrize(
    ("expert_options", "patience_s"),
    [
        (FAIL, SHORT_WAIT_S),
        (DROP, SHORT_WAIT_S),
        (MissingExpert(mode="fail", wait_s=2.0), 2.0),
        (MissingExpert(mode="drop", wait_s=99.0), 30.0),
        # Whoever waits does it outside of the batch.
        (WAIT, SHORT_WAIT_S),
        (MissingExpert(wait_s=2.0), SHORT_WAIT_S),
        (MissingExpert(wait_s=0.01), 0.01),
    ],
)
def test_patience_inside_a_batch(expert_options: MissingExpert, patience_s: float) -> None:
    options = BatchExpertOptions(
        [(1, ExpertOptions(FAIL)), (2, ExpertOptions(expert_options))], 5, 30.0
    )
    short = SHORT_WAIT_S
    assert options.patience_T.tolist() == [short, patience_s, patience_s, short, short]


def test_without_groups_all_wait_outside() -> None:
    assert BatchExpertOptions(None, 2, 30.0).patience_T.tolist() == [SHORT_WAIT_S] * 2


def test_a_batch_that_is_not_the_groups_waits_as_a_whole() -> None:
    assert BatchExpertOptions([(4, ExpertOptions(FAIL))], 3, 30.0).patience_T.tolist() == [30.0] * 3


def test_only_a_small_part_of_the_gate_weights_is_dropped() -> None:
    weights = np.array([[0.8, 0.2], [0.6, 0.4], [0.8, 0.2], [0.0, 0.0]], dtype=np.float32)
    options = BatchExpertOptions(
        [(2, ExpertOptions(DROP)), (1, ExpertOptions(FAIL)), (1, ExpertOptions(DROP))], 4, 30.0
    )
    dropped, lost = options.decide(np.array([1, 3, 5, 7]), weights.reshape(-1), 2)
    assert dropped == pytest.approx({0: 0.2})
    assert lost == [1, 2, 3]


def test_the_cap_holds_for_all_missing_experts_of_a_token_together() -> None:
    options = BatchExpertOptions([(1, ExpertOptions(DROP))], 1, 30.0)
    weights = np.array([0.6, 0.2, 0.2], dtype=np.float32)
    assert options.decide(np.array([1]), weights, 3).dropped == pytest.approx({0: 0.2})
    assert options.decide(np.array([1, 2]), weights, 3).lost == [0]


def test_what_was_dropped_adds_up() -> None:
    assert DroppedExperts(0.0, 0).and_then(0.2).and_then(0.1) == DroppedExperts(0.2, 2)


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
    while world.outcome is None:
        world.pass_to_next()
    assert world.now == pytest.approx(0.5, abs=0.01)
    assert world.outcome.lost.tolist() == [0, 3]
    world.check_whole()


def test_patience_counts_from_when_nobody_has_the_expert() -> None:
    world = World(placement(1, 1), POLICY)
    (host,) = world.hosts.values()
    world.welcome(host)
    world.begin(np.array([[0], [1]], dtype=np.int32), patience_T=np.full(2, 0.1))
    world.pass_time(0.9)
    world.kill(host)
    world.pass_time(0.05)
    assert world.outcome is None
    world.pass_time(0.1)
    assert world.outcome is not None
    assert world.outcome.lost.tolist() == [0, 1]


def test_a_wait_for_room_on_a_host_that_has_the_expert_takes_no_patience() -> None:
    world = World(placement(1, 1), replace(POLICY, window=1))
    (host,) = world.hosts.values()
    world.welcome(host)
    world.begin(np.array([[0], [1]], dtype=np.int32), max_rows=1, patience_T=np.full(2, 0.1))
    assert len(host.inbox) == 1, "the other choice waits for the window"
    world.pass_time(0.5)
    world.answer(host, 0)
    world.pass_time(0.5)
    world.answer(host, 0)
    assert world.outcome is not None
    assert world.outcome.ok
    world.check_whole()


def test_a_patient_row_gets_its_expert_when_it_is_back() -> None:
    world = one_dead_host()
    layer = next(iter(world.placement.layers.values()))
    gone = next(e for e in range(8) if layer.hosts(e) == ("h0",))
    world.begin(np.array([[gone], [gone]], dtype=np.int32), patience_T=np.array([0.1, 30.0]))
    world.pass_time(5.0)
    assert world.outcome is None
    world.settle()
    assert world.outcome is not None
    assert world.outcome.lost.tolist() == [0]
    world.check_whole()


# ---- fewer experts ------------------------------------------------------------------------------


def test_only_rows_that_ask_have_fewer_experts() -> None:
    few = ExpertOptions(experts_per_token=1)
    assert (
        BatchExpertOptions([(1, ExpertOptions(FAIL)), (2, ExpertOptions())], 3, 30.0).experts_T
        is None
    )
    experts_T = BatchExpertOptions([(1, ExpertOptions()), (2, few)], 4, 30.0).experts_T
    assert experts_T is not None
    assert experts_T[1:3].tolist() == [1, 1]
    assert experts_T[0] > 1000
    assert experts_T[3] > 1000
    # A batch that cannot be told apart is computed whole.
    assert BatchExpertOptions([(4, few)], 3, 30.0).experts_T is None


@given(
    tokens=st.integers(1, 6), top_k=st.integers(1, 6), seed=st.integers(0, 2**31), most=st.data()
)
def test_the_largest_choices_take_the_weight_of_all(
    tokens: int, top_k: int, seed: int, most: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    ids_TK = np.argsort(rng.random((tokens, 9)), axis=1)[:, :top_k].astype(np.int32)
    weights_TK = rng.random((tokens, top_k), dtype=np.float32)
    most_T = np.array(most.draw(st.lists(st.integers(1, 8), min_size=tokens, max_size=tokens)))
    kept_TK, scaled_TK = keep_top_experts(ids_TK, weights_TK, most_T)
    for token, few in enumerate(most_T):
        used = kept_TK[token] >= 0
        largest = np.argsort(-weights_TK[token], kind="stable")[:few]
        assert np.flatnonzero(used).tolist() == sorted(largest.tolist())
        assert (kept_TK[token][used] == ids_TK[token][used]).all()
        assert scaled_TK[token][used].sum() == pytest.approx(weights_TK[token].sum(), rel=1e-5)
        if few >= top_k:
            assert (scaled_TK[token] == weights_TK[token]).all()


def test_choices_that_are_unused_count_for_nothing() -> None:
    """LongCat's zero-compute experts are the trunk's, and keep their weights there."""
    ids_TK = np.array([[-1, 4, 2, -1]])
    weights_TK = np.array([[0.5, 0.1, 0.3, 0.1]], dtype=np.float32)
    kept_TK, scaled_TK = keep_top_experts(ids_TK, weights_TK, np.array([1]))
    assert kept_TK.tolist() == [[-1, -1, 2, -1]]
    assert scaled_TK[0, 2] == pytest.approx(0.4)


def test_a_token_whose_weights_are_all_zero_stays_so() -> None:
    ids_TK, weights_TK = np.array([[3, 1]]), np.zeros((1, 2), dtype=np.float32)
    kept_TK, scaled_TK = keep_top_experts(ids_TK, weights_TK, np.array([1]))
    assert kept_TK.tolist() == [[3, -1]]
    assert scaled_TK.tolist() == [[0, 0]]
