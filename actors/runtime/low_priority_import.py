"""Imports that leave the cores to others."""

from __future__ import annotations

import importlib
import os
import sys
import threading

# As `nice` has it, beside the process's own, which Ray lets begin at 15 of 19.
NICER = 10


def import_quietly(module: str, package: str | None = None) -> None:
    """Import a module, which may take seconds of computing, at a low priority.

    On Linux threads have priorities of their own, and nobody may raise one again: so a thread does
    it that ends with it. Raises what the import raises.
    """
    failures: list[BaseException] = []

    def run() -> None:
        if sys.platform == "linux":
            thread_id = threading.get_native_id()
            own = os.getpriority(os.PRIO_PROCESS, thread_id)
            os.setpriority(os.PRIO_PROCESS, thread_id, min(own + NICER, 19))
        try:
            importlib.import_module(module, package)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name=f"import {module}")
    thread.start()
    thread.join()  # whoever started the process has a deadline for it
    if failures:
        raise failures[0]
