"""Why a router sends calls to a host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moesaic.cluster.placement import HostEntry
from moesaic.cluster.routing.transports import path_to

HERE = HostEntry(host="a", incarnation=1, node="n", shm_address="s", grpc_address="g")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"lent": True}, None),
        ({"borrows": False}, "borrows nothing (see network.lending)"),
        ({"node": "other"}, "another machine"),
        ({"entry": replace(HERE, device="GPU-1")}, "computes on GPU-1, this router on the CPU"),
        ({"device": "GPU-1"}, "computes on the CPU, this router on GPU-1"),
        ({"entry": replace(HERE, device="GPU-1"), "device": "GPU-1"}, "has lent nothing"),
        ({"entry": replace(HERE, numa=1), "numa": 0}, "pinned to NUMA node 1, and this router to"),
        ({"entry": replace(HERE, numa=1), "numa": 1}, "has lent nothing"),
        ({"entry": replace(HERE, numa=1)}, "has lent nothing"),
        ({"transport": "grpc"}, "cannot carry memory"),
        ({}, "has lent nothing"),
        ({"transport": None}, "has lent nothing"),
    ],
)
def test_each_reason_has_its_words(changed: dict[str, Any], why: str | None) -> None:
    given: dict[str, Any] = {
        "entry": HERE,
        "transport": "shm",
        "lent": False,
        "borrows": True,
        "node": "n",
    }
    path = path_to(**(given | changed))
    assert (path.host, path.transport) == ("a", (given | changed)["transport"])
    assert path.lent is (why is None)
    assert (path.why_sent is None) if why is None else (why in (path.why_sent or ""))
