"""Loads and placements as arrays: exactly what reports show, and only what is new."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.page_feed import layers as layers_module
from moesaic.cluster.page_feed.layers import (
    NO_LOAD,
    PlacedLayers,
    even_units,
    load_tenths,
    small,
)
from moesaic.cluster.placement import LayerPlacement, Replica

KEY = LayerKey("m", 3)


@given(st.lists(st.floats(0, 4e8), min_size=1, max_size=20))
def test_loads_are_those_of_reports(rates: list[float]) -> None:
    rate_E = np.array(rates)
    tenths = load_tenths(rate_E, len(rates))
    assert (tenths / 10).tolist() == np.round(rate_E, 1).tolist()
    assert tenths.dtype in (np.uint8, np.uint16, np.uint32)


def test_a_load_that_is_unknown_or_of_another_model_is_zero() -> None:
    assert load_tenths(None, 3).tolist() == load_tenths(np.ones(2), 3).tolist() == [0, 0, 0]


def test_numbers_take_as_few_bytes_as_they_need() -> None:
    assert [small(np.array([n])).itemsize for n in (0, 255, 256, 65_535, 65_536, 1 << 40)] == [
        1, 1, 2, 2, 4, 4,
    ]  # fmt: skip
    assert small(np.array([1 << 40])).tolist() == [(1 << 32) - 1]
    assert small(np.array([])).dtype == np.uint8


def test_balancedness_of_layers_with_and_without_load() -> None:
    other = LayerKey("m", 4)
    assert even_units([KEY, other], {KEY: 0.93456}).tolist() == [9346, NO_LOAD]


def placed(*experts: dict[str, float]) -> LayerPlacement:
    return LayerPlacement(tuple(tuple(Replica(*one) for one in e.items()) for e in experts))


def read(encoder: PlacedLayers, item: dict[str, np.ndarray]) -> list[dict[str, float]]:
    rest = [
        (encoder.names[host], share / 10_000)
        for host, share in zip(item["hosts"], item["shares"], strict=True)
    ]
    return [dict([rest.pop(0) for _ in range(count)]) for count in item["counts"]]


def test_a_placement_can_be_read_again() -> None:
    experts = [{"h2": 0.25, "h10": 0.75}, {}, {"gone": 1.0}]
    encoder = PlacedLayers()
    items = encoder.items({KEY: placed(*experts)}, ["h10", "h2"])
    assert list(items) == ["3:m"]
    assert read(encoder, dict(items["3:m"])) == experts
    assert encoder.names == ["h10", "h2", "gone"]


def test_layers_that_stay_are_not_encoded_again_and_those_that_go_are_gone() -> None:
    encoder = PlacedLayers()
    one, two = placed({"h": 1.0}), placed({"h": 1.0})
    other = LayerKey("m", 4)
    before = encoder.items({KEY: one, other: one}, ["h"])
    after = encoder.items({KEY: one, other: two}, ["h"])
    assert after["3:m"] is before["3:m"]
    assert after["4:m"] is not before["4:m"]
    assert list(encoder.items({KEY: one}, ["h"])) == ["3:m"]


def test_names_of_hosts_that_left_go_in_the_end() -> None:
    encoder = PlacedLayers()
    for n in range(layers_module._LEFT + 10):
        layer = {f"h{n}": 1.0}
        items = encoder.items({KEY: placed(layer)}, [f"h{n}"])
        assert read(encoder, dict(items["3:m"])) == [layer]
        assert len(encoder.names) <= layers_module._LEFT + 3
    names = encoder.names
    encoder.items({KEY: placed({"new": 1.0})}, ["new"])
    assert "new" not in names, "a list that was sent does not change"
