"""What replicas cost while a run trains: those that do not pay are not made, or are given back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Replica
from moesaic.cluster.planner.constraints import plan_report
from moesaic.cluster.planner.plan import Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan
from moesaic.cluster.planner.upkeep import ReplicaUpkeep
from moesaic.cluster.training.step_bytes import TrainingStep, replica_bytes
from tests.helpers.effort import tries

KEY = LayerKey("m", 0)
EXPERTS = 5
POLICY = PlannerPolicy(rebalance_below=0.9, target=0.95, loading_bytes_per_s=1e9)


def upkeep(busy: float, owners: list[list[str]] | None = None, at_owner: float = 0.0) -> Any:
    """Replicas cost this part of a host's time."""
    return ReplicaUpkeep(
        model="m",
        owners={KEY: owners or []},
        elsewhere_bytes=int(1e6 * busy),
        at_owner_bytes=int(1e6 * at_owner),
        bytes_per_s=1e6,
        step_s=1.0,
    )


def planned(
    load_E: list[float],
    hosts: int,
    *,
    costs: ReplicaUpkeep | None = None,
    current: list[list[str]] | None = None,
    expert_bytes: int = 1,
    policy: PlannerPolicy = POLICY,
) -> Plan:
    """Experts stand one by one on the hosts in turn, unless ``current`` says where."""
    held = current or [[f"h{expert % hosts}"] for expert in range(len(load_E))]
    layer = LayerPlacement(
        tuple(tuple(Replica(host, 1 / len(names)) for host in names) for names in held)
    )
    return plan(
        models=[ModelShape(model="m", experts={0: len(load_E)}, expert_bytes=expert_bytes)],
        hosts=[PoolHost(name=f"h{n}") for n in range(hosts)],
        current={KEY: layer},
        loads={KEY: np.array(load_E)},
        policy=policy,
        upkeep=costs,
    )


def replicas(found: Plan) -> int:
    return sum(map(len, found.layers[KEY].replicas))


HOT = [0.8, 0.1, 0.1]  # hosts 1 and 2 have little to do


def test_a_replica_is_made_if_it_saves_more_than_its_upkeep() -> None:
    # Evened out, host 0 has 0.33 of the load: two replicas save 0.46 of a host's time in all.
    assert len(planned(HOT, 3).moves) == 2
    assert len(planned(HOT, 3, costs=upkeep(0.1)).moves) == 2
    assert not planned(HOT, 3, costs=upkeep(0.5)).moves


def test_a_replica_on_an_owner_costs_what_travels_from_there() -> None:
    owners = [["h0", "h2"], ["h1"], ["h2"]]
    found = planned(HOT, 3, costs=upkeep(10.0, owners, at_owner=0.1))
    assert [(move.key.expert, move.host) for move in found.moves] == [(0, "h2")]
    assert not planned(HOT, 3, costs=upkeep(10.0, owners, at_owner=0.5)).moves


def test_a_replica_that_has_stopped_to_pay_is_given_back_and_an_owners_stays() -> None:
    both = [["h0", "h1"], ["h1"], ["h0"]]
    found = planned([0.1, 0.1, 0.1], 2, costs=upkeep(0.5, [["h0"], ["h1"], ["h0"]]), current=both)
    assert [(key.expert, host) for key, host in found.drops] == [(0, "h1")]
    # It still takes load off a host: half of 0.8.
    found = planned([0.8, 0.1, 0.1], 2, costs=upkeep(0.2, [["h0"], ["h1"], ["h0"]]), current=both)
    assert not found.drops
    # Without a run it costs nothing.
    assert not planned([0.1, 0.1, 0.1], 2, current=both).drops


def test_what_would_take_longer_to_load_again_stays() -> None:
    both = [["h0", "h1"], ["h1"], ["h0"]]

    def drops(expert_bytes: float) -> int:
        load_E, costs, size = [0.1, 0.1, 0.1], upkeep(0.5), int(expert_bytes)
        return len(planned(load_E, 2, costs=costs, current=both, expert_bytes=size).drops)

    # It would cost 0.5 of a minute, and saves 0.04 of it.
    assert drops(27e9) == 1
    assert drops(28e9) == 0


