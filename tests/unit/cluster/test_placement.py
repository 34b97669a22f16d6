"""Placements: spreading experts over hosts, and what a placement refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import (
    LayerPlacement,
    ModelShape,
    Placement,
    PlacementId,
    Replica,
    experts_of,
    initial_placement,
)
from tests.helpers.cluster.worlds import entry

KEY = LayerKey("m", 0)


def placed(*experts: tuple[Replica, ...]) -> Placement:
    hosts = sorted({replica.host for replicas in experts for replica in replicas})
    return Placement(
        PlacementId(1, 1), {h: entry(h) for h in hosts}, {KEY: LayerPlacement(experts)}
    )


# ---- spreading ----------------------------------------------------------------------------------


@st.composite
def spreads(draw: st.DrawFn) -> tuple[list[ModelShape], list[str]]:
    hosts = [f"h{n}" for n in range(draw(st.integers(1, 7)))]
    models = [
        ModelShape(
            model=name,
            experts={
                layer: draw(st.integers(1, 40))
                for layer in draw(st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True))
            },
            replicas=draw(st.integers(1, len(hosts))),
        )
        for name in draw(st.sampled_from([["a"], ["a", "b"], ["a", "b", "c"]]))
    ]
    return models, hosts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(drawn=spreads())
def test_experts_are_spread_evenly_and_never_twice_on_a_host(
    drawn: tuple[list[ModelShape], list[str]],
) -> None:
    models, hosts = drawn
    layers = initial_placement(models, hosts)
    assert set(layers) == {LayerKey(m.model, layer) for m in models for layer in m.experts}
    for model in models:
        for number, experts in model.experts.items():
            layer = layers[LayerKey(model.model, number)]
            assert len(layer.replicas) == experts
            for expert in range(experts):
                named = layer.hosts(expert)
                assert len(set(named)) == len(named) == model.replicas
                assert sum(r.share for r in layer.replicas[expert]) == pytest.approx(1.0)
            held = [sum(h in layer.hosts(e) for e in range(experts)) for h in hosts]
            assert max(held) - min(held) <= model.replicas, "replicas of a layer"
            first = [sum(layer.hosts(e)[0] == h for e in range(experts)) for h in hosts]
            assert max(first) - min(first) <= 1, "preferred replicas of a layer"
    # A placement takes it as it is.
    Placement(PlacementId(1, 1), {host: entry(host) for host in hosts}, layers)


def test_primaries_rotate_from_layer_to_layer() -> None:
    """Expert 0 is often the busiest; one host alone must not have it in every layer."""
    hosts = ["h0", "h1", "h2"]
    layers = initial_placement(
        [ModelShape(model="m", experts=dict.fromkeys(range(6), 8), replicas=2)], hosts
    )
    first = [layers[LayerKey("m", layer)].hosts(0)[0] for layer in range(6)]
    assert first == [*hosts, *hosts]
    assert all(a != b for a, b in pairwise(first))


def test_replicas_that_do_not_fit_are_refused_by_name() -> None:
    shape = ModelShape(model="big", experts={0: 4}, replicas=3)
    with pytest.raises(ValueError, match=r"models\.big\.replicas: 3 replicas.*there are only 2"):
        initial_placement([shape], ["h0", "h1"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(drawn=spreads())
def test_experts_of_all_hosts_are_all_replicas(
    drawn: tuple[list[ModelShape], list[str]],
) -> None:
    models, hosts = drawn
    layers = initial_placement(models, hosts)
    listed = {host: experts_of(layers, host) for host in hosts}
    wanted = {
        host: {
            key.expert(expert)
            for key, layer in layers.items()
            for expert, replicas in enumerate(layer.replicas)
            if any(replica.host == host for replica in replicas)
        }
        for host in hosts
    }
    assert {host: set(keys) for host, keys in listed.items()} == wanted
    for keys in listed.values():
        assert keys == sorted(keys), "layer by layer"
        assert len(set(keys)) == len(keys)
    assert experts_of(layers, "another") == []


def test_an_experts_name_for_people() -> None:
    assert str(ExpertKey("demo", 3, 7)) == "expert 7 of layer 3 of demo"


# ---- what is refused ----------------------------------------------------------------------------


def test_an_expert_twice_on_one_host_is_refused() -> None:
    with pytest.raises(ValueError, match="expert 1 of layer 0 of m has two replicas on one host"):
        placed((Replica("h0", 1.0),), (Replica("h1", 0.5), Replica("h0", 0.2), Replica("h1", 0.3)))


def test_numbers_are_ordered_by_term_first() -> None:
    assert PlacementId(2, 0) > PlacementId(1, 99) > PlacementId(1, 98)
