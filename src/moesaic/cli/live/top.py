"""`moesaic top`: a live view of a cluster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ...handle import Cluster, connect
from ...proto.errors import ClusterError
from ...session import find_session
from ..terminal import print_report, table, until_ctrl_c

if TYPE_CHECKING:
    from ...cluster.reports.activity import Activity, HostActivity, HotExpert, ModelActivity
    from ...cluster.reports.status import TrainingStatus

out = Console(highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]


def top(
    name: NameOption = "local",
    once: Annotated[
        bool, typer.Option("--once", help="Print the present state once, and end.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, help="Seconds between two updates of the screen.")
    ] = 1.0,
    experts: Annotated[
        int, typer.Option(min=0, help="Number of experts to show, those with the most load.")
    ] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the present state once, as JSON, and end.")
    ] = False,
) -> None:
    """Watch hosts, the experts with the most load, and how even the load is, until Ctrl-C."""
    cluster = connect(name)
    if as_json:
        print_report(cluster.top(experts))
    elif once:
        out.print(frame(cluster.name, cluster.top(experts)))
    else:
        with until_ctrl_c() as stop:
            _watch(lambda: _look(name, cluster, experts), interval, stop)
        raise KeyboardInterrupt


def _watch(look: Callable[[], RenderableType], interval_s: float, stop: threading.Event) -> None:
    with contextlib.ExitStack() as shown:
        show = out.print
        if out.is_terminal:
            live = shown.enter_context(Live(console=out, screen=True, auto_refresh=False))
            show = partial(live.update, refresh=True)
        while not stop.is_set():
            show(look())
            stop.wait(interval_s)


def _look(name: str, cluster: Cluster, experts: int) -> RenderableType:
    """Return a frame, or the reason for having none at the moment.

    A controller comes back; an ended cluster does not, and its error is raised.
    """
    try:
        return frame(cluster.name, cluster.top(experts))
    except ClusterError as error:
        if find_session(name) is None:
            raise
        return Text(f"{name}: {error}", style="red")


def frame(name: str, seen: Activity) -> RenderableType:
    """Render what `Cluster.top` returned."""
    placement = seen.placement
    words = [
        f"cluster {name}",
        "nothing placed" if placement is None else f"placement {placement.term}, {placement.epoch}",
        f"{seen.router_count} routers",
        f"{seen.pending_moves} moves to come",
    ]
    if seen.missing_experts:
        words.append(f"{seen.missing_experts} experts missing")
    parts: list[RenderableType] = [Text("  ".join(words), style="bold")]
    parts += [Text(warning, style="red") for warning in seen.warnings]
    if seen.error:
        parts.append(Text(f"controller: {seen.error}", style="red"))
    for model in seen.models:
        parts.append(Text(_balance(model)))
        routing = model.worst_routing
        if routing is not None:
            words = f"{model.name}: worst routing in {routing.words}"
            parts.append(Text(words, style="red" if routing.collapsed else ""))
    if seen.training is not None:
        parts += [Text(line) for line in training_lines(seen.training)]
    return Group(*parts, _hosts(seen.hosts, seen.training), *_experts(seen.hottest_experts))


def _balance(model: ModelActivity) -> str:
    if model.balancedness is None:
        return f"{model.name}: no load"
    return (
        f"{model.name}: {model.assignments_per_s:,.0f} assignments/s, balancedness "
        f"{model.balancedness.mean:.3f}, worst layer {model.balancedness.worst:.3f}"
    )


def training_lines(run: TrainingStatus) -> list[str]:
    """Say how far and how fast a run is, and what would be lost with a host."""
    words = f"run {run.run} ({run.initiator}) trains {run.model}: version {run.version} after "
    words += f"{run.steps:,} steps, for {run.age_s:,.0f} s"
    if run.attempt:
        words += f"; attempt {run.attempt} at the next by {run.workers:,} processes"
    lines, pace = [words], list[str]()
    if run.step_s is not None:
        pace.append(f"{run.step_s:,.3g} s a step")
    if run.tokens_per_s is not None:
        pace.append(f"{run.tokens_per_s:,.0f} tokens/s")
    if run.balancedness is not None:
        mean, worst = run.balancedness.mean, run.balancedness.worst
        pace.append(f"balancedness {mean:.3f}, worst layer {worst:.3f}")
    if pace:
        lines.append(f"run {run.run}: {', '.join(pace)}")
    if run.unprotected_tensors:
        lines.append(
            f"{run.unprotected_tensors:,} trained tensors have a single owner: if that host is "
            "lost, the run goes back to a checkpoint"
        )
    return lines


def _hosts(hosts: list[HostActivity], run: TrainingStatus | None) -> Table:
    owns = [] if run is None else [">owns"]
    shown = table("host", "state", ">experts", *owns, ">queue", ">busy", ">calls/s", ">rows/s")
    for host in hosts:
        each = host.throughput
        cells = ["", "", ""]
        if each is not None:
            cells = [
                f"{each.busy_fraction:.0%}",
                f"{each.calls_per_s:,.0f}",
                f"{each.rows_per_s:,.0f}",
            ]
        shown.add_row(
            host.name,
            Text(host.state.words, style="" if host.state == "up" else "yellow"),
            f"{host.replicas:,}",
            *([] if run is None else [f"{run.owned_tensors.get(host.name, 0):,}"]),
            f"{host.queued_rows:,}",
            *cells,
        )
    return shown


def _experts(experts: list[HotExpert]) -> list[Table]:
    """Return one table, or none if no expert has load."""
    if not experts:
        return []
    shown = table("model", ">layer", ">expert", ">assignments/s", "hosts")
    for expert in experts:
        shown.add_row(
            expert.model,
            str(expert.layer),
            str(expert.expert),
            f"{expert.assignments_per_s:,.0f}",
            ", ".join(expert.hosts),
        )
    return [shown]
