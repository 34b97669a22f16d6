"""Devices by name, and this machine's memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil
import torch

from ...cluster.routing.transports import CPU
from ...proto.errors import ClusterError

# What computes on a CUDA device, and what maps its memory: {module: package}.
_FOR_CUDA = {"triton": "triton", "cuda": "cuda-bindings"}

# The limit of a container's memory, in version 2 and version 1 of control groups.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# The file beside each limit that has the memory in use. The kernel can free some of that at any
# time: the pages of files that `memory.stat` counts as inactive.
_USED = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
_INACTIVE = ("inactive_file", "total_inactive_file")


def pick_device(device: str) -> torch.device:
    """Return the device of this name; `auto` is CUDA if this process can use it, else the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def device_name(device: torch.device) -> str:
    """Return the UUID of a CUDA device, which all processes agree on; `cpu` for any other."""
    if device.type != "cuda":
        return CPU
    return str(torch.cuda.get_device_properties(device).uuid)


def check_packages(device: torch.device) -> None:
    """Check that a host can compute on ``device``. Raises ClusterError."""
    if device.type == "cpu":
        return
    missing = [name for module, name in _FOR_CUDA.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ClusterError(
            f"hosts.device: {device} needs {' and '.join(missing)}, which CUDA builds of PyTorch "
            f"bring; pip install {' '.join(missing)}, or set `device: cpu`"
        )


def pinned_numa_node(
    nodes: Path = Path("/sys/devices/system/node"), cpus: Collection[int] | None = None
) -> int | None:
    """Return the NUMA node of the CPUs that this process may use.

    None: they are of several nodes, or the machine has only one. ``cpus`` are the process's CPUs
    (None: ask the system).
    """
    mine = set(os.sched_getaffinity(0) if cpus is None else cpus)
    lists = {int(f.parent.name[4:]): f.read_text() for f in nodes.glob("node[0-9]*/cpulist")}
    if len(lists) < 2:
        return None
    return next((node for node, text in lists.items() if mine <= _cpus(text)), None)


def _cpus(text: str) -> set[int]:
    """Return the numbers in a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def machine_memory(limits: Sequence[str] = _CGROUP_LIMITS) -> tuple[int, int]:
    """Return (all, free) bytes that this machine or container may use, swap included."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free = memory.total + swap.total, memory.available + swap.free
    for file in map(Path, limits):
        try:
            limit = int(file.read_text())
        except (OSError, ValueError):
            continue  # no such control group, or "max"
        if limit < total:
            total, free = limit, min(free, max(0, limit - _used_bytes(file)))
    return total, free


def _used_bytes(limit: Path) -> int:
    """Return what a control group uses and cannot free; 0 if the kernel does not say."""
    try:
        used = int(limit.with_name(_USED.get(limit.name, "")).read_text())
        lines = limit.with_name("memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return 0
    counts = dict(line.split(maxsplit=1) for line in lines if line)
    # Version 1 has both names; the total includes the groups below.
    return used - max((int(counts.get(name, 0)) for name in _INACTIVE), default=0)
