"""Devices by name, and the memory of this machine and of its cards."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ...cluster.card_memory import (
    CONTEXT_BYTES,
    Card,
    CardShare,
    gb,
    mig_names,
    too_small_for_a_trunk,
)
from ...cluster.routing.transports import CPU
from ...proto.errors import ClusterError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NVML = "libnvidia-ml.so.1"

# What computes on a CUDA device, and what maps its memory: {module: package}.
_FOR_CUDA = {"triton": "triton", "cuda": "cuda-bindings"}

log = logging.getLogger(__name__)

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
    """Return the UUID of a CUDA device, which all processes agree on; `cpu` for any other.

    It does not depend on the form in which CUDA_VISIBLE_DEVICES names the device. An instance of a
    GPU in MIG mode is a device of its own, by its name there: CUDA may give it its GPU's UUID.
    """
    if device.type != "cuda":
        return CPU
    instances = mig_names(os.environ.get(_VISIBLE))
    if instances:
        return instances[device.index or 0]
    return str(torch.cuda.get_device_properties(device).uuid)


# ---- the memory of cards ------------------------------------------------------------------------


def gpu_count() -> int:
    """Return how many GPUs, or instances of one, a Ray that starts here has for its processes."""
    return len(mig_names(os.environ.get(_VISIBLE))) or torch.cuda.device_count()


def visible_cards() -> list[Card]:
    """Return the cards that this process and its children may use, without using one.

    CUDA shows a process only the first of several MIG instances; its children get one each. Where
    NVML does not answer, it is unknown what is free, and other instances are missing.
    """
    if not torch.cuda.is_available():
        return []
    instances = mig_names(os.environ.get(_VISIBLE))
    # Asking CUDA what is free would make a context on each card, which stays.
    with _nvml() as memory_of:
        cards = []
        for number, name in enumerate(instances):
            memory = memory_of(name)
            if memory is not None:
                cards.append(Card(name, *memory))
            elif number == 0:
                cards.append(Card(name, torch.cuda.get_device_properties(0).total_memory))
        if instances:
            return cards
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory = memory_of(f"GPU-{properties.uuid}")
            free = None if memory is None else memory[1]
            cards.append(Card(str(properties.uuid), properties.total_memory, free))
        return cards


class _NvmlMemory(ctypes.Structure):
    """NVML's `nvmlMemory_t`: bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@contextmanager
def _nvml() -> Iterator[Callable[[str], tuple[int, int] | None]]:
    """Give a function from a card's name to its (total, free) bytes; None where NVML fails."""
    try:
        library = ctypes.CDLL(_NVML)
        failed = library.nvmlInit_v2()
    except (OSError, AttributeError) as error:
        library, failed = None, error
    if library is None or failed:
        log.info("NVML does not tell what is free on the GPUs: %s", failed)
        yield lambda name: None
        return

    def memory_of(name: str) -> tuple[int, int] | None:
        handle, found = ctypes.c_void_p(), _NvmlMemory()
        failed = library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        failed = failed or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found))
        if failed:
            log.info("NVML does not tell what is free on %s: error %s", name, failed)
            return None
        return int(found.total), int(found.free)

    try:
        yield memory_of
    finally:
        library.nvmlShutdown()


def card_limit(device: torch.device, share: CardShare) -> int | None:
    """Return what this process may take of its card, in bytes; None: there is no limit.

    Raises ClusterError if that is more than the card has.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    limit = share.limit_bytes(total)
    if limit is not None and limit > total:
        raise ClusterError(
            f"{share.limited_by}: {gb(limit)}, but {device} has {gb(total)}; set at most that"
        )
    return limit


def take_for_trunk(device: torch.device, share: CardShare, weight_bytes: int) -> int | None:
    """Keep this process, a trunk, within its part of a card; return that part in bytes.

    None: there is no limit. ``weight_bytes`` are its weights and its key-value cache. Raises
    ClusterError if they do not fit into the limit or into what is free, before any is loaded.
    """
    limit = card_limit(device, share)
    if limit is not None and weight_bytes > limit:
        raise ClusterError(f"{share.limited_by}: {too_small_for_a_trunk(weight_bytes, limit)}")
    free, total = torch.cuda.mem_get_info(device)
    if weight_bytes > free:
        raise ClusterError(
            f"{share.key}.device: the trunk's weights and its key-value cache need "
            f"{gb(weight_bytes)}, and {device} has {gb(free)} free of {gb(total)}; lower "
            "trunk.cache_tokens, give hosts on this GPU less (hosts.gpu_memory), or end other "
            "programs"
        )
    if limit is not None:
        limit_torch(device, max(weight_bytes, limit - CONTEXT_BYTES))
    return limit


def limit_torch(device: torch.device, nbytes: int) -> None:
    """Let PyTorch take no more than this of a card; beyond that it raises OutOfMemoryError."""
    total = torch.cuda.get_device_properties(device).total_memory
    # The function wants a number.
    torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device.index or 0)


# ---- what a device needs ------------------------------------------------------------------------


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


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, and wait until it is there; pinned memory is copied fastest."""
    if not tensor.is_cuda:
        return tensor.cpu()
    found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    found.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return found
