"""Files in shared memory that processes have left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from moesaic.actors.runtime.embedded_ray import started_processes

IN_RAM = Path("/dev/shm")


def in_shared_memory() -> set[str]:
    """The files there, without those that living processes which are not below this one hold.

    Other programs of the machine come and go; semaphores of theirs are no leak of a test's.
    """
    own = {os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
    own |= {p.pid for p in started_processes()}
    there = {str(entry) for entry in IN_RAM.iterdir()}
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) in own:
            continue
        try:
            maps = (folder / "maps").read_text()
            opened = {str(fd.readlink()) for fd in (folder / "fd").iterdir()}
        except OSError:
            continue  # it has ended, or it belongs to another user
        there -= opened
        there -= {line.partition("/")[1] + line.partition("/")[2] for line in maps.splitlines()}
    return there


def left_in_shared_memory(before: set[str], within_s: float = 5.0) -> set[str]:
    """What is more than before, once dying processes have had their time."""
    deadline = time.monotonic() + within_s
    while (more := in_shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return more
