"""Ways to follow a load that shifts, and how good the placements are: for the planner's benchmarks.

Shapes: L layers, E experts of a layer, H hosts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from moesaic.cluster.comparison.eplb import changed_slots, eplb
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape
from moesaic.cluster.planner.balance import balancedness, best_balancedness, even_split
from moesaic.cluster.planner.plan import Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan

MODEL = "m"
# What the planner is told with a budget, and where any number of moves is allowed.
THRIFTY = PlannerPolicy(rebalance_below=0.96, target=0.98, loading_bytes_per_s=1e30)
LAVISH = PlannerPolicy(rebalance_below=0.999, target=0.999, loading_bytes_per_s=1e30)
BUDGET = 0.05  # part of all slots


@dataclass(frozen=True, kw_only=True)
class Pool:
    layers: int = 58
    experts: int = 256
    slots: int = 9  # of each layer on each host
    hosts: int = 32
    small: int = 0  # hosts with half the slots and half the speed

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            model=MODEL, experts=dict.fromkeys(range(self.layers), self.experts), expert_bytes=1
        )

    @property
    def speed_h(self) -> np.ndarray:
        return np.where(np.arange(self.hosts) < self.small, 0.5, 1.0)

    @property
    def pool(self) -> list[PoolHost]:
        return [
            PoolHost(name=f"h{h:03}", slots=int(self.slots * self.layers * speed), speed=speed)
            for h, speed in enumerate(self.speed_h.tolist())
        ]

    @property
    def total_slots(self) -> int:
        return sum(host.slots or 0 for host in self.pool)


@dataclass(frozen=True, kw_only=True)
class Shift:
    """What stands behind one shift of the load."""

    held_EH: list[np.ndarray]  # of each layer: who holds what,
    share_EH: list[np.ndarray]  # and the part of each expert's load on each host
    moved: float  # part of all slots that got other weights
    seconds: float = 0.0
    unprotected: int = 0

    def balancedness(self, load_LE: np.ndarray, speed_H: np.ndarray) -> list[float]:
        return [
            balancedness(load_E @ share_EH, speed_H)
            for load_E, share_EH in zip(load_LE, self.share_EH, strict=True)
        ]

    @property
    def replicas_with_traffic(self) -> float:
        """Of a layer, in the mean."""
        return float(np.mean([(share_EH > 0).sum() for share_EH in self.share_EH]))


def drifting(pool: Pool, sigma: float, drift: float, shifts: int, seed: int) -> list[np.ndarray]:
    """(L, E) loads, the first and one behind each shift."""
    rng = np.random.default_rng(seed)
    log = sigma * rng.normal(size=(pool.layers, pool.experts))
    found = [np.exp(log)]
    for _ in range(shifts):
        log = np.sqrt(1 - drift**2) * log + drift * sigma * rng.normal(size=log.shape)
        found.append(np.exp(log))
    return found


def loads_of(load_LE: np.ndarray) -> dict[LayerKey, np.ndarray]:
    return {LayerKey(MODEL, layer): load_E for layer, load_E in enumerate(load_LE)}


def ours(
    pool: Pool, loads: list[np.ndarray], policy: PlannerPolicy, budget: float | None = None
) -> list[Shift]:
    """The planner on each load in turn, with a part of all slots as budget behind the first."""
    current: dict[LayerKey, LayerPlacement] = {}
    shifts = []
    for number, load_LE in enumerate(loads):
        limit = None if budget is None or not number else int(budget * pool.total_slots)
        began = time.perf_counter()
        found = plan(
            models=[pool.shape],
            hosts=pool.pool,
            current=current,
            loads=loads_of(load_LE),
            policy=replace(policy, budget=limit),
        )
        seconds = time.perf_counter() - began
        current = dict(found.layers)
        check(pool, found)
        layers = [shares_of(layer, pool) for _, layer in sorted(current.items())]
        shifts.append(
            Shift(
                held_EH=[held_EH for held_EH, _ in layers],
                share_EH=[share_EH for _, share_EH in layers],
                moved=len(found.moves) / pool.total_slots,
                seconds=seconds,
                unprotected=len(found.unprotected),
            )
        )
    return shifts[1:]


def shares_of(layer: LayerPlacement, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    """(held_EH, share_EH)"""
    index = {host.name: h for h, host in enumerate(pool.pool)}
    held_EH = np.zeros((len(layer.replicas), pool.hosts), dtype=bool)
    share_EH = np.zeros(held_EH.shape)
    for expert, replicas in enumerate(layer.replicas):
        for host, share in replicas:
            held_EH[expert, index[host]] = True
            share_EH[expert, index[host]] = share
    return held_EH, share_EH


def check(pool: Pool, found: Plan) -> None:
    """No expert without host or twice on one, and no host above its slots."""
    used: dict[str, int] = {}
    for layer in found.layers.values():
        for replicas in layer.replicas:
            names = [r.host for r in replicas]
            assert names and len(set(names)) == len(names)
            for name in names:
                used[name] = used.get(name, 0) + 1
    for host in pool.pool:
        assert used.get(host.name, 0) <= (host.slots or 0)


def deepseek(pool: Pool, loads: list[np.ndarray]) -> list[Shift]:
    """DeepSeek's rule on each load in turn, on hosts that are alike."""
    before: list[np.ndarray] = []
    shifts = []
    for load_LE in loads:
        copies = [eplb(load_E + 1e-9, pool.hosts, pool.slots) for load_E in load_LE]
        moved = sum(map(changed_slots, before, copies))
        shifts.append(_evenly(copies, moved / pool.total_slots))
        before = copies
    return shifts[1:]


