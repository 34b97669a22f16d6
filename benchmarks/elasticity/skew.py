"""Skewed, shifting traffic on emulated devices: static placement, DeepSeek's rule, and ours.

    python -m benchmarks.elasticity.skew [--json PATH] [--hosts N] [--seconds S] ...

Real processes and transport, one cluster after the other. `balanced` is the yardstick: the static
placement under traffic that prefers no expert. The skew is that at which static placement's
balancedness, in the mean over layers and shifts, is 0.5. A pass is all layers, one after the
other, as a token's; tokens/s are those of all routers. In the static pool the planner is let
loose at the end, to see what passes take while replicas move; it loads `--move-s` for each expert
there, so that there is time to see it.

A run in which hosts overran their emulated time is not valid; overruns are printed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import moesaic
from benchmarks.elasticity.eplb_control import EplbController
from benchmarks.measure import write_json
from benchmarks.random_model import EXPERT_BYTES, HIDDEN, save_random_model
from benchmarks.traffic import MODEL, Drivers, Steps, Traffic, driving, exponent_for
from moesaic.actors.controller.controller import Controller
from moesaic.actors.runtime.ray_border import controller_of, namespace_of, ray_get
from moesaic.actors.serve import beginning
from moesaic.cluster.load.meter import LoadReport
from moesaic.handle import Cluster

# Slots beside those that all experts need once.
HEADROOM = 1.25
BALANCEDNESS = 0.5
# Of the timeline of a rebalance.
PIECE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Setting:
    hosts: int
    layers: int
    experts: int
    routers: int
    emulate: dict[str, float]
    warm_s: float
    seconds: float
    every_s: float  # between two balancings
    expert_s: float  # of loading one expert, in the background
    move_s: float  # the same in the static pool, whose replicas move only at the end
    quiet_s: float

    @property
    def slots(self) -> int:
        """Of one host; a multiple of the layers, so that DeepSeek's rule can use all of them."""
        return int(np.ceil(HEADROOM * self.experts / self.hosts)) * self.layers


@contextmanager
def pool(folder: Path, setting: Setting, way: str) -> Iterator[Cluster]:
    expert_s = setting.move_s if way == "static" else setting.expert_s
    spec = {
        "name": f"skew-{os.getpid()}",
        "models": [{"name": MODEL, "path": str(folder)}],
        "hosts": [
            {
                "count": setting.hosts,
                "device": "cpu",
                "slots": setting.slots,
                "emulate": setting.emulate,
            }
        ],
        "endpoint": None,
        "balance": {
            "auto": way in ("ours", "DeepSeek's rule"),
            "every_s": setting.every_s,
            "load_mb_per_s": EXPERT_BYTES / expert_s / 1e6,
        },
    }
    beginning.Controller = EplbController if way == "DeepSeek's rule" else Controller
    try:
        with moesaic.up(spec) as cluster:
            yield cluster
    finally:
        beginning.Controller = Controller


def run(
    folder: Path, setting: Setting, way: str, traffic: Traffic, scratch: Path
) -> dict[str, Any]:
    with (
        pool(folder, setting, way) as cluster,
        driving(cluster.name, traffic, routers=setting.routers, folder=scratch) as drivers,
    ):
        begin = drivers.start() + setting.warm_s
        _sleep_until(begin, drivers)
        before = _overruns(cluster)
        _sleep_until(begin + setting.seconds, drivers)
        end = time.monotonic()
        overruns = _overruns(cluster) - before
        seen = cluster.top(0).models[0]
        found: dict[str, Any] = {
            "strategy": way,
            "overruns": overruns,
            "balancedness_at_the_end": seen.balancedness and seen.balancedness.mean,
            "changes": [
                {
                    "moves": change.total_moves,
                    "took_s": change.duration_s,
                    "phase": change.phase,
                    "measured": change.measured and change.measured.model_dump(mode="json"),
                }
                for change in cluster.history()
                if change.initiator == "balancer"
            ],
        }
        moving = _rebalance(cluster, setting, drivers) if way == "static" else None
        steps = drivers.stop()
    found |= figures(steps.within(begin, end), traffic, end - begin)
    if moving is not None:
        found["rebalance"] = phases(steps, moving, setting)
        found["rebalance"] |= timeline(steps, moving, setting.quiet_s, traffic.tokens)
    return found


@dataclass(frozen=True, kw_only=True)
class Moving:
    """A rebalance under traffic."""

    began: float
    ended: float
    moves: int


def _rebalance(cluster: Cluster, setting: Setting, drivers: Drivers) -> Moving:
    """The planner moves as much as it likes."""
    _sleep_until(time.monotonic() + setting.quiet_s, drivers)
    began = time.monotonic()
    change = cluster.rebalance(budget=setting.slots * setting.hosts)
    change = cluster.wait_for(change, watch=lambda _: drivers.check())
    ended = time.monotonic()
    _sleep_until(ended + setting.quiet_s, drivers)
    return Moving(began=began, ended=ended, moves=change.total_moves)


def timeline(steps: Steps, moving: Moving, quiet_s: float, tokens: int) -> dict[str, Any]:
    """Tokens per second around a rebalance; seconds count from its beginning."""
    rates = steps.rates(moving.began - quiet_s, moving.ended + quiet_s, PIECE_S)
    return {
        "piece_s": PIECE_S,
        "from_s": -quiet_s,
        "tokens_per_s": [round(tokens * rate, 1) for rate in rates],
    }


