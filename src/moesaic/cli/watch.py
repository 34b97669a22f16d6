"""The commands that watch a cluster and change nothing."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..handle import connect
from ..proto.errors import CheckpointError, ClusterError
from ..traces import write_trace
from .output import print_json
from .progress import bars
from .top import top

err = Console(stderr=True, highlight=False)

NameOption = Annotated[str, typer.Option("--name", help="The cluster's name in its spec.")]


def register(app: typer.Typer) -> None:
    for command in (record, top):
        app.command()(command)


def record(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    name: NameOption = "local",
    seconds: Annotated[float, typer.Option(help="How long.")] = 60.0,
    window: Annotated[float, typer.Option(help="Seconds of one window; at least 1.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What was recorded, as JSON.")] = False,
) -> None:
    """Record the load of all experts and hosts, for `simulate`; Ctrl-C ends it early."""
    if out.exists() and not force:
        raise CheckpointError(f"{out}: is there already; --force replaces it")
    if not out.resolve().parent.is_dir():
        raise CheckpointError(f"{out}: there is no folder {out.resolve().parent}")
    cluster = connect(name)
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        with bars(err) as progress:
            trace = cluster.record(seconds, window, stop=stop, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    if not trace.windows:
        raise ClusterError("nothing was recorded: no window had ended")
    write_trace(out, trace)
    choices = int(sum(counts.sum() for counts in trace.counts.values()))
    if as_json:
        recorded = {
            "file": str(out),
            "windows": trace.windows,
            "window_s": window,
            "layers": len(trace.counts),
            "hosts": len(trace.hosts),
            "choices": choices,
        }
        print_json(recorded)
    else:
        err.print(
            f"wrote {out}: {trace.windows} windows of {window:g} s, {len(trace.counts)} layers, "
            f"{len(trace.hosts)} hosts, {choices:,} choices"
        )
