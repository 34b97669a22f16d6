"""A layer placed anew, and the benchmark that recorded loads go through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planning.placing import BUDGET, LAVISH, MODEL, THRIFTY, Pool, deepseek, ours, rated
from benchmarks.planning.recorded import compare, shifts_of
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.load.trace import Trace
from moesaic.cluster.planner.greedy_repack import repack
from moesaic.cluster.planner.moves import LayerConstraints
from tests.helpers.effort import tries


def limits(experts: int, hosts: int) -> LayerConstraints:
    return LayerConstraints(
        domain_H=np.arange(hosts),
        domains=1,
        min_replicas_E=np.ones(experts, dtype=np.int64),
        pinned_EH=np.zeros((experts, hosts), dtype=bool),
    )


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=tries(80), deadline=None)
def test_what_is_placed_anew_keeps_slots_and_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, hosts = int(rng.integers(1, 10)), int(rng.integers(1, 6))
    held_EH = rng.random((experts, hosts)) < 0.5
    held_EH[np.arange(experts), rng.integers(0, hosts, experts)] = True
    found = limits(experts, hosts)
    if seed % 2:
        found.pinned_EH[0, int(np.argmax(held_EH[0]))] = True
    step = repack(held_EH, np.exp(rng.normal(size=experts)), rng.choice([0.5, 1.0], hosts), found)
    if step is None:
        return
    after_EH = held_EH.copy()
    for where in step.drops:
        assert after_EH[where]
        after_EH[where] = False
    for where in step.adds:
        assert not after_EH[where]
        after_EH[where] = True
    assert after_EH.any(axis=1).all()
    assert (after_EH.sum(axis=0) <= held_EH.sum(axis=0)).all()
    assert not (found.pinned_EH & ~after_EH).any()


def test_hosts_that_are_alike_keep_what_they_have() -> None:
    held_EH = np.array([[0, 1], [1, 0]], dtype=bool)
    assert repack(held_EH, np.array([2.0, 1.0]), np.ones(2), limits(2, 2)) is None


# ---- recorded loads ------------------------------------------------------------------------------

POOL = Pool(layers=6, experts=8, slots=2, hosts=5)


def recorded(domains: int, windows: int) -> Trace:
    """Windows of domains that come in turn, twice, each with hot experts of its own."""
    rng = np.random.default_rng(5)
    part_DLE = np.exp(0.9 * rng.normal(size=(domains, POOL.layers, POOL.experts)))
    part_DLE /= part_DLE.sum(axis=-1, keepdims=True)
    mean_WLE = 1000 * np.tile(np.repeat(part_DLE, windows, axis=0), (2, 1, 1))
    count_WLE = rng.poisson(mean_WLE)
    nobody = np.zeros((len(count_WLE), 0))
    return Trace(
        window_s=1.0,
        counts={LayerKey(MODEL, layer): count_WLE[:, layer] for layer in range(POOL.layers)},
        hosts=(),
        assignments_WH=nobody.astype(np.int64),
        busy_s_WH=nobody,
        queued_s_WH=nobody,
    )


def test_shifts_between_domains() -> None:
    trace = recorded(domains=4, windows=3)
    seen, later = shifts_of(trace, windows=3, seen=2)
    assert len(seen) == len(later) == 8
    total = sum(load.sum() for load in seen) + sum(load.sum() for load in later)
    assert total == sum(counts.sum() for counts in trace.counts.values())
    rows = {row["strategy"]: row for row in compare(POOL, 0, seen, later)}
    still, theirs = rows["nothing moves"], rows["DeepSeek's rule"]
    few, many, limit = rows["ours, 5 % at most"], rows["ours, any number"], rows["bound"]
    assert few["moved"] <= BUDGET
    assert still["mean"] + 0.05 < few["mean"] < many["mean"] <= limit["mean"]
    # Few large experts: where single moves end, the layer is placed anew.
    assert many["mean"] >= theirs["mean"]
    assert many["moved"] < theirs["moved"]
    assert all(row["later_mean"] <= limit["later_mean"] + 1e-9 for row in rows.values())
    assert [len(row["shifts"]) for row in rows.values()] == [7] * 5


@pytest.mark.parametrize("small", [0, 4])
def test_pools_of_the_benchmark(small: int) -> None:
    pool = Pool(layers=2, experts=32, slots=12 if small else 9, hosts=8, small=small)
    rng = np.random.default_rng(0)
    loads = [np.exp(rng.normal(size=(2, 32))) for _ in range(3)]
    found = ours(pool, loads, replace(THRIFTY, redundancy=1), BUDGET)
    assert [shift.unprotected for shift in found] == [0, 0]
    assert all((held_EH.sum(axis=1) >= 2).all() for shift in found for held_EH in shift.held_EH)
    figures = rated(pool, ours(pool, loads, LAVISH), loads[1:])
    assert figures["mean"] >= 0.98
    if not small:
        assert figures["mean"] >= rated(pool, deepseek(pool, loads), loads[1:])["mean"]
