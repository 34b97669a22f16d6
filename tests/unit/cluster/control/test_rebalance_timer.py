"""When the balancer looks."""

from __future__ import annotations

import numpy as np

from moesaic.cluster.comparison.compare import control_policy, pool_of
from moesaic.cluster.comparison.elastic_placement import MoesaicStrategy
from moesaic.cluster.control.policy import RebalanceTimer
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import ModelShape
from moesaic.cluster.planner.balance import balancedness


def test_it_looks_every_so_often() -> None:
    rhythm = RebalanceTimer(10.0)
    assert rhythm.is_due(0.0, None)
    rhythm.note_check(0.0)
    assert not rhythm.is_due(9.9, None)
    assert rhythm.is_due(10.0, None)


def test_it_looks_soon_behind_a_shift_and_once() -> None:
    rhythm = RebalanceTimer(10.0)
    rhythm.note_check(100.0)
    assert not rhythm.is_due(103.5, shifted_at=103.0), "a window of the new traffic comes first"
    assert rhythm.is_due(104.0, shifted_at=103.0)
    rhythm.note_check(104.0)
    assert not rhythm.is_due(105.0, shifted_at=103.0)
    assert rhythm.is_due(114.0, shifted_at=103.0)


def test_it_rests_behind_a_failure_whatever_happens() -> None:
    rhythm = RebalanceTimer(10.0)
    rhythm.note_check(0.0)
    rhythm.pause(5.0)
    assert not rhythm.is_due(104.9, shifted_at=50.0)
    assert rhythm.is_due(105.0, shifted_at=50.0)


def test_a_shift_is_answered_long_before_the_next_regular_look() -> None:
    key = LayerKey("m", 0)
    shape = ModelShape(model="m", experts={0: 16}, expert_bytes=1_000_000)
    pool = pool_of([shape], hosts=4, slots=6, assignments_per_s=1e4, loading_bytes_per_s=1e8)
    policy = control_policy(pool, every_s=60.0, budget=1.0, redundancy=0)
    ours = MoesaicStrategy(pool, policy, ticks=4)

    def second(hot: range) -> float:
        """Balancedness of a second in which a quarter of the experts have most of the load."""
        counts_E = np.full(16, 100)
        counts_E[list(hot)] = 2000
        served = ours.serve({key: counts_E}, 1.0)
        return balancedness(served.load_H[key], pool.speeds)

    # On hosts of their own, as the first placement has them.
    before = [second(range(0, 16, 4)) for _ in range(70)]
    assert before[0] < 0.5
    assert before[-1] > 0.95
    behind = [second(range(1, 16, 4)) for _ in range(6)]
    assert behind[0] < 0.5
    assert behind[-1] > 0.95