def static(pool: Pool, loads: list[np.ndarray], *, split: bool) -> list[Shift]:
    """DeepSeek's placement for the first load, never changed; with ``split`` shares follow."""
    copies = [eplb(load_E + 1e-9, pool.hosts, pool.slots) for load_E in loads[0]]
    shifts = []
    for load_LE in loads[1:]:
        shift = _evenly(copies, 0.0)
        if split:
            flows = [
                even_split(held_EH, load_E + 1e-9, pool.speed_h)
                for held_EH, load_E in zip(shift.held_EH, load_LE, strict=True)
            ]
            shares = [flow_EH / flow_EH.sum(axis=1, keepdims=True) for flow_EH in flows]
            shift = replace(shift, share_EH=shares)
        shifts.append(shift)
    return shifts


def _evenly(copies: list[np.ndarray], moved: float) -> Shift:
    """Every expert's load split evenly over its replicas."""
    return Shift(
        held_EH=[copies_EH > 0 for copies_EH in copies],
        share_EH=[copies_EH / copies_EH.sum(axis=1, keepdims=True) for copies_EH in copies],
        moved=moved,
    )


def rated(pool: Pool, shifts: list[Shift], loads: list[np.ndarray]) -> dict[str, float]:
    """``loads``: those behind each of the shifts. Means, and the worst layer of all."""
    even = [
        value
        for shift, load_LE in zip(shifts, loads, strict=True)
        for value in shift.balancedness(load_LE, pool.speed_h)
    ]
    return {
        "mean": float(np.mean(even)),
        "worst": min(even),
        "moved": float(np.mean([shift.moved for shift in shifts])),
        "with_traffic": float(np.mean([shift.replicas_with_traffic for shift in shifts])),
        "seconds": float(np.mean([shift.seconds for shift in shifts])),
    }


def bound(pool: Pool, loads: list[np.ndarray]) -> dict[str, float]:
    """What no placement with these slots exceeds."""
    slots_H = np.array([host.slots or 0 for host in pool.pool]) / pool.layers
    even = [
        best_balancedness(load_E, slots_H, pool.speed_h) for load_LE in loads for load_E in load_LE
    ]
    return {"mean": float(np.mean(even)), "worst": min(even)}
