"""How the hottest experts of new layers are placed several times, as a chain around the hosts."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Replica
from moesaic.cluster.planner import planner
from moesaic.cluster.planner.plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.plan_builder import PlanBuilder


def pool(hosts: int, slots: int) -> list[PoolHost]:
    return [PoolHost(name=f"h{n}", slots=slots) for n in range(hosts)]


def placed(hosts: list[PoolHost], *loads: list[float]) -> Plan:
    return planner.plan(
        models=[ModelShape(model="m", experts={n: len(one) for n, one in enumerate(loads)})],
        hosts=hosts,
        current={},
        loads={LayerKey("m", n): np.array(one) for n, one in enumerate(loads)},
        policy=PlannerPolicy(),
    )


def copies(layer: LayerPlacement) -> list[int]:
    return [len(replicas) for replicas in layer.replicas]


def test_an_expert_stands_once_on_each_host_and_what_it_cannot_use_stays_free() -> None:
    """Nine slots are spare, and two of them put the hot expert on all three hosts."""
    found = placed(pool(3, 4), [100.0, 2.0, 1.0])
    assert copies(found.layers[LayerKey("m", 0)]) == [3, 1, 1]
    assert found.after[LayerKey("m", 0)] == pytest.approx(1)


def test_the_next_expert_begins_on_the_last_host_of_the_one_before() -> None:
    """Of the eight spare replicas six would be the hottest expert's, which can use three."""
    found = placed(pool(4, 3), [100.0, 30.0, 1.0, 1.0])
    layer = found.layers[LayerKey("m", 0)]
    assert copies(layer) == [4, 3, 1, 1]
    assert set(layer.hosts(1)) == {"h3", "h0", "h1"}


@pytest.mark.parametrize("second", [[5.0, 5.0, 5.0, 5.0], [20.0, 1.0, 1.0, 1.0]])
def test_the_load_of_each_host_counts_what_the_chain_put_there(second: list[float]) -> None:
    loads = {LayerKey("m", 0): np.array([9.0, 6.0, 1.0, 1.0]), LayerKey("m", 1): np.array(second)}
    shape = ModelShape(model="m", experts={0: 4, 1: 4})
    builder = PlanBuilder([shape], pool(3, 4), {}, loads, PlannerPolicy(), OperatorConstraints())
    planner._place(builder)
    check_use(builder)


def test_the_load_of_each_host_counts_what_was_dropped_and_what_a_new_replica_takes_over() -> None:
    shapes = [ModelShape(model=name, experts={0: 1}) for name in ("old", "new")]
    both = LayerPlacement(((Replica("h0", 0.5), Replica("h1", 0.5)),))
    loads = {LayerKey("old", 0): np.array([8.0]), LayerKey("new", 0): np.array([2.0])}
    builder = PlanBuilder(
        shapes,
        pool(2, 1),
        {LayerKey("old", 0): both},
        loads,
        PlannerPolicy(),
        OperatorConstraints(),
    )
    planner._place(builder)
    assert [move.replaces for move in builder.moves] == [(LayerKey("old", 0).expert(0),)]
    check_use(builder)


def check_use(builder: PlanBuilder) -> None:
    assert not builder.unplaced
    load_H = sum(search.even_load() for search in builder.searches.values())
    assert builder.use_H[False] == pytest.approx(load_H)
