"""What commands share: JSON on stdout, tables, progress bars, and Ctrl-C as an event.

Ctrl-C as an exception may be raised inside a library, and be lost there.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..cluster.reports.report import Report


@contextmanager
def until_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets, instead of raising KeyboardInterrupt."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def print_json(values: Any) -> None:
    json.dump(values, sys.stdout, indent=2)
    print()


def print_report(report: Report | Sequence[Report]) -> None:
    """Print a report, or a list of them, as JSON."""
    if isinstance(report, Sequence):
        print_json([one.model_dump(mode="json") for one in report])
    else:
        print_json(report.model_dump(mode="json"))


def table(*headings: str) -> Table:
    """Return an empty table for 80 columns, which never cuts a heading or a number.

    A heading that begins with ">" stands over numbers, aligned to the right, and one that begins
    with "<" over short words: both stay on one line. All other columns wrap.
    """
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        words = heading.lstrip("<>")
        made.add_column(
            words,
            justify="right" if heading.startswith(">") else "left",
            no_wrap=words != heading,
            overflow="fold",
            min_width=max(map(len, words.split())),
        )
    return made


def number(value: float) -> str:
    """Return a rate with one decimal below 100 and none above; never "-0"."""
    digits = 1 if abs(value) < 100 else 0
    return f"{round(value, digits) + 0.0:,.{digits}f}"


# (name of the step, done, total)
ShowProgress = Callable[[str, int, int], None]


@contextmanager
def bars(console: Console) -> Iterator[ShowProgress]:
    """Show one bar for each step, in the order in which the steps are first reported.

    Where nobody watches, a line says when a step begins and when it is done.
    """
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, int] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = progress.add_task(step, total=total)  # pyright: ignore[reportArgumentType]
            progress.update(tasks[step], completed=done, total=total)  # pyright: ignore[reportArgumentType]

        yield report


def _lines(console: Console) -> ShowProgress:
    said: set[tuple[str, bool]] = set()

    def report(step: str, done: int, total: int) -> None:
        told = (step, done >= total)
        if told not in said:
            said.add(told)
            console.print(f"{step}: {done} of {total}", highlight=False)

    return report
