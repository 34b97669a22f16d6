"""How evenly a layer's load can be split over the replicas that stand, as linear programs.

A split says which part of each expert's load goes to which of its hosts. Two questions are asked of
it: how low the busiest host can be (`even_split`), and, while a better placement is searched, how
much load does not fit below a given level (`split_below`), with the prices that say why.

Shapes: E experts of one layer, H hosts. Loads in tokens per second or any other unit of work,
speeds in the same unit per second, relative ones too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

# Rounds of smoothing behind the linear program; each takes load off the busier hosts of an expert.
_SMOOTHING_ROUNDS = 4
# Hosts that differ by less than this part are even.
_LEVEL = 1e-6


@dataclass(frozen=True, slots=True)
class Split:
    """Loads on replicas, and what does not fit."""

    flow_EH: np.ndarray
    excess_H: np.ndarray  # above the host's capacity
    # 1 where one more unit of capacity would take one unit of excess away, else 0
    price_H: np.ndarray

    @property
    def excess(self) -> float:
        return float(self.excess_H.sum())


@dataclass(frozen=True, slots=True)
class _Forced:
    """The part of a split that is decided: experts with one replica."""

    base_H: np.ndarray
    flow_EH: np.ndarray
    free_E: np.ndarray  # numbers of experts with several replicas
    row_N: np.ndarray  # for each of their replicas: the expert's place in free_E,
    host_N: np.ndarray  # and the host


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
    """(variables, prices of hosts); the first variables are the loads of replicas."""
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
    """The split with the least load above ``capacity_H``. Experts without replica are left out."""
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
    """flow_EH with the least possible load / speed on the busiest host.

    Among such splits it is one that loads the others evenly too, so that loads may drift a little
    without harm. Experts without load are shared out by their hosts' speeds.
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
    """Level each expert's hosts in turn; no host of it rises above the highest of them."""
    load_H = flow_EH.sum(axis=0)
    if np.ptp(load_H / speed_H) <= _LEVEL * load_H.sum() / speed_H.sum():
        return
    for _ in range(_SMOOTHING_ROUNDS):
        for expert in free_E:
            hosts = np.flatnonzero(held_EH[expert])
            others = load_H[hosts] - flow_EH[expert, hosts]
            poured = pour(float(load_E[expert]), others, speed_H[hosts])
            load_H[hosts] = others + poured
            flow_EH[expert, hosts] = poured


def pour(amount: float, level_N: np.ndarray, width_N: np.ndarray) -> np.ndarray:
    """Pour ``amount`` into vessels so that their fillings / widths become as equal as they can."""
    height_N = level_N / width_N
    order = np.argsort(height_N)
    widths, levels = np.cumsum(width_N[order]), np.cumsum(level_N[order])
    # With the n lowest vessels in use the surface stands at surfaces[n - 1].
    surfaces = (amount + levels) / widths
    used = int(np.argmax(np.r_[surfaces[:-1] <= height_N[order][1:], True]))
    return np.maximum(surfaces[used] * width_N - level_N, 0.0)


def shares(flow_EH: np.ndarray, held_EH: np.ndarray, speed_H: np.ndarray) -> np.ndarray:
    """(E, H): the part of each expert's load on each of its hosts; rows with replicas sum to 1."""
    total_E = flow_EH.sum(axis=1, keepdims=True)
    by_speed = held_EH * speed_H
    even = by_speed / np.maximum(by_speed.sum(axis=1, keepdims=True), 1e-300)
    return np.where(total_E > 0, flow_EH / np.where(total_E > 0, total_E, 1.0), even)


def balancedness(load_H: np.ndarray, speed_H: np.ndarray, least: float = 0.0) -> float:
    """All load / all speed, divided by the load / speed of the busiest host; 1 without load.

    What is below ``least`` counts as that: so little need not be spread over all hosts.
    """
    busiest = float((load_H / speed_H).max())
    if not busiest > 0:
        return 1.0
    return min(1.0, max(float(load_H.sum() / speed_H.sum()), least) / busiest)


def best_balancedness(load_E: np.ndarray, slots_H: np.ndarray, speed_H: np.ndarray) -> float:
    """A bound: no placement with ``slots_H`` replicas on the hosts is balanced better.

    At a level t of load / speed an expert needs at least as many replicas as the fastest hosts
    take to carry it, and all experts together at most the slots there are.
    """
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
