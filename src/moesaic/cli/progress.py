"""Progress bars for whatever takes long, and the same progress as lines for another process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# (what is being done, done, of how many)
Report = Callable[[str, int, int], None]


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """One bar for each step, in the order in which the steps are first reported."""
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


@contextmanager
def lines(fd: int) -> Iterator[Report]:
    """Progress as JSON lines on ``fd``, for a process that shows it."""

    def report(step: str, done: int, total: int) -> None:
        os.write(fd, json.dumps([step, done, total]).encode() + b"\n")

    try:
        yield report
    finally:
        os.close(fd)
