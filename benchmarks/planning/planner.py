"""The planner against DeepSeek's balancer on loads that drift, and on pools of other kinds.

    python -m benchmarks.planning.planner [--json PATH] [--shifts N] [--layers N]
    python -m benchmarks.planning.planner --growth [--sizes N]

58 layers of 256 experts, 288 slots on 32 hosts, log-normal loads. At each shift both see the new
loads; balancedness is that of the new loads, after the change. `moved` is the part of all slots
that gets other weights. `bound`: no placement with these slots is better. `with traffic`: replicas
of a layer to which tokens go. Then hosts of two kinds, redundancy, and the cost of fan-out
(`unlike_pools.py`). `--growth` instead measures how long plans take from small to large pools, and
draws it. Recorded loads are in `recorded.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.planning.growth import draw, growth
from benchmarks.planning.placing import (
    BUDGET,
    LAVISH,
    THRIFTY,
    Pool,
    bound,
    deepseek,
    drifting,
    ours,
    rated,
    static,
)
from benchmarks.planning.unlike_pools import fan_out, redundant, spared, uneven

console = Console(width=110, highlight=False)
_PARTS = ("moved", "drift", "fan_out")
_FORMATS = {"seconds": ".2f", "quiet_s": ".2f", "shift_s": ".2f", "hosts": ".4g"}


def drifts(layers: int, shifts: int) -> list[dict[str, Any]]:
    pool = Pool(layers=layers)
    rows = []
    for sigma in (0.5, 1.0):
        for drift in (0.01, 0.2, 0.5):
            loads = drifting(pool, sigma, drift, shifts, seed=0)
            ways = {
                "nothing moves": static(pool, loads, split=False),
                "nothing moves, shares follow": static(pool, loads, split=True),
                "DeepSeek's rule": deepseek(pool, loads),
                "ours, 5 % at most": ours(pool, loads, THRIFTY, BUDGET),
                "ours, any number": ours(pool, loads, LAVISH),
            }
            kind = {"sigma": sigma, "drift": drift}
            rows += [kind | {"strategy": w} | rated(pool, f, loads[1:]) for w, f in ways.items()]
            rows.append(kind | {"strategy": "bound"} | bound(pool, loads[1:]))
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(_cell(name, row.get(name)) for name in rows[0]))
    console.print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if name in _PARTS or name.endswith("_moved"):
            return f"{value:.2%}"
        return format(value, _FORMATS.get(name, ".3f" if value <= 1 else ".1f"))
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shifts", type=int, default=5)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--sizes", type=int, default=7)
    arguments = parser.parse_args()
    results: Any
    if arguments.growth:
        results = growth(arguments.sizes)
        show("growth", results)
        draw(results)
    else:
        layers, shifts = arguments.layers, arguments.shifts
        results = {
            "drift": drifts(layers, shifts),
            "half of the hosts with half the slots and speed": uneven(layers, shifts),
            "redundancy 1": redundant(layers, shifts),
            "fan-out": fan_out(layers),
            "replicas with traffic": [spared(layers)],
        }
        for title, rows in results.items():
            show(title, rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"title": "planner", "results": results}, indent=1))


if __name__ == "__main__":
    main()
