"""Split a layer's load over the replicas of a placement as evenly as possible, by linear programs.

A split says how much of each expert's load goes to each of its hosts. There are two programs:
`even_split` minimises load / speed of the busiest host, and `split_below`, for the search for a
better placement, minimises the load above given capacities and also says which hosts cause it.

Both route flow from experts to the hosts that hold them: as many variables as replicas, one
equation for each expert (its flows add up to its load) and one inequality for each host. Experts
with one replica leave no choice, so their load becomes a constant of their host (`_Forced`).

Shapes: E experts of one layer, H hosts, N replicas of the experts that have several, V variables of
a linear program. Loads are assignments per second or any other unit of work; speeds are in the same
unit, and may be relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

# Rounds of smoothing after the linear program; each takes load off the busier hosts of an expert.
_SMOOTHING_ROUNDS = 4
# Hosts whose load / speed differs by less than this fraction of the mean count as even.
_LEVEL = 1e-6


@dataclass(frozen=True, slots=True)
class Split:
    """The load of each replica, and the load that does not fit."""

    flow_EH: np.ndarray  # load of each expert on each host
    excess_H: np.ndarray  # load above the host's capacity
    # 1 where one more unit of capacity would remove one unit of excess, else 0
    price_H: np.ndarray

    @property
    def excess(self) -> float:
        return float(self.excess_H.sum())


@dataclass(frozen=True, slots=True)
class _Forced:
    """The part of a split that leaves no choice: experts with one replica."""

    base_H: np.ndarray  # their load on each host
    flow_EH: np.ndarray  # the same by expert
    free_E: np.ndarray  # indices of the experts with load and several replicas
    row_N: np.ndarray  # for each replica of these: the position of its expert in free_E
    host_N: np.ndarray  # and its host


def _forced(held_EH: np.ndarray, load_E: np.ndarray) -> _Forced:
    copies_E = held_EH.sum(axis=1)
    flow_EH = held_EH * np.where(copies_E == 1, load_E, 0.0)[:, None]
    free_E = np.flatnonzero((copies_E > 1) & (load_E > 0))
    row_N, host_N = np.nonzero(held_EH[free_E])
    return _Forced(flow_EH.sum(axis=0), flow_EH, free_E, row_N, host_N)


def _solve(
    forced: _Forced,
    load_E: np.ndarray,
    cost_V: np.ndarray,
    over_VH: csr_matrix,
    bound_H: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise ``cost_V`` @ x and return (x, the price of each host).

    The first N of the variables x >= 0 are the loads of replicas; the others belong to the caller.
    ``over_VH``, an (H, V) matrix, @ x <= ``bound_H`` holds for the hosts. A host's price is the
    dual value of its row: by how much the minimum falls if its bound grows by one.
    """
    replicas = len(forced.row_N)
    whole = csr_matrix(
        (np.ones(replicas), (forced.row_N, np.arange(replicas))),
        shape=(len(forced.free_E), len(cost_V)),
    )
    result = linprog(
        cost_V,
        A_ub=over_VH,
        b_ub=bound_H,
        A_eq=whole,
        b_eq=load_E[forced.free_E],
        method="highs",
    )
    if result.x is None:
        raise ArithmeticError(f"the linear program of a split failed: {result.message}")
    return result.x, -result.ineqlin.marginals


def split_below(held_EH: np.ndarray, load_E: np.ndarray, capacity_H: np.ndarray) -> Split:
    """Return the split with the least load above ``capacity_H``; skip experts without a replica.

    The program: minimise sum(excess_h), where base_h + sum_e(flow_eh) - excess_h <= capacity_h. All
    its coefficients are those of a network flow, so the prices are 0 or 1.
    """
    forced = _forced(held_EH, load_E)
    replicas, hosts = len(forced.row_N), len(capacity_H)
    if not replicas:
        excess_H = np.maximum(forced.base_H - capacity_H, 0.0)
        return Split(forced.flow_EH, excess_H, (excess_H > 0).astype(float))
    over = csr_matrix(
        (
            np.r_[np.ones(replicas), -np.ones(hosts)],
            (
                np.r_[forced.host_N, np.arange(hosts)],
                np.r_[np.arange(replicas), replicas + np.arange(hosts)],
            ),
        ),
        shape=(hosts, replicas + hosts),
    )
    cost = np.r_[np.zeros(replicas), np.ones(hosts)]
    found, price_H = _solve(forced, load_E, cost, over, capacity_H - forced.base_H)
    flow_EH = forced.flow_EH
    flow_EH[forced.free_E[forced.row_N], forced.host_N] = found[:replicas]
    return Split(flow_EH, found[replicas:], price_H)


