"""A process that fills a device's slab, hands it to a memory keeper, and waits to be killed.

python -m tests.helpers.processes.slab_owner ADDRESS PARENT DEVICE
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic.actors.host.memory.kept_memory import KeptMemory, LeftMemory
from moesaic.actors.runtime.devices import device_name
from moesaic.kernels.ffn import ExpertForm
from moesaic.kernels.slabs.device_memory import CHUNK_BYTES, DeviceMemory
from moesaic.kernels.slabs.device_pool import Memory
from moesaic.kernels.slabs.device_slab import DeviceSlab, SlotLayer
from tests.helpers.models.slots import HostMemory

KEEP_S = 60.0
HOST = "owner"
EXPERTS = 5


def make(device: str) -> DeviceSlab:
    return DeviceSlab.create("m", _layers(device), torch.device(device), **_options(device))


def adopt(device: str, left: LeftMemory) -> DeviceSlab:
    layers, where = _layers(device), torch.device(device)
    return DeviceSlab.adopt(*left.take(), layers, where, **_options(device))


def weights(device: str, expert: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(expert)
    shapes = dict(_layers(device)[0].shapes)
    return {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}


def _layers(device: str) -> dict[int, SlotLayer]:
    # On a card an expert takes more than a chunk.
    hidden, width = (2048, 20_000) if device == "cuda" else (24, 96)
    shapes = (("up", (width, hidden)), ("down", (hidden, width)))
    form = ExpertForm(transposed=False, activate=torch.relu)
    return dict.fromkeys((0, 1), SlotLayer(EXPERTS, form, False, shapes, torch.bfloat16))


def _options(device: str) -> dict[str, Any]:
    where = torch.device(device)
    allocate: Callable[[int], Memory] = HostMemory
    if device == "cuda":
        allocate = lambda nbytes: DeviceMemory(where, nbytes)  # noqa: E731
    return {
        "allocate": allocate,
        "chunk_bytes": CHUNK_BYTES if device == "cuda" else mmap.PAGESIZE,
        "device_name": device_name(where),
    }


def main(address: str, parent: int, device: str) -> None:
    kept = KeptMemory(address, HOST, keep_s=KEEP_S, parent_pid=parent)
    slab = make(device)
    for expert in range(EXPERTS):
        slab.write(1, expert, weights(device, expert), version=1 + expert)
    slab.free(1, 2, 3)
    kept.keep("m", slab)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