def test_protection_comes_before_upkeep() -> None:
    policy = PlannerPolicy(redundancy=1, rebalance_below=0.9, target=0.95)
    found = planned(HOT, 3, costs=upkeep(1e9), policy=policy)
    assert {len(each) for each in found.layers[KEY].replicas} == {2}


def test_without_load_nothing_is_given_back() -> None:
    both = [["h0", "h1"], ["h0", "h1"]]
    for policy in (POLICY, PlannerPolicy(budget=0)):
        load_E = [0.0, 0.0] if policy is POLICY else [0.1, 0.1]
        found = planned(load_E, 2, costs=upkeep(0.5), current=both, policy=policy)
        assert not found.drops


def test_bytes_are_those_of_a_step_with_one_replica_more() -> None:
    for redundancy in (0, 1, 2):
        one, two = (
            TrainingStep(
                tokens=1,
                layers=1,
                hidden=1,
                top_k=1,
                hosts=9,
                weight_bytes=2,
                expert_parameters=100,
                trunk_parameters=0,
                replicas=1 + redundancy + more,
                redundancy=redundancy,
            ).bytes()
            for more in (0, 1)
        )
        more = (two.expert_gradients + two.expert_weights) - (
            one.expert_gradients + one.expert_weights
        )
        elsewhere, at_owner = replica_bytes(gradient=400, weights=200, redundancy=redundancy)
        assert elsewhere == more
        assert elsewhere - at_owner == 400 + 200


def test_a_report_says_what_was_counted() -> None:
    costs = upkeep(0.25)
    found = plan_report(planned(HOT, 3), bytes_per_s=1.0, unprotected_now=0, upkeep=costs).upkeep
    assert found is not None
    assert (found.model, found.replica_bytes, found.replica_s, found.step_s) == (
        *("m", 250_000),
        *(0.25, 1.0),
    )
    assert plan_report(planned(HOT, 3), bytes_per_s=1.0, unprotected_now=0).upkeep is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"step_s: 0\.0, but must be more than 0"):
        ReplicaUpkeep(
            model="m", owners={}, elsewhere_bytes=1, at_owner_bytes=0, bytes_per_s=1.0, step_s=0.0
        )


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    hosts = draw(st.integers(2, 4))
    names = [f"h{n}" for n in range(hosts)]
    some = st.lists(st.sampled_from(names), min_size=1, max_size=hosts, unique=True)
    return {
        "load_E": draw(
            st.lists(st.floats(0.0, 1.0), min_size=EXPERTS, max_size=EXPERTS).filter(any)
        ),
        "hosts": hosts,
        "current": [draw(some) for _ in range(EXPERTS)],
        "owners": [draw(some) for _ in range(EXPERTS)],
    }


@settings(max_examples=tries(20), deadline=None)
@given(worlds(), st.floats(0.0, 1.0))
def test_what_holds_for_any_upkeep(world: dict[str, Any], busy: float) -> None:
    owners = world.pop("owners")
    free, none = planned(**world), planned(**world, costs=upkeep(0.0, owners))
    assert (free.layers, free.moves, free.drops) == (none.layers, none.moves, none.drops)
    # However little a replica saves: none is made.
    never = planned(**world, costs=upkeep(1e12, owners, at_owner=1e12))
    before = sum(map(len, world["current"]))
    assert replicas(never) <= before
    some = planned(**world, costs=upkeep(busy, owners))
    assert {len(each) > 0 for each in some.layers[KEY].replicas} == {True}
    # The same load comes to rest: each step lowers what hosts lack and replicas cost together.
    for _ in range(4):
        held: Any = [[host for host, _ in each] for each in some.layers[KEY].replicas]
        some = planned(**world | {"current": held}, costs=upkeep(busy, owners))
    assert not some.moves
    assert not some.drops


@settings(max_examples=tries(30), deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0), min_size=3, max_size=6).filter(any),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.5),
)
def test_two_hosts_make_no_more_replicas_where_they_cost_more(
    load_E: list[float], one: float, other: float
) -> None:
    cheap, dear = sorted((one, other))
    made = [replicas(planned(load_E, 2, costs=upkeep(busy))) for busy in (cheap, dear)]
    assert made[0] >= made[1]
