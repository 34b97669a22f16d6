"""Imports at a low priority, which leave the cores to processes that serve."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable

from .garbage import starting_without_collections

# Added to the process's own niceness; Ray starts its workers with 15, and the maximum is 19.
NICER = 10


def import_at_low_priority(
    module: str, package: str | None = None, *, first: Callable[[], None] | None = None
) -> None:
    """Import a module at a low priority, as an import may take seconds of computing.

    ``first`` is called before, in the same way.
    On Linux each thread has its own priority, and a process may not raise it again. So a thread of
    its own does the import and then ends. Raises what the import raises.
    """
    failures: list[BaseException] = []

    def run() -> None:
        if sys.platform == "linux":
            thread_id = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread_id)
            os.setpriority(os.PRIO_PROCESS, thread_id, min(own + NICER, 19))
        try:
            # Looking for garbage, of which an import makes hardly any, takes an eighth of it.
            with starting_without_collections(makes_garbage=False):
                if first is not None:
                    first()
                importlib.import_module(module, package)
        except BaseException as failure:
            # A module may raise anything; the starter's thread raises it again.
            failures.append(failure)

    thread = threading.Thread(target=run, name=f"import {module}")
    thread.start()
    thread.join()  # without a timeout: the starter of this process has a deadline for it
    if failures:
        raise failures[0]
