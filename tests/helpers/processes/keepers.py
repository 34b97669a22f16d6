"""Memory keepers that run on this machine."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def keepers(node: int) -> list[psutil.Process]:
    """Those that end with the process ``node``."""

    def is_one(process: psutil.Process) -> bool:
        try:
            command = process.cmdline()
        except psutil.Error:
            return False
        return "moesaic.actors.host.memory_keeper" in command and command[-1] == str(node)

    return [one for one in psutil.process_iter() if is_one(one)]


def kept_memory(keeper: psutil.Process) -> list[str]:
    """Memory of models that a keeper has descriptors of."""
    links = []
    for one in list(Path(f"/proc/{keeper.pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(str(one.readlink()))
    return [link for link in links if "memfd:moesaic:m" in link]
