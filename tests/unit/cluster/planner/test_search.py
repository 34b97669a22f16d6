"""The search for better replicas of one layer."""

from __future__ import annotations

import numpy as np

from moesaic.cluster.planner.moves import FreeCapacity, LayerConstraints
from moesaic.cluster.planner.search import LayerSearch


def search_of(held_EH: np.ndarray, load_E: np.ndarray, slots_H: list[int]) -> LayerSearch:
    experts, hosts = held_EH.shape
    return LayerSearch(
        held_EH.astype(bool),
        load_E,
        np.ones(hosts),
        free=FreeCapacity(np.array(slots_H), np.full(hosts, 1 << 40)),
        expert_bytes=1,
        constraints=LayerConstraints(
            domain_H=np.arange(hosts),
            domains=1,
            min_replicas_E=np.ones(experts, dtype=np.int64),
            pinned_EH=np.zeros((experts, hosts), dtype=bool),
        ),
    )


def test_a_full_host_is_wanted_behind_any_number_of_slack_hosts_with_room() -> None:
    # Host 0 is over. Hosts 1 to 4 have the most slack, and room; host 5 has slack and is full.
    search = search_of(np.eye(6), np.array([10.0, 0.1, 0.1, 0.1, 0.1, 1.0]), [0, 1, 1, 1, 1, 0])
    search.retarget(0.98)
    assert search.wanted_hosts() == [5]
