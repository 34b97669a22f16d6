"""What commands share of their terminal: JSON on stdout, and Ctrl-C as an event.

As an exception Ctrl-C may be raised inside a library, and be lost there.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def until_ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of what it does otherwise."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def print_json(values: Any) -> None:
    json.dump(values, sys.stdout, indent=2)
    print()
