"""On which machine a host starts."""

from __future__ import annotations

import pytest

from moesaic.cluster.scaling.node_choice import PlacedHost, PoolNode, choose_node

ROOMY = {"CPU": 4.0, "place": 2.0}
A, B = PoolNode("a", ROOMY, {"zone": "x"}), PoolNode("b", ROOMY, {"zone": "y", "gpu": "h100"})
ONE = {"CPU": 1.0, "place": 1.0, "GPU": 0.0}


def test_hosts_are_spread() -> None:
    placed: list[PlacedHost] = []
    for expected in ("a", "b", "a", "b"):
        chosen = choose_node([B, A], placed, ONE, {})
        assert chosen == expected
        placed.append(PlacedHost(expected, ONE))
    assert choose_node([A, B], placed, ONE, {}) is None, "no place is left"


def test_a_node_must_have_what_the_host_reserves() -> None:
    assert choose_node([A, B], [], {"GPU": 1.0}, {}) is None
    assert choose_node([A, B], [PlacedHost("a", {"CPU": 3.5})], ONE, {}) == "b"
    assert choose_node([], [], {}, {}) is None


@pytest.mark.parametrize(
    ("labels", "chosen"),
    [
        ({"zone": "x"}, "a"),
        ({"zone": "!x"}, "b"),
        ({"zone": "in(y, z)"}, "b"),
        ({"zone": "!in(y,z)"}, "a"),
        ({"gpu": "!h100"}, "a"),
        ({"gpu": "h100", "zone": "x"}, None),
        ({"rack": "1"}, None),
    ],
)
def test_labels_select(labels: dict[str, str], chosen: str | None) -> None:
    assert choose_node([A, B], [], ONE, labels) == chosen
