"""`moesaic simulate`: the code that serves, on a virtual clock; no cluster is touched."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .operate import JsonOption
from .terminal import table

if TYPE_CHECKING:
    from ..actors.simulator.world import SeedRun
    from ..cluster.comparison.compare import StrategyResult
    from ..cluster.comparison.elastic_placement import Elastic
    from ..cluster.load.trace import Trace
    from ..cluster.placement import ModelShape

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_LAST_EVENTS = 25


def simulate(
    faults: Annotated[
        int | None,
        typer.Option(min=0, help="Simulate a cluster under random faults, from this seed on."),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="With --faults: number of seeds to simulate.")
    ] = 1,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="With --faults: simulated seconds with faults.")
    ] = 12.0,
    trace: Annotated[
        Path | None, typer.Option(help="File of `moesaic record`. Default: generated loads.")
    ] = None,
    shifting: Annotated[
        bool,
        typer.Option("--day", help="Generate 24 hours of traffic from 4 kinds of text in turn."),
    ] = False,
    sigma: Annotated[
        float,
        typer.Option(
            min=0.0, max=5.0, help="Skew of generated loads: standard deviation of their logarithm."
        ),
    ] = 1.0,
    drift: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Change of generated loads per window: 0 none, 1 all new."
        ),
    ] = 0.2,
    windows: Annotated[int, typer.Option(min=2, help="Number of windows of generated loads.")] = 24,
    window: Annotated[
        float,
        typer.Option(min=1.0, help="Seconds for which each generated load lasts: one window."),
    ] = 60.0,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers of generated loads.")] = 8,
    experts: Annotated[
        int, typer.Option(min=2, help="Number of experts in each layer of generated loads.")
    ] = 64,
    hosts: Annotated[
        int | None,
        typer.Option(min=2, help="Number of hosts. Default: as in the --trace file, else 8."),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of experts of a layer that fit on a host. Default: a quarter more than "
            "the host's even share.",
        ),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, help="Number of windows between two plans of DeepSeek's rule.")
    ] = 4,
    budget: Annotated[
        float,
        typer.Option(
            min=0.001, max=1.0, help="Fraction of all replicas that Moesaic may move per change."
        ),
    ] = 0.05,
    expert_mb: Annotated[float, typer.Option(min=0.001, help="Size of one expert in MB.")] = 44.0,
    rate: Annotated[
        float, typer.Option(min=0.001, help="Rate at which a host loads experts, in MB/s.")
    ] = 200.0,
    utilisation: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Mean busy fraction of hosts under generated loads."),
    ] = 0.8,
    slo: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="A window counts as missed if a host's queue takes more seconds than this.",
        ),
    ] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of generated loads.")] = 0,
    swing: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="With --day: fraction by which traffic differs from its mean."
        ),
    ] = 0.3,
    spec: Annotated[
        Path | None,
        typer.Option(help="Also simulate autoscaling, with this spec's first host group."),
    ] = None,
    min_hosts: Annotated[
        int | None,
        typer.Option(min=1, help="Also simulate autoscaling, to at least this number of hosts."),
    ] = None,
    max_hosts: Annotated[
        int | None,
        typer.Option(min=1, help="Also simulate autoscaling, to at most this number of hosts."),
    ] = None,
    start: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a new host takes to start.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> int:
    """Compare placements on recorded or generated loads; --faults: check a cluster under faults."""
    if faults is not None:
        return _check_seeds(faults, seeds, seconds, as_json)
    from ..cluster.comparison.compare import compare, control_policy, host_speed, pool_of

    loads = _read(trace) if trace is not None else None
    if loads is None:
        shape = _made_shape(layers, experts, expert_mb)
        loads = _make(
            shape, day_long=shifting, sigma=sigma, drift=drift, windows=windows, window_s=window,
            seed=seed, swing=swing,
        )  # fmt: skip
    if loads.windows <= every:
        raise typer.BadParameter(
            f"{loads.windows} windows of loads are too few to plan every {every} windows; give a "
            "smaller --every, or more windows",
            param_hint="--every",
        )
    shapes = _shapes(loads, expert_mb)
    count = hosts or len(loads.hosts) or 8
    most = max(max(shape.experts.values()) for shape in shapes)
    try:
        pool = pool_of(
            shapes,
            hosts=count,
            slots=slots or -(-5 * most // (4 * count)),
            assignments_per_s=host_speed(loads, count, utilisation),
            loading_bytes_per_s=rate * 1e6,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--slots") from error
    elastic = _elastic(spec, min_hosts, max_hosts, start, count)
    policy = control_policy(pool, every_s=loads.window_s, budget=budget, redundancy=0)
    with err.status(f"simulating {loads.windows} windows of {loads.window_s:g} s"):
        found = compare(loads, pool, every=every, slo_s=slo, policy=policy, elastic=elastic)
    _print_json([asdict(one) for one in found]) if as_json else _print_figures(found)
    return 0


# ---- placements ----------------------------------------------------------------------------------


def _read(path: Path) -> Trace:
    from ..traces import read_trace

    return read_trace(path)


def _made_shape(layers: int, experts: int, expert_mb: float) -> ModelShape:
    from ..cluster.placement import ModelShape

    return ModelShape(
        model="made",
        experts=dict.fromkeys(range(layers), experts),
        expert_bytes=int(expert_mb * 1e6),
    )


def _make(
    shape: ModelShape,
    *,
    day_long: bool,
    sigma: float,
    drift: float,
    windows: int,
    window_s: float,
    seed: int,
    swing: float,
) -> Trace:
    import numpy as np

    from ..cluster.comparison.loads import daily_trace, drifting_trace

    rng = np.random.default_rng(seed)
    if day_long:
        windows = max(2, round(86_400 / window_s))
        return daily_trace(
            [shape], sigma=sigma, domains=4, windows=windows, window_s=window_s,
            assignments_per_s=10_000.0, rng=rng, swing=swing,
        )  # fmt: skip
    return drifting_trace(
        [shape], sigma=sigma, drift=drift, windows=windows, window_s=window_s,
        assignments_per_s=10_000.0, rng=rng,
    )  # fmt: skip


def _shapes(loads: Trace, expert_mb: float) -> list[ModelShape]:
    """Return the models of a trace."""
    from ..cluster.placement import ModelShape

    layers: dict[str, dict[int, int]] = defaultdict(dict)
    for key, counts_WE in loads.counts.items():
        layers[key.model][key.layer] = counts_WE.shape[1]
    return [
        ModelShape(model=model, experts=experts, expert_bytes=int(expert_mb * 1e6))
        for model, experts in sorted(layers.items())
    ]


def _elastic(
    spec: Path | None, min_hosts: int | None, max_hosts: int | None, start_s: float, count: int
) -> Elastic | None:
    """Return how the pool may grow and shrink; None if no option says so."""
    from ..cluster.comparison.elastic_placement import Elastic
    from ..cluster.spec.spec import Spec, load_spec

    if spec is None and min_hosts is None and max_hosts is None:
        return None
    said = Spec() if spec is None else load_spec(spec)
    least, most = (count, count) if spec is None else (said.hosts[0].least, said.hosts[0].most)
    try:
        return Elastic(
            min_hosts=least if min_hosts is None else min_hosts,
            max_hosts=most if max_hosts is None else max_hosts,
            start_s=start_s,
            cost_per_hour=said.hosts[0].cost_per_hour,
            policy=said.autoscale.policy,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--min-hosts, --max-hosts") from error


def _print_figures(found: list[StrategyResult]) -> None:
    shown = table(
        "placement", ">mean", ">worst", ">moved", ">GB", ">SLO missed",
        ">host-h", ">cost", ">scalings",
    )  # fmt: skip
    for one in found:
        shown.add_row(
            one.strategy,
            f"{one.balancedness_mean:.3f}",
            f"{one.balancedness_worst:.3f}",
            f"{one.moved_slots:,}",
            f"{one.moved_bytes / 1e9:,.1f}",
            f"{one.slo_violations}/{one.windows}",
            f"{one.host_hours:,.1f}",
            f"{one.cost:,.2f}",
            f"{one.scale_events}",
        )
    out.print(shown)
    out.print("mean, worst: balancedness. moved, GB: replicas, their size. SLO missed: windows")


# ---- faults --------------------------------------------------------------------------------------


def _check_seeds(first: int, seeds: int, seconds: float, as_json: bool) -> int:
    """Run the seeds; return 1 if an invariant was broken, else 0."""
    from ..actors.simulator.world import run_seed

    runs: list[SeedRun] = []
    with err.status("") as status:
        for seed in range(first, first + seeds):
            status.update(f"seed {seed}")
            runs.append(run_seed(seed, faults_s=seconds))
    broken = [run for run in runs if run.violation is not None]
    if as_json:
        _print_json({"runs": [_plain(run) for run in runs], "broken": len(broken)})
    else:
        for run in broken:
            _print_broken(run, seconds)
        _print_runs(runs)
    return 1 if broken else 0


def _plain(run: SeedRun) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "events": run.events,
        "calls": run.calls,
        "simulated_s": round(run.simulated_s, 3),
        "faults": run.faults,
        "digest": run.digest,
        "violation": None if run.violation is None else asdict(run.violation),
        "last_events": [] if run.violation is None else run.lines[-_LAST_EVENTS:],
    }


def _print_broken(run: SeedRun, seconds: float) -> None:
    assert run.violation is not None
    for line in run.lines[-_LAST_EVENTS:]:
        out.print(line, markup=False)
    out.print(f"[red]seed {run.seed}: broken: {run.violation.invariant}[/red]")
    out.print(run.violation.message, markup=False)
    out.print(f"replay: moesaic simulate --faults {run.seed} --seconds {seconds:g}\n")


def _print_runs(runs: list[SeedRun]) -> None:
    faults: Counter[str] = Counter()
    for run in runs:
        faults.update(run.faults)
    broken = sum(run.violation is not None for run in runs)
    shown = table("fault", ">times")
    for name, times in sorted(faults.items()):
        shown.add_row(name, f"{times:,}")
    out.print(shown)
    out.print(
        f"{len(runs):,} seeds, {sum(run.events for run in runs):,} events, "
        f"{sum(run.calls for run in runs):,} calls, {sum(faults.values()):,} faults: "
        + (f"[red]{broken} seeds broke an invariant[/red]" if broken else "all invariants hold")
    )


def _print_json(values: Any) -> None:
    json.dump(values, sys.stdout, indent=2)
    print()
