"""Memory keepers that run on this machine, and hosts that use one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from moesaic.cluster.placement import HostEntry
from tests.helpers.pool.transports import process, settles

KEEP_S = 60.0


def keepers(node: int) -> list[psutil.Process]:
    """Those that end with the process ``node``."""

    def is_one(process: psutil.Process) -> bool:
        try:
            command = process.cmdline()
        except psutil.Error:
            return False
        return "moesaic.actors.host.memory.memory_keeper" in command and command[-1] == str(node)

    return [one for one in psutil.process_iter() if is_one(one)]


def kept_memory(keeper: psutil.Process) -> list[str]:
    """Memory of models that a keeper has descriptors of."""
    links = []
    for one in list(Path(f"/proc/{keeper.pid}/fd").iterdir()):
        with suppress(FileNotFoundError):  # it was closed meanwhile
            links.append(str(one.readlink()))
    return [link for link in links if "memfd:moesaic:m" in link]


@contextmanager
def node_process() -> Iterator[subprocess.Popen[bytes]]:
    """The process with which keepers end; they have ended after it."""
    with subprocess.Popen(["sleep", "300"]) as parent:
        try:
            yield parent
        finally:
            parent.kill()
    assert settles(lambda: not keepers(parent.pid))


@contextmanager
def host_process(
    folder: Path,
    address: str,
    node: int,
    *,
    device: str = "cpu",
    in_slots: bool = False,
    keep_s: float = KEEP_S,
) -> Iterator[tuple[subprocess.Popen[str], HostEntry, int]]:
    """A host in a process of its own, and how many experts it has from its predecessor.

    ``in_slots``: its experts lie in a device's slots, which the CPU's memory plays."""
    slots = ["slots"] if in_slots else []
    options = (*slots, "lends", "kept", address, str(keep_s), str(node))
    with process("serve", str(folder), "kept", device, *options) as (child, line):
        assert child.stdout is not None
        yield child, HostEntry(**json.loads(line)), int(child.stdout.readline())


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
