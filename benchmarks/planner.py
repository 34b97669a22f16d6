"""The planner against DeepSeek's balancer on loads that drift.

    python -m benchmarks.planner [--json PATH] [--shifts N]

58 layers of 256 experts, 288 slots on 32 hosts, log-normal loads. At each shift both see the new
loads; balancedness is that of the new loads, after the change. `moved` is the part of all slots
that gets other weights. `bound`: no placement with these slots is better.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from moesaic.cluster.balance import balancedness, best_balancedness, even_split
from moesaic.cluster.eplb import changed_slots, eplb, eplb_host_load
from moesaic.cluster.placement import LayerKey, LayerPlacement, ModelShape
from moesaic.cluster.plan import Plan, Policy, PoolHost
from moesaic.cluster.planner import plan

MODEL = "m"


@dataclass(frozen=True, kw_only=True)
class Pool:
    layers: int = 58
    experts: int = 256
    slots: int = 9  # of each layer on each host
    hosts: int = 32

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            model=MODEL, experts=dict.fromkeys(range(self.layers), self.experts), expert_bytes=1
        )

    @property
    def pool(self) -> list[PoolHost]:
        return [
            PoolHost(name=f"h{h:03}", slots=self.slots * self.layers) for h in range(self.hosts)
        ]

    @property
    def total_slots(self) -> int:
        return self.layers * self.hosts * self.slots


def drifting(pool: Pool, sigma: float, drift: float, shifts: int, seed: int) -> list[np.ndarray]:
    """(layers, experts) loads, the first and one behind each shift."""
    rng = np.random.default_rng(seed)
    log = sigma * rng.normal(size=(pool.layers, pool.experts))
    found = [np.exp(log)]
    for _ in range(shifts):
        log = np.sqrt(1 - drift**2) * log + drift * sigma * rng.normal(size=log.shape)
        found.append(np.exp(log))
    return found


def _loads(load_LE: np.ndarray) -> dict[LayerKey, np.ndarray]:
    return {LayerKey(MODEL, layer): load_E for layer, load_E in enumerate(load_LE)}


def _figures(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.min(values))


def ours(
    pool: Pool, loads: list[np.ndarray], budget: float | None, policy: Policy
) -> list[dict[str, float]]:
    """For each shift: balancedness without and with moves, slots moved, seconds."""
    current: dict[LayerKey, LayerPlacement] = {}
    rows = []
    for shift, load_LE in enumerate(loads):
        limit = None if budget is None or shift == 0 else int(budget * pool.total_slots)
        began = time.perf_counter()
        found = plan(
            models=[pool.shape],
            hosts=pool.pool,
            current=current,
            loads=_loads(load_LE),
            policy=Policy(
                enough=policy.enough, target=policy.target, budget=limit, load_bytes_per_s=1e30
            ),
        )
        seconds = time.perf_counter() - began
        current = dict(found.layers)
        mean, worst = _figures(list(found.after.values()))
        rows.append({
            "mean": mean, "worst": worst, "seconds": seconds,
            "moved": len(found.moves) / pool.total_slots,
        })  # fmt: skip
        _check(pool, found)
    return rows[1:]


def _check(pool: Pool, found: Plan) -> None:
    used: dict[str, int] = {}
    for layer in found.layers.values():
        for replicas in layer.replicas:
            names = [r.host for r in replicas]
            assert names and len(set(names)) == len(names)
            for name in names:
                used[name] = used.get(name, 0) + 1
    assert max(used.values()) <= pool.slots * pool.layers


def deepseek(pool: Pool, loads: list[np.ndarray]) -> list[dict[str, float]]:
    speed_H = np.ones(pool.hosts)
    before: list[np.ndarray] | None = None
    rows = []
    for load_LE in loads:
        copies = [eplb(load_E, pool.hosts, pool.slots) for load_E in load_LE]
        even = [
            balancedness(eplb_host_load(c, load_E), speed_H)
            for c, load_E in zip(copies, load_LE, strict=True)
        ]
        moved = 0 if before is None else sum(map(changed_slots, before, copies))
        mean, worst = _figures(even)
        rows.append({"mean": mean, "worst": worst, "moved": moved / pool.total_slots})
        before = copies
    return rows[1:]


def static(pool: Pool, loads: list[np.ndarray], *, split: bool) -> dict[str, float]:
    """DeepSeek's placement for the first loads, never changed; with ``split`` shares follow."""
    speed_H = np.ones(pool.hosts)
    copies = [eplb(load_E, pool.hosts, pool.slots) for load_E in loads[0]]
    means, worsts = [], []
    for load_LE in loads[1:]:
        even = [
            balancedness(
                even_split(c > 0, load_E, speed_H).sum(axis=0)
                if split
                else eplb_host_load(c, load_E),
                speed_H,
            )
            for c, load_E in zip(copies, load_LE, strict=True)
        ]
        mean, worst = _figures(even)
        means.append(mean)
        worsts.append(worst)
    return {"mean": float(np.mean(means)), "worst": min(worsts), "moved": 0.0}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    found = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return found | {"worst": min(row["worst"] for row in rows)}


def bound(pool: Pool, loads: list[np.ndarray]) -> dict[str, float]:
    slots_H, speed_H = np.full(pool.hosts, pool.slots), np.ones(pool.hosts)
    mean, worst = _figures(
        [best_balancedness(load_E, slots_H, speed_H) for load_LE in loads[1:] for load_E in load_LE]
    )
    return {"mean": mean, "worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shifts", type=int, default=5)
    parser.add_argument("--layers", type=int, default=58)
    arguments = parser.parse_args()
    pool = Pool(layers=arguments.layers)
    table = Table("loads", "way", "mean", "worst layer", "moved per shift", "s per plan")
    results = []
    policy = Policy(enough=0.96, target=0.98)
    for sigma in (0.5, 1.0):
        for drift in (0.01, 0.2, 0.5):
            loads = drifting(pool, sigma, drift, arguments.shifts, seed=0)
            ways = {
                "nothing moves": static(pool, loads, split=False),
                "nothing moves, shares follow": static(pool, loads, split=True),
                "DeepSeek's rule": _mean(deepseek(pool, loads)),
                "ours, 5 % at most": _mean(ours(pool, loads, 0.05, policy)),
                "ours, any number": _mean(
                    ours(pool, loads, None, Policy(enough=0.999, target=0.999))
                ),
                "bound": bound(pool, loads),
            }
            for way, row in ways.items():
                results.append({"sigma": sigma, "drift": drift, "way": way, **row})
                table.add_row(
                    f"sigma {sigma}, drift {drift:.0%}",
                    way,
                    f"{row['mean']:.3f}",
                    f"{row['worst']:.3f}",
                    f"{row['moved']:.2%}" if "moved" in row else "",
                    f"{row['seconds']:.2f}" if "seconds" in row else "",
                )
    Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": "planner", "results": results}, indent=1))


if __name__ == "__main__":
    main()
