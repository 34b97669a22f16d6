"""Progress bars for long operations, and the same progress as lines for another process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..proto.errors import MoesaicError, from_wire

# (name of the step, done, total)
Report = Callable[[str, int, int], None]


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """Show one bar for each step, in the order in which the steps are first reported."""
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


@dataclass(frozen=True, slots=True)
class Lines:
    """Progress, warnings and the final error as JSON lines.

    The process that shows them reads them with `read_lines`.
    """

    fd: int

    def report(self, step: str, done: int, total: int) -> None:
        self._write([step, done, total])

    def warn(self, text: str) -> None:
        self._write({"warning": text})

    def fail(self, error: MoesaicError) -> None:
        self._write({"code": error.code, "error": str(error)})

    def _write(self, line: Any) -> None:
        os.write(self.fd, json.dumps(line).encode() + b"\n")


def read_lines(
    lines: Iterable[str], report: Report, warn: Callable[[str], None]
) -> MoesaicError | None:
    """Pass on what `Lines` wrote, and return its error."""
    failed = None
    for line in lines:
        match json.loads(line):
            case {"warning": text}:
                warn(text)
            case {"code": code, "error": text}:
                failed = from_wire(code, text)
            case [step, done, total]:
                report(step, done, total)
    return failed
