"""One layer placed anew, for where a search by single moves ends before it is balanced.

The rule is DeepSeek's (`eplb.py`) for hosts with slots and speeds of their own, and no expert twice
on a host. Hosts that are alike then exchange their parts so that most of what stood stays.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

import heapq

import numpy as np
from scipy.optimize import linear_sum_assignment

from .moves import Limits, Step


def rebuild(
    held_EH: np.ndarray, load_E: np.ndarray, speed_H: np.ndarray, limits: Limits
) -> Step | None:
    """The step to a placement with as many replicas on each host; None where the limits forbid it,
    or the rule finds no place for one."""
    slots_H = held_EH.sum(axis=0)
    placed_EH = _place(_copies(load_E, int(slots_H.sum()), len(speed_H)), load_E, slots_H, speed_H)
    if placed_EH is None:
        return None
    placed_EH = _matched(placed_EH, held_EH, slots_H, speed_H)
    if not _allowed(placed_EH, limits):
        return None
    adds = tuple((int(e), int(h)) for e, h in np.argwhere(placed_EH & ~held_EH))
    drops = tuple((int(e), int(h)) for e, h in np.argwhere(held_EH & ~placed_EH))
    return Step(adds, drops) if adds else None


def _copies(load_E: np.ndarray, slots: int, hosts: int) -> np.ndarray:
    """Replicas of each expert, when each spare one goes to the largest load per replica."""
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
    """Columns of hosts that are alike, permuted to agree most with what is held."""
    matched_EH = placed_EH.copy()
    for slots, speed in set(zip(slots_H.tolist(), speed_H.tolist(), strict=True)):
        alike = np.flatnonzero((slots_H == slots) & (speed_H == speed))
        same = held_EH[:, alike].T.astype(np.int64) @ placed_EH[:, alike].astype(np.int64)
        rows, columns = linear_sum_assignment(-same)
        matched_EH[:, alike[rows]] = placed_EH[:, alike[columns]]
    return matched_EH


def _allowed(placed_EH: np.ndarray, limits: Limits) -> bool:
    if (limits.pinned_EH & ~placed_EH).any() or (placed_EH.sum(axis=1) < limits.least_E).any():
        return False
    every = range(int(limits.domain_H.max()) + 1)
    domains_E = sum(placed_EH[:, limits.domain_H == d].any(axis=1).astype(int) for d in every)
    return bool(np.all(domains_E >= min(limits.domains, len(every))))
