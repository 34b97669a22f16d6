"""The commands that watch a cluster and change nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console

from ..connecting import running_cluster
from ..handle import connect
from ..logs import KINDS, LogKind, read_logs
from ..page_address import open_page, page_address
from ..proto.errors import CheckpointError, ClusterError
from ..session import ClusterSession, logged_session
from .live.top import top
from .terminal import bars, number, print_json, print_report, table, until_ctrl_c

if TYPE_CHECKING:
    from ..cluster.reports.activity import ExpertReport

screen = Console(highlight=False)
err = Console(stderr=True, highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="Name of the cluster, as in its spec.")]


# Of the three rates of `AssignmentRates`.
_HORIZONS = ("10 s", "60 s", "600 s")


def register(app: typer.Typer) -> None:
    for command in (experts, logs, page, record, top):
        app.command()(command)


def experts(
    model: Annotated[str | None, typer.Option(help="Show only experts of this model.")] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Show only experts of the layer with this number.")
    ] = None,
    hot: Annotated[
        int | None, typer.Option(min=1, help="Show only this number of experts, by load.")
    ] = None,
    name: NameOption = "local",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.")
    ] = False,
) -> None:
    """Show for each expert its hosts, load, pins and requested number of replicas."""
    found = connect(name).experts(model, layer, hot=hot)
    print_report(found) if as_json else _print_experts(found)


def page(
    name: NameOption = "local",
    only_print: Annotated[
        bool,
        typer.Option("--print", help="Print the page's address with the key, and open nothing."),
    ] = False,
) -> None:
    """Open the page of a cluster in the browser, with the key that its actions need."""
    session = running_cluster(name)
    if only_print:
        print(page_address(session))
    else:
        open_page(session)
        screen.print(f"opened {session.monitoring}/ with the operator key")


def _print_experts(found: list[ExpertReport]) -> None:
    if not found:
        screen.print("no experts are placed")
        return
    for model in sorted({row.model for row in found}):
        rows = [row for row in found if row.model == model]
        wished = any(_constraints(row) for row in rows)
        shown = table(
            ">layer",
            ">expert",
            "replicas (share)",
            *(f">{horizon}" for horizon in _HORIZONS),
            ">of layer",
            *(["constraints"] if wished else []),
        )
        for row in rows:
            rates = row.assignments_per_s
            shown.add_row(
                str(row.layer),
                str(row.expert),
                ", ".join(f"{one.host} ({_share(one.share)})" for one in row.replicas),
                *map(number, (rates.over_10_s, rates.over_60_s, rates.over_600_s)),
                "" if row.share_of_layer is None else f"{row.share_of_layer:.1%}",
                *([_constraints(row)] if wished else []),
            )
        screen.print(f"{model}: assignments per second over {', '.join(_HORIZONS)}")
        screen.print(shown)


def _share(share: float) -> str:
    """Return a replica's share; one that rounds to nothing is there in case another is lost."""
    return f"{share:.0%}" if share >= 0.005 else "spare"


def _constraints(row: ExpertReport) -> str:
    constraints = [f"pinned to {host}" for host in row.pinned_to]
    if row.min_replicas > 1:
        constraints.append(f"{row.min_replicas} replicas")
    return ", ".join(constraints)


def logs(
    kinds: Annotated[
        list[str] | None,
        typer.Argument(help=f"Kinds of processes: {', '.join(KINDS)} (default: all)."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Show only lines of the host with this name.")
    ] = None,
    tail: Annotated[
        int, typer.Option(min=0, help="Number of last lines of each process to show.")
    ] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")
    ] = False,
    name: NameOption = "local",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each log line as a JSON object.")
    ] = False,
) -> None:
    """Show what the cluster's processes on this machine printed, dead processes included."""
    wanted: list[LogKind] = [_kind(kind) for kind in kinds or ()]
    with until_ctrl_c() as stop:
        session = _logged(name)
        lines = read_logs(session, wanted, host=host, tail=tail, follow=follow, stop=stop)
        for line in lines:
            print(json.dumps(asdict(line)) if as_json else str(line), flush=follow)
            if stop.is_set():
                return


def _logged(name: str) -> ClusterSession:
    """Return a cluster of this machine, or else one whose Ray has a node here."""
    try:
        return logged_session(name)
    except ClusterError:
        return running_cluster(name)


def _kind(text: str) -> LogKind:
    if text in KINDS:
        return cast(LogKind, text)
    raise typer.BadParameter(f"{text!r} is not one of {', '.join(KINDS)}", param_hint="KINDS")


def record(
    out: Annotated[Path, typer.Argument(help="The file to write the recording into.")],
    name: NameOption = "local",
    seconds: Annotated[float, typer.Option(help="Length of the recording in seconds.")] = 60.0,
    window: Annotated[
        float,
        typer.Option(help="Seconds that one entry of the recording sums up; at least 1."),
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a summary of the recording as JSON.")
    ] = False,
) -> None:
    """Record the load of all experts and hosts for `simulate`; Ctrl-C ends the recording early."""
    if out.exists() and not force:
        raise CheckpointError(f"{out}: this file already exists; --force replaces it")
    if not out.resolve().parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.resolve().parent}; make it first")
    cluster = connect(name)
    with until_ctrl_c() as stop, bars(err) as progress:
        trace = cluster.record(seconds, window, stop=stop, progress=progress)
    if not trace.windows:
        raise ClusterError(
            f"nothing was recorded: the recording ended before its first window of {window:g} s "
            "(--window)"
        )
    from ..traces import write_trace

    write_trace(out, trace)
    assignments = int(sum(counts.sum() for counts in trace.counts.values()))
    if as_json:
        recorded = {
            "file": str(out),
            "windows": trace.windows,
            "window_s": window,
            "layers": len(trace.counts),
            "hosts": len(trace.hosts),
            "assignments": assignments,
        }
        print_json(recorded)
    else:
        err.print(
            f"wrote {out}: {trace.windows} windows of {window:g} s, {len(trace.counts)} layers, "
            f"{len(trace.hosts)} hosts, {assignments:,} assignments"
        )
