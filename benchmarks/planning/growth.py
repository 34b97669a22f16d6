"""How long a plan takes, from small pools to large ones.

Called by `benchmarks.planning.planner --growth`: at each size a first placement, a plan for a load
that has not changed, and one for a load that has shifted (sigma 1, 50 % drift, at most 5 % of slots
moved).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.charts import PICTURES, line_chart
from benchmarks.planning.placing import BUDGET, THRIFTY, Pool, drifting, ours

# (layers, experts, hosts, slots of each layer on each host)
SIZES = (
    (16, 64, 8, 9),
    (58, 128, 16, 9),
    (58, 256, 32, 9),
    (58, 256, 64, 5),
    (58, 256, 128, 3),
    (61, 384, 256, 3),
    (61, 384, 512, 2),
)


def growth(sizes: int) -> list[dict[str, Any]]:
    """The first so many of `SIZES`."""
    rows = []
    for layers, experts, hosts, slots in SIZES[:sizes]:
        pool = Pool(layers=layers, experts=experts, hosts=hosts, slots=slots)
        first, shifted = drifting(pool, 1.0, 0.5, 1, seed=0)
        quiet, full = ours(pool, [first, first, shifted], THRIFTY, BUDGET)
        rows.append({
            "layers": layers, "experts": experts, "hosts": hosts, "slots": pool.total_slots,
            "quiet_s": quiet.seconds, "quiet_moved": quiet.moved,
            "shift_s": full.seconds, "shift_moved": full.moved,
        })  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], path: Path = PICTURES / "planner-growth.svg") -> None:
    line_chart(
        path,
        title="How long a plan takes, on one core",
        x_label="slots in the pool, all layers together",
        y_label="seconds for a plan",
        x=[row["slots"] for row in rows],
        y_from=0.0,
        lines={
            "a shift": [row["shift_s"] for row in rows],
            "nothing to move": [row["quiet_s"] for row in rows],
        },
    )
