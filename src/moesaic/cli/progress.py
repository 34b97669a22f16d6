"""Progress bars for long operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# (name of the step, done, total)
Report = Callable[[str, int, int], None]


@contextmanager
def bars(console: Console) -> Iterator[Report]:
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


def _lines(console: Console) -> Report:
    said: set[tuple[str, bool]] = set()

    def report(step: str, done: int, total: int) -> None:
        told = (step, done >= total)
        if told not in said:
            said.add(told)
            console.print(f"{step}: {done} of {total}", highlight=False)

    return report
