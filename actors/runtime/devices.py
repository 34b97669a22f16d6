"""Devices by name, and this machine's memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from ...cluster.routing.transports import CPU
from ...proto.errors import ClusterError

# What computes on a CUDA device, and what maps its memory: {module: package}.
_FOR_CUDA = {"triton": "triton", "cuda": "cuda-bindings"}

_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


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


def machine_memory(limits: Sequence[str] = _CGROUP_LIMITS) -> tuple[int, int]:
    """Return (all, free) bytes that this machine or container may use, swap included."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free = memory.total + swap.total, memory.available + swap.free
    for file in limits:
        try:
            limit = int(Path(file).read_text())
        except (OSError, ValueError):
            continue  # no such control group, or "max"
        if limit < total:
            total, free = limit, min(free, limit)
    return total, free
