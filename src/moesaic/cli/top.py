"""`moesaic top`: a live view of a cluster."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..handle import Cluster, connect
from ..proto.errors import ClusterError
from ..session import find_session
from .terminal import print_json, table, until_ctrl_c

out = Console(highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="The cluster's name in its spec.")]


def top(
    name: NameOption = "local",
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two views.")] = 1.0,
    experts: Annotated[int, typer.Option(min=0, help="Number of hottest experts shown.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print one view as JSON.")] = False,
) -> None:
    """Watch hosts, the hottest experts and how evenly the load is spread; Ctrl-C ends it."""
    cluster = connect(name)
    if as_json:
        print_json(cluster.top(experts))
    elif once:
        out.print(frame(name, cluster.top(experts)))
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
        return frame(name, cluster.top(experts))
    except ClusterError as error:
        if find_session(name) is None:
            raise
        return Text(f"{name}: {error}", style="red")


def frame(name: str, seen: dict[str, Any]) -> RenderableType:
    """Render what `Cluster.top` returned."""
    placement = seen["placement"]
    number = "nothing placed" if placement is None else "placement {}, {}".format(*placement)
    words = [
        f"cluster {name}",
        number,
        f"{seen['routers']} routers",
        f"{seen['moves_pending']} moves to come",
    ]
    if seen["missing_experts"]:
        words.append(f"{seen['missing_experts']} experts missing")
    parts: list[RenderableType] = [Text("  ".join(words), style="bold")]
    parts += [Text(warning, style="red") for warning in seen["warnings"]]
    if seen["error"]:
        parts.append(Text(f"controller: {seen['error']}", style="red"))
    for model in seen["models"]:
        parts.append(Text(_balance(model)))
    return Group(*parts, _hosts(seen["hosts"]), *_experts(seen["experts"]))


def _balance(model: dict[str, Any]) -> str:
    if model["balancedness_mean"] is None:
        return f"{model['model']}: no load"
    return (
        f"{model['model']}: {model['choices_per_s']:,.0f} choices/s, balancedness "
        f"{model['balancedness_mean']:.3f}, worst layer {model['balancedness_worst']:.3f}"
    )


def _hosts(hosts: list[dict[str, Any]]) -> Table:
    shown = table("host", "state", ">experts", ">queue", ">busy", ">calls/s", ">rows/s")
    for host in hosts:
        shown.add_row(
            host["host"],
            Text(host["state"], style="" if host["state"] == "up" else "yellow"),
            f"{host['experts']:,}",
            f"{host['queued_rows']:,}",
            f"{host['busy']:.0%}",
            f"{host['calls_per_s']:,.0f}",
            f"{host['rows_per_s']:,.0f}",
        )
    return shown


def _experts(experts: list[dict[str, Any]]) -> list[Table]:
    """Return one table, or none if no expert has load."""
    if not experts:
        return []
    shown = table("model", ">layer", ">expert", ">choices/s", "hosts")
    for expert in experts:
        shown.add_row(
            expert["model"],
            str(expert["layer"]),
            str(expert["expert"]),
            f"{expert['choices_per_s']:,.0f}",
            ", ".join(expert["hosts"]),
        )
    return [shown]
