"""Ctrl-C as an event. As an exception it may be raised inside a library, and be lost there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def until_ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, in place of what it does otherwise."""
    stop = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
