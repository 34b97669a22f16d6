"""The planner: what every plan keeps, and how good plans are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.comparison.eplb import changed_slots, eplb, eplb_host_load
from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Replica, initial_placement
from moesaic.cluster.planner.balance import balancedness, best_balancedness, even_split, water_fill
from moesaic.cluster.planner.capacity import capacity_shortage, with_default_slots
from moesaic.cluster.planner.plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan
from tests.helpers.effort import tries

M = "m"
EVER = 1e9  # loads that last so long pay for any move


def pool(hosts: int, slots: int | None = None, **more: Any) -> list[PoolHost]:
    return [PoolHost(name=f"h{n}", slots=slots, **more) for n in range(hosts)]


def shape(layers: int, experts: int, model: str = M, **more: Any) -> ModelShape:
    return ModelShape(model=model, experts=dict.fromkeys(range(layers), experts), **more)


def log_normal(rng: np.random.Generator, layers: int, experts: int, sigma: float) -> np.ndarray:
    return sigma * rng.normal(size=(layers, experts))


def loads_of(load_LE: np.ndarray, model: str = M) -> dict[LayerKey, np.ndarray]:
    return {LayerKey(model, layer): load_E for layer, load_E in enumerate(load_LE)}


def standing(layers: dict[LayerKey, LayerPlacement]) -> set[tuple[ExpertKey, str]]:
    return {
        (key.expert(expert), host)
        for key, layer in layers.items()
        for expert in range(len(layer.replicas))
        for host in layer.hosts(expert)
    }


def check(
    found: Plan,
    hosts: list[PoolHost],
    current: dict[LayerKey, LayerPlacement],
    constraints: OperatorConstraints | None = None,
) -> None:
    """What holds for every plan."""
    after = standing(dict(found.layers))
    for key, layer in found.layers.items():
        for expert, replicas in enumerate(layer.replicas):
            names = [replica.host for replica in replicas]
            assert len(set(names)) == len(names), "an expert twice on one host"
            assert bool(names) != (key.expert(expert) in found.unplaced)
            if names:
                assert sum(replica.share for replica in replicas) == pytest.approx(1)
                assert min(replica.share for replica in replicas) >= -1e-9
    used = Counter(host for _, host in after)
    left = {
        host.name: host for host in hosts if not constraints or host.name not in constraints.leaving
    }
    assert set(used) <= set(left)
    assert all(host.slots is None or used[name] <= host.slots for name, host in left.items())
    before = {(key, host) for key, host in standing(current) if host in left}
    assert {(move.key, move.host) for move in found.moves} == after - before
    assert len(found.moves) == len(after - before)
    assert set(found.drops) == before - after


# ---- splits --------------------------------------------------------------------------------------


@given(st.data())
def test_pouring_fills_the_lowest_first_and_loses_nothing(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    numbers = st.floats(0, 100)
    level = np.array(data.draw(st.lists(numbers, min_size=count, max_size=count)))
    width = np.array(data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count)))
    amount = data.draw(numbers)
    poured = water_fill(amount, level, width)
    assert poured.sum() == pytest.approx(amount, abs=1e-6)
    assert (poured >= 0).all()
    height = (level + poured) / width
    wet = poured > 1e-6
    if wet.any():
        assert np.ptp(height[wet]) < 1e-6 * max(1.0, height.max())
        assert (height[~wet] >= height[wet].max() - 1e-6).all()


def test_load_wanders_along_a_chain_of_shared_experts() -> None:
    # Host 0 is too hot; only by way of host 1 can its load reach host 2.
    held = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    load = np.array([4.0, 4.0, 3.0, 1.0, 0.0])
    flow = even_split(held, load, np.ones(3))
    assert flow.sum(axis=1) == pytest.approx(load)
    assert flow.sum(axis=0) == pytest.approx([4, 4, 4])
    assert balancedness(flow.sum(axis=0), np.ones(3)) == pytest.approx(1)


def test_split_follows_speed() -> None:
    flow = even_split(np.ones((1, 2), dtype=bool), np.array([9.0]), np.array([1.0, 2.0]))
    assert flow[0] == pytest.approx([3, 6])


@given(st.integers(0, 10_000))
@settings(max_examples=tries(25), deadline=None)
def test_no_placement_beats_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = np.exp(1.5 * rng.normal(size=12))
    speed = rng.uniform(0.5, 2, size=4)
    slots = np.full(4, 4)
    held = np.zeros((12, 4), dtype=bool)
    for expert, host in enumerate(rng.permutation(np.repeat(np.arange(4), 3))):
        held[expert, host] = True
    for host in range(4):
        held[int(rng.integers(12)), host] = True
    reached = balancedness(even_split(held, load, speed).sum(axis=0), speed)
    assert reached <= best_balancedness(load, slots, speed) + 1e-9


# ---- what every plan keeps -----------------------------------------------------------------------


@given(st.data())
@settings(max_examples=tries(60), deadline=None)
def test_any_history_of_loads_hosts_and_constraints(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    everyone = [
        PoolHost(
            name=f"h{n}",
            slots=data.draw(st.integers(4, 14)),
            speed=data.draw(st.sampled_from([0.5, 1.0, 2.0])),
            domain=data.draw(st.sampled_from(["", "a", "b"])),
        )
        for n in range(data.draw(st.integers(1, 5)))
    ]
    models = [
        shape(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6)), model)
        for model in data.draw(st.sampled_from([["m"], ["m", "n"]]))
    ]
    current: dict[LayerKey, LayerPlacement] = {}
    for _ in range(3):
        alive = [host for host in everyone if len(everyone) == 1 or rng.random() < 0.8]
        alive = alive or everyone
        leaving = frozenset(h.name for h in alive[1:] if rng.random() < 0.2)
        key = ExpertKey("m", 0, 0)
        constraints = OperatorConstraints(
            leaving=leaving,
            min_replicas={key: int(rng.integers(1, 4))},
            pins={key: frozenset({alive[0].name})} if rng.random() < 0.5 else {},
        )
        loads = {
            LayerKey(m.model, layer): np.exp(rng.normal(size=experts)) * rng.choice([0, 1, 50])
            for m in models
            for layer, experts in m.experts.items()
        }
        budget = int(rng.integers(0, 6))
        found = plan(
            models=models,
            hosts=alive,
            current=current,
            loads=loads,
            policy=PlannerPolicy(redundancy=int(rng.integers(0, 2)), budget=budget, horizon_s=EVER),
            constraints=constraints,
        )
        check(found, alive, current, constraints)
        assert sum(move.kind == "balance" for move in found.moves) <= budget
        assert all(move.reason for move in found.moves)
        room = sum(h.slots or 0 for h in alive if h.name not in leaving)
        if room >= sum(sum(m.experts.values()) for m in models):
            assert not found.unplaced
        if constraints.pins and not found.unplaced:
            # A pin waits for room only where everything else on its host is needed.
            stands = (key, alive[0].name) in standing(dict(found.layers))
            used = sum(h == alive[0].name for _, h in standing(dict(found.layers)))
            assert stands or used == alive[0].slots
        current = dict(found.layers)


def test_any_one_domain_may_be_lost_whenever_there_is_room() -> None:
    hosts = [PoolHost(name=f"h{n}", slots=16, domain="ab"[n % 2]) for n in range(4)]
    found = plan(
        models=[shape(2, 16)],
        hosts=hosts,
        current={},
        loads={},
        policy=PlannerPolicy(redundancy=1),
    )
    check(found, hosts, {})
    assert not found.unprotected
    for layer in found.layers.values():
        for expert in range(16):
            assert {int(name[1:]) % 2 for name in layer.hosts(expert)} == {0, 1}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=tries(40), deadline=None)
def test_balancing_never_takes_protection_away(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hosts = [PoolHost(name=f"h{n}", slots=10, domain="ab"[n % 2]) for n in range(4)]
    current: dict[LayerKey, LayerPlacement] = {}
    for _ in range(4):
        found = plan(
            models=[shape(1, 16)],
            hosts=hosts,
            current=current,
            loads={LayerKey(M, 0): np.exp(1.5 * rng.normal(size=16))},
            policy=PlannerPolicy(redundancy=1, target=0.99, rebalance_below=0.99, horizon_s=EVER),
        )
        check(found, hosts, current)
        assert not found.unprotected
        current = dict(found.layers)


@pytest.mark.parametrize("first", [True, False])
def test_spare_slots_under_hot_hosts_help_to_balance(first: bool) -> None:
    """Protection fills the hosts with little load, and leaves slots where nothing more should go:
    what is cold goes there, and makes room for what is hot."""
    hosts = pool(16, slots=20)
    load_E = 1.0 / np.arange(1, 129)
    policy = PlannerPolicy(redundancy=1, rebalance_below=0.95, target=0.97, horizon_s=EVER)
    arguments: dict[str, Any] = {"models": [shape(1, 128)], "hosts": hosts, "policy": policy}
    loads = {LayerKey(M, 0): load_E}
    current = {} if first else dict(plan(current={}, loads={}, **arguments).layers)
    found = plan(current=current, loads=loads, **arguments)
    check(found, hosts, current)
    assert not found.unprotected
    assert found.after[LayerKey(M, 0)] >= 0.95


def test_what_is_unprotected_is_named_with_the_memory_it_would_take() -> None:
    hosts = pool(2, 12)
    load = np.arange(1.0, 17.0)
    found = plan(
        models=[shape(1, 16, expert_bytes=10)],
        hosts=hosts,
        current={},
        loads={LayerKey(M, 0): load},
        policy=PlannerPolicy(redundancy=1),
    )
    check(found, hosts, {})
    assert len(found.unprotected) == 8
    assert found.lacking_bytes == 80
    assert max(key.expert for key in found.unprotected) < 8, "the hottest are protected first"


def test_a_lost_host_is_made_good_and_nothing_else_moves() -> None:
    hosts = pool(4, 20)
    first = plan(models=[shape(2, 16)], hosts=hosts, current={}, loads={}, policy=PlannerPolicy())
    current = dict(first.layers)
    lost = {key for key, host in standing(current) if host == "h1"}
    found = plan(
        models=[shape(2, 16)],
        hosts=[h for h in hosts if h.name != "h1"],
        current=current,
        loads={},
        policy=PlannerPolicy(budget=0),
    )
    assert {move.key for move in found.moves} == lost
    assert {move.kind for move in found.moves} == {"restore"}


def test_a_host_that_leaves_is_emptied() -> None:
    hosts = pool(3, 20)
    current = initial_placement([shape(1, 16)], ["h0", "h1", "h2"])
    constraints = OperatorConstraints(leaving=frozenset({"h2"}))
    found = plan(
        models=[shape(1, 16)],
        hosts=hosts,
        current=current,
        loads={},
        policy=PlannerPolicy(budget=0),
        constraints=constraints,
    )
    check(found, hosts, current, constraints)
    assert {move.kind for move in found.moves} == {"drain"}


def test_memory_bounds_what_a_host_holds() -> None:
    hosts = pool(2, None, memory_bytes=100)
    models = [shape(1, 4, "big", expert_bytes=40), shape(1, 4, "small", expert_bytes=10)]
    found = plan(models=models, hosts=hosts, current={}, loads={}, policy=PlannerPolicy())
    used = Counter[str]()
    for key, host in standing(dict(found.layers)):
        used[host] += 40 if key.model == "big" else 10
    assert max(used.values()) <= 100
    assert not found.unplaced


@pytest.mark.parametrize(
    "bounds",
    [
        {"slots": 9, "device_bytes": 80},
        {"memory_bytes": 10**9, "device_bytes": 80},
        {"memory_bytes": 80, "device_bytes": 10**9},
    ],
)
def test_a_device_bounds_what_a_host_holds(bounds: dict[str, Any]) -> None:
    """Beside slots and memory that the spec gives."""
    hosts = [replace(host, **bounds) for host in pool(3, None)]
    models = [shape(1, 8, expert_bytes=20, replicas=2)]
    assert "room for 12 replicas" in capacity_shortage(hosts, models, redundancy=0)
    assert not capacity_shortage([*hosts, *hosts], models, redundancy=0)
    found = plan(models=models, hosts=hosts, current={}, loads={}, policy=PlannerPolicy())
    used = Counter(host for _, host in standing(dict(found.layers)))
    assert used == {"h0": 4, "h1": 4, "h2": 4}


def test_a_device_of_known_size_leaves_slots_as_they_are_computed() -> None:
    hosts = [replace(host, device_bytes=80) for host in pool(2, None)]
    given = with_default_slots(hosts, [shape(1, 8)], redundancy=0, leaving=(), held={})
    assert [host.slots for host in given] == [6, 6]


def test_a_small_replica_makes_room_for_a_large_expert_where_free_memory_is_the_rest() -> None:
    """Of 100 bytes, 60 hold the second replica of a small expert, and 40 are free."""
    hosts = pool(2, None, memory_bytes=100)
    small, large = shape(1, 1, "small", expert_bytes=60), shape(1, 1, "large", expert_bytes=100)
    both = LayerPlacement(((Replica("h0", 0.5), Replica("h1", 0.5)),))
    current = {LayerKey("small", 0): both}
    found = plan(
        models=[small, large], hosts=hosts, current=current, loads={}, policy=PlannerPolicy()
    )
    check(found, hosts, current)
    assert not found.unplaced
    (gone,) = found.drops
    assert found.layers[LayerKey("large", 0)].hosts(0) == (gone[1],)


def test_a_small_replica_makes_no_room_where_too_little_memory_is_free() -> None:
    hosts = pool(2, None, memory_bytes=100)
    small, large = shape(1, 1, "small", expert_bytes=60), shape(1, 1, "large", expert_bytes=101)
    both = LayerPlacement(((Replica("h0", 0.5), Replica("h1", 0.5)),))
    current = {LayerKey("small", 0): both}
    found = plan(
        models=[small, large], hosts=hosts, current=current, loads={}, policy=PlannerPolicy()
    )
    check(found, hosts, current)
    assert found.unplaced == (ExpertKey("large", 0, 0),)
    assert not found.drops


def test_no_hosts() -> None:
    with pytest.raises(ValueError, match="hosts: no host is left"):
        plan(models=[shape(1, 2)], hosts=[], current={}, loads={}, policy=PlannerPolicy())


# ---- how good plans are --------------------------------------------------------------------------


def history(
    sigma: float, drift: float, budget: float | None, *, hosts: list[PoolHost], seed: int = 0
) -> tuple[list[Plan], list[np.ndarray], int]:
    """Plans for a first load and three shifts of 6 layers with 64 experts each."""
    rng = np.random.default_rng(seed)
    log = log_normal(rng, 6, 64, sigma)
    current: dict[LayerKey, LayerPlacement] = {}
    plans, loads = [], []
    slots = sum(host.slots or 0 for host in hosts)
    for step in range(4):
        if step:
            log = np.sqrt(1 - drift**2) * log + drift * log_normal(rng, 6, 64, sigma)
        found = plan(
            models=[shape(6, 64)],
            hosts=hosts,
            current=current,
            loads=loads_of(np.exp(log)),
            policy=PlannerPolicy(
                rebalance_below=0.96 if budget else 0.999,
                target=0.98 if budget else 0.999,
                budget=int(budget * slots) if budget and step else None,
                horizon_s=EVER,
            ),
        )
        check(found, hosts, current)
        current = dict(found.layers)
        plans.append(found)
        loads.append(np.exp(log))
    return plans[1:], loads, slots


@pytest.mark.parametrize(("sigma", "drift"), [(0.5, 0.2), (0.5, 0.5), (1.0, 0.2), (1.0, 0.5)])
@pytest.mark.parametrize("uneven", [False, True])
def test_a_shift_is_balanced_with_few_moves(sigma: float, drift: float, uneven: bool) -> None:
    hosts = [
        PoolHost(
            name=f"h{n}",
            slots=(6 * (6 + 6 * (n % 2))) if uneven else 6 * 9,
            speed=0.7 + 0.6 * (n % 2) if uneven else 1.0,
        )
        for n in range(8)
    ]
    plans, _, slots = history(sigma, drift, 0.05, hosts=hosts)
    for found in plans:
        assert len(found.moves) <= 0.05 * slots
        assert np.mean(list(found.after.values())) >= 0.96
        assert min(found.after.values()) >= 0.93


def test_a_little_drift_moves_next_to_nothing() -> None:
    plans, _, slots = history(1.0, 0.01, 0.05, hosts=pool(8, 6 * 9))
    for found in plans:
        assert len(found.moves) <= 0.005 * slots
        assert min(found.after.values()) >= 0.95


def test_with_any_number_of_moves_it_is_at_least_as_good_as_deepseeks_rule() -> None:
    plans, loads, _ = history(1.0, 0.5, None, hosts=pool(8, 6 * 9))
    for found, load_LE in zip(plans, loads[1:], strict=True):
        theirs = [
            balancedness(eplb_host_load(eplb(load_E, 8, 9), load_E), np.ones(8))
            for load_E in load_LE
        ]
        assert np.mean(list(found.after.values())) >= np.mean(theirs)


def test_deepseeks_rule() -> None:
    copies = eplb(np.array([6.0, 2.0, 2.0, 2.0]), hosts=3, slots=2)
    assert copies.sum(axis=1).tolist() == [3, 1, 1, 1]
    assert copies.sum(axis=0).tolist() == [2, 2, 2]
    assert eplb_host_load(copies, np.array([6.0, 2.0, 2.0, 2.0])).tolist() == [4, 4, 4]
    assert changed_slots(copies, copies) == 0
    assert changed_slots(copies, np.roll(copies, 1, axis=0)) > 0
    with pytest.raises(ValueError, match="too few"):
        eplb(np.ones(7), hosts=3, slots=2)


def test_what_is_balanced_enough_is_left_alone_but_shares_follow() -> None:
    hosts = pool(2, 4)
    both = (Replica("h0", 0.5), Replica("h1", 0.5))
    current = {LayerKey(M, 0): LayerPlacement((both, both))}
    found = plan(
        models=[shape(1, 2)],
        hosts=hosts,
        current=current,
        loads={LayerKey(M, 0): np.array([9.0, 1.0])},
        policy=PlannerPolicy(),
    )
    assert not found.moves
    assert not found.drops
    assert found.after[LayerKey(M, 0)] == pytest.approx(1)


def test_moves_that_do_not_pay_for_their_bytes_are_left_out() -> None:
    hosts = pool(4, 8)
    current = initial_placement([shape(1, 16)], [h.name for h in hosts])
    load = np.ones(16)
    load[0] = 12.0
    found: dict[float, Plan] = {}
    for scale in (1e-6, 1.0):
        found[scale] = plan(
            models=[shape(1, 16, expert_bytes=10**9)],
            hosts=hosts,
            current=current,
            loads={LayerKey(M, 0): load * scale},
            policy=PlannerPolicy(horizon_s=60, loading_bytes_per_s=1e9),
        )
    assert not found[1e-6].moves
    assert found[1.0].moves
    assert "exceeds its target" in found[1.0].moves[0].reason


@pytest.mark.parametrize("pays", [True, False])
def test_hot_experts_of_one_model_displace_cold_replicas_of_another(pays: bool) -> None:
    hosts = pool(2, 6)
    # Where the load does not last, the step is not taken, and the other model keeps its replica.
    hot = shape(1, 4, "hot", expert_bytes=10**9)
    cold = shape(1, 4, "cold", expert_bytes=10**9)
    names = ["h0", "h1"]
    current = {
        **initial_placement([hot], names),
        **initial_placement([shape(1, 4, "cold", replicas=2)], names),
    }
    load = np.array([10.0, 1.0, 1.0, 1.0])
    found = plan(
        models=[hot, cold],
        hosts=hosts,
        current=current,
        loads={LayerKey("hot", 0): load, LayerKey("cold", 0): np.full(4, 0.01)},
        policy=PlannerPolicy(horizon_s=EVER if pays else 1e-3, loading_bytes_per_s=1e9),
    )
    check(found, hosts, current)
    assert [move.key for move in found.moves] == ([ExpertKey("hot", 0, 0)] if pays else [])
    assert [key.model for key, _ in found.drops] == (["cold"] if pays else [])
    assert (found.after[LayerKey("hot", 0)] > 0.98) == pays
