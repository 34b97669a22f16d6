"""`train`: a model of the running cluster is trained as a spec says."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..ending import INTERRUPTED
from ..operate import JsonOption, err, out
from ..terminal import print_report

if TYPE_CHECKING:
    from ...cluster.reports.training import TrainReport
    from ...cluster.train_command.records import Record
    from ...handle import Cluster

# How often the hosts' balancedness is asked for, and how often a line is printed at most.
_ASK_S = 5.0
_LINE_S = 1.0


def train(
    spec: Annotated[
        Path | None,
        typer.Argument(help="A spec of a training run (a YAML file). Default: needs --data alone."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to learn from: a file or folder of texts, JSONL, or a saved dataset. It "
            "stands in the place of the spec's data.path."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of steps, in the place of the spec's steps."),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(help="Folder of the run, in the place of the spec's checkpoints.folder."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check all of it and pack the data; start nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a model of the running cluster, and show how far it is."""
    from ...actors.training.command.command import Watcher
    from ...cluster.train_command.train_spec import load_train_spec
    from ...handle import connect
    from ...training import train as run

    given = load_train_spec(spec, data=data, steps=steps, folder=folder)
    shown = _Lines(given.steps, connect(given.cluster), given.model)
    watcher = Watcher(
        said=shown.say, packed=_packed, recorded=shown.record, balancedness=shown.balancedness
    )
    with _stopping() as stop:
        report = run(given, resume=resume, check=check, stop=stop, watcher=watcher)
    shown.end()
    if as_json:
        print_report(report)
    elif check:
        out.print("the run can begin")
    else:
        _print(report)
    if not check and report.steps < report.wanted_steps:
        raise typer.Exit(INTERRUPTED)


class _Lines:
    """Prints a line for each step, but not too many, and the hosts' balancedness in it."""

    def __init__(self, steps: int, cluster: Cluster, model: str | None) -> None:
        from ...cluster.train_command.progress import Progress

        self._progress = Progress(steps)
        self._cluster = cluster
        self._model = model
        self._asked_at: float | None = None
        self._printed_at: float | None = None
        self._waiting = ""
        self._collapsed = False

    def say(self, line: str) -> None:
        self.end()
        _say(line)

    def record(self, record: Record) -> None:
        from ...cluster.train_command.records import HeldOutRecord, StepRecord

        if isinstance(record, HeldOutRecord):
            self.end()
            err.print(self._progress.held_out(record), markup=False)
            return
        if not isinstance(record, StepRecord):
            return  # `say` has printed it
        self._waiting = self._progress.step(record)
        now = time.monotonic()
        if self._printed_at is None or now - self._printed_at >= _LINE_S:
            self._printed_at = now
            self.end()
        if record.collapsed and not self._collapsed:
            err.print(f"warning: {record.collapsed}", markup=False, soft_wrap=True)
        self._collapsed = record.collapsed is not None

    def balancedness(self) -> float | None:
        from ...proto.errors import ClusterError

        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at >= _ASK_S:
            self._asked_at = now
            try:
                models = self._cluster.top(0).models
            except ClusterError:
                return self._progress.balancedness  # it is as it was, until the controller is back
            mine = [one for one in models if self._model in (None, one.name)]
            known = mine[0].balancedness if mine else None
            self._progress.balancedness = None if known is None else known.mean
        return self._progress.balancedness

    def end(self) -> None:
        """Print the line that waits."""
        if self._waiting:
            err.print(self._waiting, markup=False)
            self._waiting = ""


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C sets; the second one interrupts."""
    stop = threading.Event()

    def pressed(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        _say("the run ends after the step under way, with a checkpoint; Ctrl-C again ends it now")

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _say(line: str) -> None:
    err.print(line, markup=False, soft_wrap=True)


def _packed(documents: int) -> None:
    _say(f"packed {documents:,} documents")


def _print(report: TrainReport) -> None:
    done = f"{report.steps} of {report.wanted_steps} steps of {report.model} are done"
    loss = "" if report.loss is None else f": loss {report.loss:.4f}"
    out.print(f"{done}{loss}")
    if report.first_perplexity is not None and report.perplexity is not None:
        out.print(
            f"held-out perplexity: {report.first_perplexity:.3f} at first, and "
            f"{report.perplexity:.3f} now"
        )
    if report.checkpoint is not None:
        out.print(f"checkpoint: {report.checkpoint}", soft_wrap=True)
