"""The planner on pools that are not made of equal hosts for one model.

Called by `benchmarks.planning.planner`: hosts of two sizes and speeds, redundancy, and what the
cost of fan-out saves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.planning.placing import (
    BUDGET,
    LAVISH,
    THRIFTY,
    Pool,
    Shift,
    bound,
    drifting,
    ours,
    rated,
)
from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import ModelShape
from moesaic.cluster.planner.balance import balancedness, even_split
from moesaic.cluster.planner.plan import Plan, PoolHost
from moesaic.cluster.planner.planner import plan

Row = dict[str, Any]


def uneven(layers: int, shifts: int) -> list[Row]:
    """Half of the hosts with half the slots and half the speed, as many slots in all."""
    pool = Pool(layers=layers, slots=12, small=16)
    rows = []
    for drift in (0.2, 0.5):
        loads = drifting(pool, 1.0, drift, shifts, seed=0)
        ways = {
            "5 % at most": ours(pool, loads, THRIFTY, BUDGET),
            "any number": ours(pool, loads, LAVISH),
        }
        for way, found in ways.items():
            rows.append({"drift": drift, "strategy": way, **rated(pool, found, loads[1:])})
        rows.append({"drift": drift, "strategy": "bound", **bound(pool, loads[1:])})
    return rows


def redundant(layers: int, shifts: int) -> list[Row]:
    """Every expert survives the loss of any host; `lost` counts those that would not."""
    rows = []
    for small in (0, 16):
        # Two replicas of each of 256 experts and an eighth more, as many on either kind of pool.
        pool = Pool(layers=layers, slots=24 if small else 18, small=small)
        loads = drifting(pool, 1.0, 0.5, shifts, seed=0)
        found = ours(pool, loads, replace(THRIFTY, redundancy=1), BUDGET)
        rows.append({
            "hosts": "of two kinds" if small else "alike",
            **rated(pool, found, loads[1:]),
            "unprotected": max(shift.unprotected for shift in found),
            "lost": max(map(lost, found)),
        })  # fmt: skip
    return rows


def lost(shift: Shift) -> int:
    """Experts of a layer that nobody would hold after the loss of one host, the worst one."""
    return max(
        int((held_EH.sum(axis=1) - held_EH[:, host] == 0).sum())
        for held_EH in shift.held_EH
        for host in range(held_EH.shape[1])
    )


def fan_out(layers: int) -> list[Row]:
    """A model with 64 experts and a hundredth of the load beside one with 256, on 32 hosts: what
    is spread how far with the cost of fan-out and without."""
    pool = Pool(layers=layers, slots=12)
    few = ModelShape(model="small", experts=dict.fromkeys(range(layers // 2), 64), expert_bytes=1)
    rng = np.random.default_rng(0)
    loads = {
        LayerKey(shape.model, layer): scale * np.exp(rng.normal(size=experts)) / experts
        for shape, scale in ((pool.shape, 1.0), (few, 0.01))
        for layer, experts in shape.experts.items()
    }
    rows = []
    for part in (0.0, THRIFTY.consolidate_below):
        policy = replace(THRIFTY, consolidate_below=part)
        found = plan(
            models=[pool.shape, few], hosts=pool.pool, current={}, loads=loads, policy=policy
        )
        for shape in (pool.shape, few):
            keys = [LayerKey(shape.model, layer) for layer in shape.experts]
            rows.append({
                "fan_out": part,
                "model": "much load" if shape is not few else "a hundredth of it",
                "hosts": float(np.mean([len(_load_of(found, [key], loads)) for key in keys])),
                "mean": float(np.mean([found.after[key] for key in keys])),
                "worst": min(found.after[key] for key in keys),
                "pool": _pool_balancedness(found, loads, pool.pool),
            })  # fmt: skip
    return rows


def _load_of(
    found: Plan, keys: list[LayerKey], loads: dict[LayerKey, np.ndarray]
) -> dict[str, float]:
    """The load of layers on each host that has some."""
    by_host: dict[str, float] = {}
    for key in keys:
        for load, replicas in zip(loads[key].tolist(), found.layers[key].replicas, strict=True):
            for host, share in replicas:
                if load * share > 0:
                    by_host[host] = by_host.get(host, 0.0) + load * share
    return by_host


def _pool_balancedness(
    found: Plan, loads: dict[LayerKey, np.ndarray], hosts: list[PoolHost]
) -> float:
    by_host = _load_of(found, list(loads), loads)
    load_H = np.array([by_host.get(host.name, 0.0) for host in hosts])
    return balancedness(load_H, np.array([host.speed for host in hosts]))


def spared(layers: int) -> Row:
    """Replicas with traffic in a layer, by the linear program with smoothing, and behind it."""
    pool = Pool(layers=layers)
    loads = drifting(pool, 0.5, 0.2, 2, seed=0)
    found = ours(pool, loads, THRIFTY, BUDGET)
    split = [
        (even_split(held_EH, load_E, pool.speed_h) > 0).sum()
        for shift, load_LE in zip(found, loads[1:], strict=True)
        for held_EH, load_E in zip(shift.held_EH, load_LE, strict=True)
    ]
    return {
        "split": float(np.mean(split)),
        "spared": rated(pool, found, loads[1:])["with_traffic"],
        "experts": pool.experts,
    }
