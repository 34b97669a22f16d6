"""Memory that is counted against a limit; the device's is played by the CPU's."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from moesaic.kernels.slabs.bounded_memory import MemoryBudget
from tests.helpers.models.slots import HostMemory

CHUNK = mmap.PAGESIZE


class FailingMemory(HostMemory):
    """A device without memory: neither new chunks nor those of others can be mapped."""

    def map(self, chunk: int) -> None:
        raise torch.OutOfMemoryError("the device is full")

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        os.close(descriptor)
        raise torch.OutOfMemoryError("the device is full")


def test_ranges_share_a_limit() -> None:
    budget = MemoryBudget(3 * CHUNK, "hosts.0.gpu_memory")
    first, second = (budget.bound(HostMemory)(4 * CHUNK) for _ in range(2))
    first.map(0)
    first.map(3)
    second.map(1)
    assert budget.used_bytes == 3 * CHUNK == first.backed_bytes + second.backed_bytes
    with pytest.raises(torch.OutOfMemoryError, match=r"hosts\.0\.gpu_memory leaves 0 MiB for"):
        second.map(0)
    assert second.backed_bytes == CHUNK
    first.unmap(3)
    second.map(0)
    first.close()
    assert budget.used_bytes == 2 * CHUNK
    second.close()
    assert budget.used_bytes == 0


def test_memory_that_is_taken_over_counts() -> None:
    budget = MemoryBudget(2 * CHUNK)
    owner, heir = HostMemory(CHUNK), budget.bound(HostMemory)(4 * CHUNK)
    owner.map(0)
    heir.adopt(0, owner.descriptor(0))
    heir.map(1)
    assert budget.used_bytes == 2 * CHUNK
    given = owner.descriptor(0)
    with pytest.raises(torch.OutOfMemoryError):
        heir.adopt(2, given)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(given)
    heir.close()
    assert budget.used_bytes == 0
    owner.close()


def test_what_was_not_mapped_is_not_counted() -> None:
    budget = MemoryBudget(None)
    owner, memory = HostMemory(CHUNK), budget.bound(FailingMemory)(CHUNK)
    owner.map(0)
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        memory.map(0)
    with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
        memory.adopt(0, owner.descriptor(0))
    assert budget.used_bytes == 0
    memory.close()
    owner.close()
