"""Place one layer from scratch, for when the search by single steps ends in a local optimum.

The rule is that of DeepSeek's EPLB (`cluster/comparison/eplb.py`): replicate the experts with the
most load per replica, then pack the replicas greedily, the heaviest first. Here hosts may differ in
slots and speed, and no host holds an expert twice. Since hosts with equal slots and speed are
interchangeable, the new contents are then assigned to them so that most replicas need not move.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

import heapq

import numpy as np
from scipy.optimize import linear_sum_assignment

from .moves import LayerConstraints, Step


def repack(
    held_EH: np.ndarray, load_E: np.ndarray, speed_H: np.ndarray, constraints: LayerConstraints
) -> Step | None:
    """Return the step to the new placement, with as many replicas on each host as now.

    None if the placement would violate ``constraints``, if an expert finds no slot, or if nothing
    would change.
    """
    slots_H = held_EH.sum(axis=0)
    placed_EH = _place(_copies(load_E, int(slots_H.sum()), len(speed_H)), load_E, slots_H, speed_H)
    if placed_EH is None:
        return None
    placed_EH = _matched(placed_EH, held_EH, slots_H, speed_H)
    if not _allowed(placed_EH, constraints):
        return None
    adds = tuple((int(e), int(h)) for e, h in np.argwhere(placed_EH & ~held_EH))
    drops = tuple((int(e), int(h)) for e, h in np.argwhere(held_EH & ~placed_EH))
    return Step(adds, drops) if adds else None


def _copies(load_E: np.ndarray, slots: int, hosts: int) -> np.ndarray:
    """Return the number of replicas of each expert, (E,), at most one on each host.

    Every expert gets one, and each spare slot goes to the expert with the largest load per replica.
    That minimises the largest load per replica, since only another replica there can lower it.
    """
    copies_E = np.ones(len(load_E), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        if not heap:
            break
        _, expert = heapq.heappop(heap)
        copies_E[expert] += 1
        if copies_E[expert] < hosts:
            heapq.heappush(heap, (-float(load_E[expert]) / float(copies_E[expert]), expert))
    return copies_E


def _place(
    copies_E: np.ndarray, load_E: np.ndarray, slots_H: np.ndarray, speed_H: np.ndarray
) -> np.ndarray | None:
    """Pack the replicas into the hosts' slots, (E, H) bool; None if an expert finds no slot.

    The heaviest replica goes first, each to the host whose load / speed is the lowest with it.
    (Longest processing time first: Graham, "Bounds on Multiprocessing Timing Anomalies", 1969.)
    """
    placed_EH = np.zeros((len(load_E), len(speed_H)), dtype=bool)
    left_H, load_H = slots_H.copy(), np.zeros(len(speed_H))
    part_E = load_E / copies_E
    for expert in np.argsort(-part_E, kind="stable"):
        for _ in range(int(copies_E[expert])):
            able = np.flatnonzero((left_H > 0) & ~placed_EH[expert])
            if not len(able):
                break
            host = able[np.argmin((load_H[able] + part_E[expert]) / speed_H[able])]
            placed_EH[expert, host] = True
            left_H[host] -= 1
            load_H[host] += part_E[expert]
        if not placed_EH[expert].any():
            return None
    return placed_EH


def _matched(
    placed_EH: np.ndarray, held_EH: np.ndarray, slots_H: np.ndarray, speed_H: np.ndarray
) -> np.ndarray:
    """Permute the columns of interchangeable hosts so that the most replicas stay in place.

    This is an assignment problem: the profit of giving host i the contents planned for host j is
    the number of experts that i holds already.
    """
    matched_EH = placed_EH.copy()
    for slots, speed in set(zip(slots_H.tolist(), speed_H.tolist(), strict=True)):
        alike = np.flatnonzero((slots_H == slots) & (speed_H == speed))
        # same[i, j]: experts that host i holds and that were placed on host j.
        same = held_EH[:, alike].T.astype(np.int64) @ placed_EH[:, alike].astype(np.int64)
        rows, columns = linear_sum_assignment(-same)
        matched_EH[:, alike[rows]] = placed_EH[:, alike[columns]]
    return matched_EH


def _allowed(placed_EH: np.ndarray, constraints: LayerConstraints) -> bool:
    """Return whether pins, replicas and failure domains are as ``constraints`` demand."""
    if (constraints.pinned_EH & ~placed_EH).any() or (
        placed_EH.sum(axis=1) < constraints.min_replicas_E
    ).any():
        return False
    every = range(int(constraints.domain_H.max()) + 1)
    domains_E = sum(placed_EH[:, constraints.domain_H == d].any(axis=1).astype(int) for d in every)
    return bool(np.all(domains_E >= min(constraints.domains, len(every))))
