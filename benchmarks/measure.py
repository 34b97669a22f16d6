"""Comparing ways to do one thing on a machine that is never quite quiet.

The contenders take turns, round by round, so that whatever else the machine does hits all of them
alike; a ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Medians of one case; ``ratio`` is that of ``ours`` to ``base``, smaller is faster."""

    case: str
    ours: str
    base: str
    seconds: Mapping[str, float]
    ratio: float
    target: float | None = None

    @property
    def met(self) -> bool:
        return self.target is None or self.ratio <= self.target


def compare(
    case: str,
    contenders: Mapping[str, Callable[[], object]],
    *,
    ours: str,
    base: str,
    target: float | None = None,
    rounds: int = 15,
    calls: int = 50,
) -> Comparison:
    """Time single calls of the contenders in alternating rounds, warming up in each."""
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            for _ in range(max(1, calls // 10)):
                call()
            medians[name].append(statistics.median(_timed(call) for _ in range(calls)))
    ratios = [ours_s / base_s for ours_s, base_s in zip(medians[ours], medians[base], strict=True)]
    return Comparison(
        case=case,
        ours=ours,
        base=base,
        seconds={name: statistics.median(times) for name, times in medians.items()},
        ratio=statistics.median(ratios),
        target=target,
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(title: str, comparisons: Sequence[Comparison], json_path: Path | None = None) -> None:
    """Print a table, and write everything to ``json_path`` if there is one."""
    table = Table(title=title)
    for column in ("case", "ours", "base", "ratio", "target"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for c in comparisons:
        table.add_row(
            c.case,
            f"{c.ours} {_duration(c.seconds[c.ours])}",
            f"{c.base} {_duration(c.seconds[c.base])}",
            f"[{'green' if c.met else 'red'}]{c.ratio:.2f}[/]",
            "" if c.target is None else f"{c.target:.2f}",
        )
    Console().print(table)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
    results = [asdict(c) | {"met": c.met} for c in comparisons]
    write_json(json_path, {"title": title, "machine": machine, "results": results})


def write_json(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write what was found to ``path``, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, default=str) + "\n")


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:.1f} ms"
