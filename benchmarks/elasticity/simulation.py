"""The simulated pool under faults, seed by seed, and two days of traffic.

    python -m benchmarks.elasticity.simulation [--json PATH] [--seeds N] [--pictures FOLDER]

Faults: small pools (3 to 5 hosts, 1 to 3 trunks) that are broken at random for 12 simulated
seconds; the invariants are checked after every event. Day: 8 layers of 64 experts on 8 hosts, four
domains of traffic whose shares move over 24 hours. Tide: 4 such layers, four times as much traffic
at the height of the day as at night; the autoscaler may have 2 to 8 hosts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.charts import PICTURES, line_chart
from moesaic.actors.simulator.world import SeedRun, run_seed
from moesaic.cluster.comparison.compare import StrategyResult, shifting_day
from moesaic.cluster.comparison.elastic_placement import Elastic

console = Console(width=100, highlight=False)
_HOURS = [0, 4, 8, 12, 16, 20, 24]
_NAMES = {"EPLB every 12": "DeepSeek's rule, once an hour"}


def faults(seeds: int, processes: int) -> dict[str, Any]:
    began = time.perf_counter()
    # Fresh processes: none shares memory, or the order of its sets, with another.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        runs: list[SeedRun] = list(pool.map(run_seed, range(seeds), chunksize=10))
    seconds = time.perf_counter() - began
    kinds: Counter[str] = Counter()
    for run in runs:
        kinds.update(run.faults)
    broken = [run for run in runs if run.violation is not None]
    table = Table("fault", "times", title=f"{seeds:,} seeds")
    for kind, times in sorted(kinds.items()):
        table.add_row(kind, f"{times:,}")
    console.print(table)
    for run in broken:
        assert run.violation is not None
        console.print(f"seed {run.seed}: {run.violation.invariant}: {run.violation.message}")
    found = {
        "seeds": seeds,
        "events": sum(run.events for run in runs),
        "calls": sum(run.calls for run in runs),
        "simulated_s": round(sum(run.simulated_s for run in runs), 1),
        "faults": dict(sorted(kinds.items())),
        "violations": {run.seed: asdict(run.violation) for run in broken if run.violation},
        "seconds": round(seconds, 1),
        "processes": processes,
    }
    console.print(
        f"{found['events']:,} events, {found['calls']:,} calls, {found['simulated_s']:,} simulated "
        f"seconds in {seconds:.1f} s on {processes} cores: {len(broken)} violations"
    )
    return found


def day(pictures: Path) -> list[dict[str, Any]]:
    began = time.perf_counter()
    hours, found = shifting_day()
    seconds = time.perf_counter() - began
    table = _table(f"a day of shifting traffic ({seconds:.0f} s)", "GB moved")
    for one in found:
        table.add_row(*_row(one), f"{one.moved_bytes / 1e9:,.1f}")
    console.print(table)
    draw(hours, found, pictures)
    return _plain(found)


def tide(pictures: Path, *, layers: int = 4, window_s: float = 300.0) -> list[dict[str, Any]]:
    began = time.perf_counter()
    hours, found = shifting_day(
        layers=layers,
        slots=20,
        window_s=window_s,
        utilisation=0.5,
        swing=0.6,
        elastic=Elastic(min_hosts=2, max_hosts=8),
    )
    seconds = time.perf_counter() - began
    table = _table(f"a day of traffic that ebbs ({seconds:.0f} s)", "host-hours", "scalings")
    for one in found:
        table.add_row(*_row(one), f"{one.host_hours:,.1f}", f"{one.scale_events}")
    console.print(table)
    draw_hosts(hours, found, pictures)
    return _plain(found)


def _name(one: StrategyResult) -> str:
    return _NAMES.get(one.strategy, one.strategy)


def _table(title: str, *more: str) -> Table:
    return Table(
        "placement", "balancedness", "worst layer", "SLO missed", "slots moved", *more, title=title
    )


def _row(one: StrategyResult) -> tuple[str, ...]:
    return (
        one.strategy,
        f"{one.balancedness_mean:.3f}",
        f"{one.balancedness_worst:.3f}",
        f"{one.slo_violations} of {one.windows}",
        f"{one.moved_slots:,}",
    )


def _plain(found: list[StrategyResult]) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(one).items() if not k.endswith("_W")} for one in found]


def draw(hours: list[float], found: list[StrategyResult], pictures: Path) -> None:
    line_chart(
        pictures / "day-balancedness.svg",
        title="Balancedness over a day of shifting traffic, mean over layers",
        x_label="hour of the day",
        y_label="balancedness (1 is even)",
        x=hours,
        x_ticks=_HOURS,
        lines={_name(one): one.balancedness_W for one in found},
    )
    line_chart(
        pictures / "day-moves.svg",
        title="Slots that got other experts, added up over the day",
        x_label="hour of the day",
        y_label="slots moved",
        x=hours,
        x_ticks=_HOURS,
        y_from=0.0,
        lines={_name(one): list(itertools.accumulate(one.moved_W)) for one in found},
    )


def draw_hosts(hours: list[float], found: list[StrategyResult], pictures: Path) -> None:
    line_chart(
        pictures / "day-hosts.svg",
        title="Hosts over a day of traffic that ebbs",
        x_label="hour of the day",
        y_label="hosts",
        x=hours,
        x_ticks=_HOURS,
        y_from=0.0,
        lines={_name(one): one.hosts_W for one in found if one.strategy.startswith("ours")},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    checked = faults(arguments.seeds, arguments.processes)
    results = {
        "faults": checked,
        "day": day(arguments.pictures),
        "tide": tide(arguments.pictures),
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"title": "simulation", "results": results}, indent=1)
        arguments.json.write_text(text + "\n")
    return 1 if checked["violations"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