def phases(steps: Steps, moving: Moving, setting: Setting) -> dict[str, Any]:
    """Passes before, while and after replicas move, under the same traffic."""
    began, ended = moving.began, moving.ended
    parts = {
        "before": steps.within(began - setting.quiet_s, began),
        "during": steps.within(began, ended),
        "after": steps.within(ended, ended + setting.quiet_s),
    }
    return {"seconds": ended - began, "moves": moving.moves} | {
        name: {"passes": len(part.began), "p50_s": _quantile(part, 0.5), "p99_s": _p99(part)}
        for name, part in parts.items()
    }


def figures(steps: Steps, traffic: Traffic, seconds: float) -> dict[str, Any]:
    return {
        "tokens_per_s": len(steps.began) * traffic.tokens / seconds,
        "pass_p50_s": _quantile(steps, 0.5),
        "pass_p99_s": _p99(steps),
        "call_p99_s": float(np.quantile(steps.call_s, 0.99)) if steps.call_s.size else None,
    }


def _p99(steps: Steps) -> float | None:
    return _quantile(steps, 0.99)


def _quantile(steps: Steps, part: float) -> float | None:
    times = steps.ended - steps.began
    return float(np.quantile(times, part)) if times.size else None


def _overruns(cluster: Cluster) -> int:
    return sum(one.overrun_batches for one in cluster.status().processes.values())


def _sleep_until(moment: float, drivers: Drivers) -> None:
    while (left_s := moment - time.monotonic()) > 0:
        time.sleep(min(left_s, 1.0))
        drivers.check()


def skew_of(folder: Path, setting: Setting, traffic: Traffic) -> float:
    """The exponent at which the placement that the controller begins with is as uneven as asked."""
    with pool(folder, setting, "static") as cluster:
        cluster.status()
        controller = controller_of(namespace_of(cluster.name))
        asked = controller.report.remote(LoadReport(router="skew", placement_id=None), 5.0)
        placed = ray_get(asked, 30.0, "the placement").layers
    return exponent_for(BALANCEDNESS, lambda s: replace(traffic, exponent=s), placed)


def show(results: list[dict[str, Any]], traffic: Traffic) -> None:
    table = Table(title=f"Skewed traffic, exponent {traffic.exponent:.2f}")
    for column in (
        "strategy",
        "tokens/s",
        "of balanced",
        "pass p50",
        "p99",
        "call p99",
        "overruns",
    ):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    yardstick = results[0]["tokens_per_s"]
    for row in results:
        table.add_row(
            row["strategy"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / yardstick:.1%}",
            *(_ms(row[name]) for name in ("pass_p50_s", "pass_p99_s", "call_p99_s")),
            f"{row['overruns']}",
        )
    Console(width=100).print(table)
    moved = next((row["rebalance"] for row in results if "rebalance" in row), None)
    if moved is not None:
        words = [f"{name} {_ms(moved[name]['p99_s'])}" for name in ("before", "during", "after")]
        print(
            f"p99 of passes around a rebalance ({moved['moves']} moves, {moved['seconds']:.1f} s): "
            f"{', '.join(words)}"
        )
    if any(row["overruns"] for row in results):
        print("NOT VALID: hosts overran their emulated time; take a slower device or fewer hosts")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of one call")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--call-us", type=float, default=2000)
    parser.add_argument("--row-us", type=float, default=300)
    parser.add_argument("--expert-us", type=float, default=0)
    parser.add_argument("--expert-s", type=float, default=0.05, help="of loading one expert")
    parser.add_argument("--move-s", type=float, default=0.5, help="the same in the static pool")
    parser.add_argument("--warm", type=float, default=30)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--quiet", type=float, default=20)
    parser.add_argument("--shift", type=float, default=40, help="seconds between two shifts")
    parser.add_argument("--every", type=float, default=5, help="seconds between two balancings")
    parser.add_argument("--only", action="append", help="a way; may be given many times")
    given = parser.parse_args()
    setting = Setting(
        hosts=given.hosts,
        layers=given.layers,
        experts=given.experts,
        routers=given.routers,
        emulate={"call_us": given.call_us, "row_us": given.row_us, "expert_us": given.expert_us},
        warm_s=given.warm,
        seconds=given.seconds,
        every_s=given.every,
        expert_s=given.expert_s,
        move_s=given.move_s,
        quiet_s=given.quiet,
    )
    even = Traffic(
        layers=given.layers,
        experts=given.experts,
        top_k=given.top_k,
        tokens=given.tokens,
        hidden=HIDDEN,
        shift_s=given.shift,
        shifts=int((given.warm + given.seconds) / given.shift),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_model(
            folder / "model", layers=given.layers, experts=given.experts, top_k=given.top_k
        )
        skewed = replace(even, exponent=skew_of(folder / "model", setting, even))
        results = []
        for way in ("balanced", "static", "DeepSeek's rule", "ours"):
            if way == "balanced" or not given.only or way in given.only:
                traffic = even if way == "balanced" else skewed
                results.append(run(folder / "model", setting, way, traffic, folder))
                print(f"{way}: {results[-1]['tokens_per_s']:,.0f} tokens/s", flush=True)
    show(results, skewed)
    found = {
        "title": "skew",
        "setting": vars(given),
        "exponent": skewed.exponent,
        "valid": not any(row["overruns"] for row in results),
        "results": results,
    }
    write_json(given.json, found)


if __name__ == "__main__":
    main()
