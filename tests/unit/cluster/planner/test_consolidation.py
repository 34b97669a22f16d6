"""Over how many hosts and replicas the traffic of a layer goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.control.change_impact import balancedness_under
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Replica
from moesaic.cluster.planner.balance import balancedness, even_split
from moesaic.cluster.planner.consolidation import consolidate, consolidation_level
from moesaic.cluster.planner.plan import Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan
from tests.helpers.effort import tries

BIG, SMALL = "big", "small"
POLICY = PlannerPolicy(consolidate_below=0.1, horizon_s=1e9)


def pool(count: int, slots: int) -> list[PoolHost]:
    return [PoolHost(name=f"h{n}", slots=slots) for n in range(count)]


def shape(model: str, layers: int, experts: int) -> ModelShape:
    return ModelShape(model=model, experts=dict.fromkeys(range(layers), experts))


def traffic(found: Plan, loads: Mapping[LayerKey, np.ndarray]) -> dict[LayerKey, dict[str, float]]:
    """Load of each layer on each host that has some."""
    by_host: dict[LayerKey, dict[str, float]] = {}
    for key, layer in found.layers.items():
        on = by_host.setdefault(key, {})
        for load, replicas in zip(loads[key].tolist(), layer.replicas, strict=True):
            for host, share in replicas:
                if load * share > 0:
                    on[host] = on.get(host, 0.0) + load * share
    return by_host


# ---- splits --------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 1.5, 20.0]))
@settings(max_examples=tries(150), deadline=None)
def test_gathering_loses_nothing_and_overloads_nobody(seed: int, least_part: float) -> None:
    rng = np.random.default_rng(seed)
    experts, hosts = int(rng.integers(1, 12)), int(rng.integers(1, 7))
    held_EH = rng.random((experts, hosts)) < 0.5
    held_EH[np.arange(experts), rng.integers(0, hosts, experts)] = True
    load_E = np.exp(rng.normal(size=experts)) * (rng.random(experts) < 0.9)
    speed_H = rng.choice([0.5, 1.0, 2.0], size=hosts)
    mean = load_E.sum() / speed_H.sum()
    least = least_part * mean
    flow_EH = even_split(held_EH, load_E, speed_H)
    found_EH = consolidate(flow_EH, held_EH, speed_H, least, rng.random(hosts))
    assert found_EH.sum(axis=1) == pytest.approx(load_E)
    assert (found_EH >= 0).all()
    assert not found_EH[~held_EH].any()
    busiest = (flow_EH.sum(axis=0) / speed_H).max()
    level = max(busiest, 1.005 * mean, least)
    assert (found_EH.sum(axis=0) / speed_H).max() <= level * (1 + 1e-9)
    if mean >= least:  # to spare a host, an expert may be split over more of the others
        assert (found_EH > 0).sum() <= (flow_EH > 0).sum()
    assert (found_EH > 0).any(axis=0).sum() <= (flow_EH > 0).any(axis=0).sum()
    before = balancedness(flow_EH.sum(axis=0), speed_H, least)
    assert balancedness(found_EH.sum(axis=0), speed_H, least) >= before * 0.995 - 1e-9


def test_a_share_that_balance_does_not_need_is_spared() -> None:
    # Without expert 0 on host 1, host 0 is a thousandth above the mean.
    held_EH = np.array([[1, 1], [1, 0], [0, 1]], dtype=bool)
    load_E = np.array([5.01, 5.0, 10.0])
    flow_EH = even_split(held_EH, load_E, np.ones(2))
    assert (flow_EH > 0).sum() == 4
    found_EH = consolidate(flow_EH, held_EH, np.ones(2), 0.0, np.zeros(2))
    assert found_EH[0].tolist() == pytest.approx([5.01, 0.0])


def test_what_is_split_for_balance_stays_split() -> None:
    flow_EH = np.array([[5.0, 5.0]])
    found_EH = consolidate(flow_EH, np.ones((1, 2), dtype=bool), np.ones(2), 0.0, np.zeros(2))
    assert found_EH.tolist() == flow_EH.tolist()


def test_little_load_leaves_the_hosts_that_other_layers_use_most() -> None:
    held_EH = np.ones((4, 3), dtype=bool)
    flow_EH = np.full((4, 3), 1 / 3)
    found_EH = consolidate(flow_EH, held_EH, np.ones(3), 4.0, np.array([2.0, 1.0, 3.0]))
    assert found_EH.sum(axis=0).tolist() == pytest.approx([0.0, 4.0, 0.0])
    # Below 2.5 a host it takes two of them.
    found_EH = consolidate(flow_EH, held_EH, np.ones(3), 2.5, np.array([2.0, 1.0, 3.0]))
    assert found_EH.sum(axis=0)[2] == 0
    assert found_EH.sum(axis=0).max() <= 2.5


def test_little_load_counts_as_even() -> None:
    least = consolidation_level([np.array([30.0, 10.0]), np.array([1.0])], np.ones(4), 0.1)
    assert least == pytest.approx(1.0)
    assert consolidation_level([], np.ones(4), 0.1) == 0.0
    assert balancedness(np.array([1.0, 0, 0, 0]), np.ones(4)) == pytest.approx(0.25)
    assert balancedness(np.array([1.0, 0, 0, 0]), np.ones(4), least) == 1.0
    assert balancedness(np.array([2.0, 0, 0, 0]), np.ones(4), least) == pytest.approx(0.5)
    assert balancedness(np.array([8.0, 0, 0, 0]), np.ones(4), least) == pytest.approx(0.25)


def test_the_status_counts_as_the_planner_does() -> None:
    layers = {
        LayerKey(BIG, 0): LayerPlacement(((Replica("h0", 0.5), Replica("h1", 0.5)),)),
        LayerKey(SMALL, 0): LayerPlacement(((Replica("h0", 1.0),),)),
    }
    loads = {LayerKey(BIG, 0): np.array([100]), LayerKey(SMALL, 0): np.array([4])}
    found = balancedness_under(layers, loads, pool(2, 4), 0.1)
    assert found == {LayerKey(BIG, 0): 1.0, LayerKey(SMALL, 0): 1.0}
    assert balancedness_under(layers, loads, pool(2, 4))[LayerKey(SMALL, 0)] == 0.5


# ---- plans ---------------------------------------------------------------------------------------


def two_models(small_load: float) -> tuple[list[ModelShape], dict[LayerKey, np.ndarray]]:
    models = [shape(BIG, 4, 32), shape(SMALL, 4, 8)]
    rng = np.random.default_rng(3)
    loads = {LayerKey(BIG, layer): 10 * np.exp(0.5 * rng.normal(size=32)) for layer in range(4)}
    loads |= {LayerKey(SMALL, layer): np.full(8, small_load / 8) for layer in range(4)}
    return models, loads


@pytest.mark.parametrize("redundancy", [0, 1])
def test_a_new_layer_takes_as_many_hosts_as_its_load_needs(redundancy: int) -> None:
    # A heavy layer has some 45 of load on each host; a tenth of that is spread no further. One host
    # more than that may be needed, where those that a layer has are full.
    hosts = pool(8, 80)
    for small_load, most_hosts in ((1.0, 1), (8.0, 3), (400.0, 8)):
        models, loads = two_models(small_load)
        found = plan(
            models=models,
            hosts=hosts,
            current={},
            loads=loads,
            policy=replace(POLICY, redundancy=redundancy),
        )
        assert not found.unplaced
        assert not found.unprotected
        by_host = traffic(found, loads)
        assert all(len(by_host[LayerKey(BIG, layer)]) == 8 for layer in range(4))
        counts = [len(by_host[LayerKey(SMALL, layer)]) for layer in range(4)]
        assert max(counts) <= most_hosts
        assert min(found.after.values()) >= 0.95
        use = np.array(
            [sum(layer.get(host.name, 0.0) for layer in by_host.values()) for host in hosts]
        )
        assert balancedness(use, np.ones(8)) >= 0.97, "the pool as a whole stays even"
        # What it does with less fan-out it could do with more: the same slots hold it all.
    homes = {host for layer in range(4) for host in traffic(found, loads)[LayerKey(SMALL, layer)]}
    assert len(homes) == 8


def test_without_the_cost_of_fan_out_every_layer_is_spread() -> None:
    models, loads = two_models(1.0)
    policy = replace(POLICY, consolidate_below=0.0)
    found = plan(models=models, hosts=pool(8, 24), current={}, loads=loads, policy=policy)
    by_host = traffic(found, loads)
    assert all(len(by_host[LayerKey(SMALL, layer)]) >= 6 for layer in range(4))


def test_a_layer_whose_load_nobody_knows_is_spread() -> None:
    models, loads = two_models(1.0)
    known = {key: load for key, load in loads.items() if key.model == BIG}
    found = plan(models=models, hosts=pool(8, 24), current={}, loads=known, policy=POLICY)
    for layer in range(4):
        replicas = found.layers[LayerKey(SMALL, layer)].replicas
        assert len({replica.host for of in replicas for replica in of}) >= 6


def test_little_load_is_gathered_without_moves_and_spread_again_when_it_grows() -> None:
    hosts = pool(8, 96)
    models, heavy = two_models(400.0)
    everywhere = tuple(Replica(host.name, 1 / 8) for host in hosts)
    current = {
        LayerKey(SMALL, layer): LayerPlacement((everywhere,) * 8) for layer in range(4)
    } | dict(
        plan(models=models[:1], hosts=pool(8, 64), current={}, loads=heavy, policy=POLICY).layers
    )
    _, light = two_models(1.0)
    small = [LayerKey(SMALL, layer) for layer in range(4)]
    for loads, count in ((light, 1), (heavy, 8)):
        found = plan(models=models, hosts=hosts, current=current, loads=loads, policy=POLICY)
        assert not found.moves
        assert not found.drops
        assert [len(traffic(found, loads)[key]) for key in small] == [count] * 4
        current = dict(found.layers)


def test_one_model_alone_is_as_balanced_as_without_the_cost() -> None:
    models, loads = two_models(1.0)
    found = {
        fan_out: plan(
            models=models[:1],
            hosts=pool(8, 36),
            current={},
            loads=loads,
            policy=replace(POLICY, consolidate_below=fan_out),
        )
        for fan_out in (0.0, 0.1)
    }
    assert found[0.0].layers == found[0.1].layers
    assert min(found[0.1].after.values()) >= 0.98


def test_fan_out_is_a_part() -> None:
    with pytest.raises(ValueError, match=r"consolidate_below: 1.5, but must be from 0 to 1"):
        PlannerPolicy(consolidate_below=1.5)
