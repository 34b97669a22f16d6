"""Freeze a process: all of its threads have stopped when the call returns."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

DEADLINE_S = 10.0


def freeze(pid: int) -> None:
    """Send SIGSTOP, and wait until it has reached every thread.

    On a busy machine threads run on for a while after the signal was sent: a frozen peer would
    still take what is sent to it now.
    """
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + DEADLINE_S
    while any(_state(task) not in "Tt" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < until, f"process {pid} did not stop"
        time.sleep(0.001)


def _state(task: Path) -> str:
    """Return the letter that proc(5) has for a thread's state; "T" for a thread that has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "T"
