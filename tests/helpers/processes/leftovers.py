"""What a cluster of this process could leave behind when it has ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from moesaic.actors.runtime.embedded_ray import started_processes
from moesaic.session import is_alive, session_dir
from tests.helpers.shared_memory import in_shared_memory

# Dying processes need a moment.
_WITHIN_S = 20.0


def _living() -> set[str]:
    """This process's children, those of Rays that it started, and workers of a Ray that is gone."""
    found = set()
    for process in {*psutil.Process().children(recursive=True), *started_processes(), *_orphans()}:
        with suppress(psutil.NoSuchProcess):  # it ends just now
            if is_alive(process):
                found.add(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


def _orphans() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            raylet = process.environ().get("RAY_RAYLET_PID")
            if raylet is not None and not psutil.pid_exists(int(raylet)):
                found.append(process)
    return found


def leftovers() -> dict[str, set[str]]:
    """What there is now, by kind.

    Sockets and memfds have no names in a file system: they end with the processes that hold them.
    """
    return {
        "processes": _living(),
        "shared memory": in_shared_memory(),
        "listening": {
            f"{c.laddr}" for c in psutil.Process().net_connections() if c.status == "LISTEN"
        },
        "sessions": {file.name for file in session_dir().glob(f"*-{os.getpid()}.json")},
    }


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Check that whatever starts in here has ended soon after it."""
    before = leftovers()
    yield
    deadline = time.monotonic() + _WITHIN_S
    while True:
        more = {kind: found - before[kind] for kind, found in leftovers().items()}
        if not any(more.values()):
            return
        assert time.monotonic() < deadline, more
        time.sleep(0.1)
