"""A device's memory with a bound on what all ranges of a process may map together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from .device_pool import Memory


class MemoryBudget:
    """Counts the memory that is mapped in several ranges, and refuses more than its limit."""

    def __init__(self, limit_bytes: int | None = None, said_by: str = "") -> None:
        """Start with nothing taken.

        ``limit_bytes``: None for no limit. ``said_by`` names what set the limit, for errors.
        """
        self.limit_bytes = limit_bytes
        self._said_by = said_by
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def take(self, nbytes: int) -> None:
        """Count memory that will be mapped. Raises torch.OutOfMemoryError, with nothing counted."""
        with self._lock:
            used, limit = self._used_bytes, self.limit_bytes
            if limit is not None and used + nbytes > limit:
                raise torch.OutOfMemoryError(
                    f"{self._said_by} leaves {limit >> 20:,} MiB for experts, and {used >> 20:,} "
                    f"MiB are taken: {nbytes >> 20:,} MiB more do not fit"
                )
            self._used_bytes += nbytes

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self._used_bytes -= nbytes

    def bound(self, allocate: Callable[[int], Memory]) -> Callable[[int], Memory]:
        """Return a function that allocates ranges whose memory is counted here."""
        return lambda nbytes: _BoundedMemory(allocate(nbytes), self)


class _BoundedMemory:
    """A range of which each chunk with memory of its own is counted."""

    def __init__(self, memory: Memory, budget: MemoryBudget) -> None:
        self._memory = memory
        self._budget = budget
        self._counted: set[int] = set()

    @property
    def chunk_bytes(self) -> int:
        return self._memory.chunk_bytes

    @property
    def backed_bytes(self) -> int:
        return self._memory.backed_bytes

    def map(self, chunk: int) -> None:
        self._budget.take(self.chunk_bytes)
        try:
            self._memory.map(chunk)
        except BaseException:
            self._budget.give_back(self.chunk_bytes)
            raise
        self._counted.add(chunk)

    def unmap(self, chunk: int) -> None:
        self._memory.unmap(chunk)
        self._forget(chunk)

    def descriptor(self, chunk: int) -> int:
        return self._memory.descriptor(chunk)

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        try:
            self._budget.take(self.chunk_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        try:
            self._memory.adopt(chunk, descriptor, writable=writable)
        except BaseException:
            self._budget.give_back(self.chunk_bytes)
            raise
        self._counted.add(chunk)

    def tensor(self, nbytes: int) -> Tensor:
        return self._memory.tensor(nbytes)

    def close(self) -> None:
        self._memory.close()
        for chunk in list(self._counted):
            self._forget(chunk)

    def _forget(self, chunk: int) -> None:
        self._counted.remove(chunk)
        self._budget.give_back(self.chunk_bytes)
