"""What commands share: JSON on stdout, and Ctrl-C as an event.

Ctrl-C as an exception may be raised inside a library, and be lost there.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
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
