"""What commands share: JSON on stdout, and Ctrl-C as an event.

Ctrl-C as an exception may be raised inside a library, and be lost there.
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