def even_split(held_EH: np.ndarray, load_E: np.ndarray, speed_H: np.ndarray) -> np.ndarray:
    """Return flow_EH with the least possible load / speed on the busiest host.

    The program: minimise t, where base_h + sum_e(flow_eh) <= t * speed_h. It leaves the other hosts
    open, so `_smooth` evens them out afterwards: then the load may drift a little without harm.
    """
    forced = _forced(held_EH, load_E)
    replicas, hosts = len(forced.row_N), len(speed_H)
    flow_EH = forced.flow_EH
    if replicas:
        over = csr_matrix(
            (
                np.r_[np.ones(replicas), -speed_H],
                (
                    np.r_[forced.host_N, np.arange(hosts)],
                    np.r_[np.arange(replicas), np.full(hosts, replicas)],
                ),
            ),
            shape=(hosts, replicas + 1),
        )
        cost = np.r_[np.zeros(replicas), 1.0]
        found, _ = _solve(forced, load_E, cost, over, -forced.base_H)
        flow_EH[forced.free_E[forced.row_N], forced.host_N] = found[:replicas]
        _smooth(flow_EH, held_EH, forced.free_E, load_E, speed_H)
    return flow_EH


def _smooth(
    flow_EH: np.ndarray,
    held_EH: np.ndarray,
    free_E: np.ndarray,
    load_E: np.ndarray,
    speed_H: np.ndarray,
) -> None:
    """Split each expert's load anew in turn, given the others' loads; changes ``flow_EH``.

    `water_fill` never lifts a host of the expert above the one that was the busiest of them, so the
    optimum of the linear program is kept.
    """
    load_H = flow_EH.sum(axis=0)
    if np.ptp(load_H / speed_H) <= _LEVEL * load_H.sum() / speed_H.sum():
        return
    for _ in range(_SMOOTHING_ROUNDS):
        for expert in free_E:
            hosts = np.flatnonzero(held_EH[expert])
            others = load_H[hosts] - flow_EH[expert, hosts]
            poured = water_fill(float(load_E[expert]), others, speed_H[hosts])
            load_H[hosts] = others + poured
            flow_EH[expert, hosts] = poured


def water_fill(amount: float, level_N: np.ndarray, width_N: np.ndarray) -> np.ndarray:
    """Return how much of ``amount`` goes to each vessel if the lowest are filled up evenly, (N,).

    Water-filling: a vessel is a host, its width the speed, its level the load so far, and its
    height load / speed. (Boyd and Vandenberghe, "Convex Optimization", 2004, example 5.2.)
    """
    height_N = level_N / width_N
    order = np.argsort(height_N)
    widths, levels = np.cumsum(width_N[order]), np.cumsum(level_N[order])
    # If only the n lowest vessels get water, they all end at the height surfaces[n - 1].
    surfaces = (amount + levels) / widths
    # The first n for which that is no higher than the next vessel; all of them if there is none.
    used = int(np.argmax(np.r_[surfaces[:-1] <= height_N[order][1:], True]))
    return np.maximum(surfaces[used] * width_N - level_N, 0.0)


def shares(flow_EH: np.ndarray, held_EH: np.ndarray, speed_H: np.ndarray) -> np.ndarray:
    """Return the fraction of each expert's load on each host, (E, H); rows with replicas sum to 1.

    Experts without load are split by the speeds of their hosts.
    """
    total_E = flow_EH.sum(axis=1, keepdims=True)
    by_speed = held_EH * speed_H
    even = by_speed / np.maximum(by_speed.sum(axis=1, keepdims=True), 1e-300)
    return np.where(total_E > 0, flow_EH / np.where(total_E > 0, total_E, 1.0), even)


def balancedness(load_H: np.ndarray, speed_H: np.ndarray, least: float = 0.0) -> float:
    """Return total load / total speed, divided by load / speed of the busiest host; 1 without load.

    A mean below ``least`` counts as ``least``: so little load need not be spread over all hosts.
    """
    busiest = float((load_H / speed_H).max())
    if not busiest > 0:
        return 1.0
    return min(1.0, max(float(load_H.sum() / speed_H.sum()), least) / busiest)


def best_balancedness(load_E: np.ndarray, slots_H: np.ndarray, speed_H: np.ndarray) -> float:
    """Return an upper bound: no placement with ``slots_H`` slots has a higher balancedness.

    If no host is to exceed a level of load / speed, an expert needs at least as many replicas as
    the fastest hosts need to carry it, and all experts together must not need more than the slots
    of all hosts. Bisection finds the lowest level that meets this necessary condition.
    """
    # carried_H[n]: the speed of the n fastest hosts together, so (H + 1,).
    carried_H = np.r_[0.0, np.cumsum(np.sort(speed_H)[::-1])]
    ideal = load_E.sum() / speed_H.sum()
    if not ideal:
        return 1.0

    def enough(level: float) -> bool:
        if load_E.max() > level * carried_H[-1] * (1 + 1e-12):
            return False
        needed = np.searchsorted(level * carried_H * (1 + 1e-12), load_E)
        return int(np.maximum(needed, 1).sum()) <= int(slots_H.sum())

    low, high = ideal, float(load_E.sum() / speed_H.max())
    if enough(low):
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(ideal / high)
