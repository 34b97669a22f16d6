"""The size of a simulated world, and its times: those of a real pool, shortened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...cluster.control.control import ControlPolicy
from ...cluster.placement import ModelShape
from ...cluster.planner.plan import FleetGroup, PlannerPolicy
from ...cluster.routing.policy import RouterPolicy
from ...cluster.scaling.autoscaler import ScalePolicy

_EXPERT_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Size and times of a simulated world; times given by their mean are exponential."""

    routers: int
    models: tuple[ModelShape, ...]
    in_memory: frozenset[str] = frozenset()  # models without a checkpoint, attached by a trunk
    groups: tuple[FleetGroup, ...]
    scale: ScalePolicy
    pending_s: float = 3.0
    start_s: float = 0.3  # mean time to start a new host
    control: ControlPolicy
    router: RouterPolicy
    tick_s: float = 0.2
    report_timeout_s: float = 0.5
    load_timeout_s: float = 5.0
    watch_s: float = 0.3  # longest time until a controller answers a router's report
    patience_s: float = 0.4  # how much longer a router waits for the answer
    rest_s: float = 0.1  # a router's pause after a report that failed
    think_s: float = 0.15  # mean time between two calls of a trunk
    load_s: float = 0.05  # mean time to load one expert
    plan_s: float = 0.1  # mean time to plan
    updates: bool = False  # whether experts get new weights
    calls_at_once: int = 1  # that a router may have in progress
    lends: bool = False  # whether hosts lend to trunks of their node
    nodes: int = 1
    lent_s: float = 0.01  # mean time of a trunk to compute what was lent

    def compute_s(self, rows: int) -> float:
        return 0.002 + 0.0005 * rows


def draw(rng: np.random.Generator) -> Settings:
    """Draw the settings of a small random world."""
    hosts = int(rng.integers(3, 6))
    redundancy = int(rng.integers(0, 2))
    names = ["m"] if rng.random() < 0.7 else ["m", "n"]
    models = tuple(
        ModelShape(
            model=name,
            experts=dict.fromkeys(range(2 if len(names) == 2 else int(rng.integers(2, 4))), 8),
            replicas=int(rng.integers(1, 3)),
            expert_bytes=_EXPERT_BYTES,
        )
        for name in names
    )
    experts = sum(sum(shape.experts.values()) for shape in models)
    tight = int(np.ceil(1.3 * experts * (redundancy + 1) / (hosts - 1)))
    slots = tight if rng.random() < 0.5 else None
    in_memory = frozenset(names[1:]) if rng.random() < 0.5 else frozenset()
    domains = 2 if hosts >= 4 and rng.random() < 0.3 else 1
    elastic = rng.random() < 0.7
    counts = [hosts // domains + (group < hosts % domains) for group in range(domains)]
    # Simulated trunks make few calls: hosts are 1 to 4 % busy, and scaling has to react to that.
    high = float(rng.uniform(0.01, 0.06))
    return Settings(
        groups=tuple(
            FleetGroup(
                count=count,
                min_count=max(1, count - 2) if elastic else count,
                max_count=count + 2 if elastic else count,
                slots=slots,
                domain=f"d{group}" if domains > 1 else "",
            )
            for group, count in enumerate(counts)
        ),
        scale=ScalePolicy(
            scale_up_above=high,
            scale_down_below=high / 3,
            up_after_s=0.0,
            down_after_s=1.0,
            cooldown_s=1.0,
        ),
        routers=int(rng.integers(1, 4)),
        models=models,
        in_memory=in_memory,
        control=ControlPolicy(
            balance=PlannerPolicy(
                redundancy=redundancy,
                rebalance_below=0.9,
                target=0.95,
                horizon_s=30.0,
                loading_bytes_per_s=50e6,
            ),
            every_s=4.0,
            budget=0.2,
            host_timeout_s=3.0,
            lease_s=2.0,
            bytes_per_s=20e6,
            batch_bytes=4 * _EXPERT_BYTES,
            retry_s=0.5,
        ),
        updates=bool(rng.random() < 0.4),
        calls_at_once=int(rng.integers(1, 5)),
        lends=bool(rng.random() < 0.6),
        nodes=int(rng.integers(1, 3)),
        router=RouterPolicy(
            deadline_s=6.0,
            attempt_s=0.4,
            probe_max_s=0.5,
            connect_s=0.5,
            orphan_s=3.0,
            splits_lent=bool(rng.random() < 0.5),
        ),
    )
