"""The memory of a pool of places on a device: it comes and goes with the places that are used."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .layout import SlotPool, SlotTensor


class Memory(Protocol):
    """Addresses of which any chunk can be given memory; `DeviceMemory` is one."""

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def backed_bytes(self) -> int: ...

    def map(self, chunk: int) -> None:
        """Give a chunk memory. Raises torch.OutOfMemoryError, with nothing changed."""
        ...

    def unmap(self, chunk: int) -> None:
        """Take a chunk's memory away, when nothing that was begun before uses it any more."""
        ...

    def descriptor(self, chunk: int) -> int:
        """Return a new descriptor of a chunk's memory; the caller closes it."""
        ...

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        """Map the memory of another process as a chunk; the descriptor is this object's now."""
        ...

    def tensor(self, nbytes: int) -> Tensor:
        """Return the first bytes of the range, (nbytes,) uint8; only mapped chunks may be used."""
        ...

    def close(self) -> None: ...


class DevicePool:
    """A pool's memory, which comes and goes with the places that are used."""

    def __init__(self, pool: SlotPool, allocate: Callable[[int], Memory]) -> None:
        self._pool = pool
        self._memory: dict[str, Memory] = {}
        try:
            for tensor in pool.tensors:
                memory = allocate(pool.places * pool.stride_bytes(tensor))
                self._memory[tensor.name] = memory
                if memory.chunk_bytes != pool.chunk_bytes:
                    has, needed = memory.chunk_bytes, pool.chunk_bytes
                    raise ValueError(f"chunks of {has}, not {needed} bytes")
        except BaseException:
            self.close()
            raise
        self._free = list(range(pool.places))  # the lowest first, so that used ones stay together
        self._users: dict[int, int] = {}  # of each chunk that has memory, by its number

    @property
    def backed_bytes(self) -> int:
        return sum(memory.backed_bytes for memory in self._memory.values())

    def take(self) -> tuple[int, list[int]]:
        """Give a free place memory; return its number and the chunks that were mapped for it."""
        place = heapq.heappop(self._free)
        made: list[int] = []
        try:
            for chunk in self._pool.chunks(place):
                if chunk not in self._users:
                    tensor, number = self._pool.part(chunk)
                    self._memory[tensor.name].map(number)
                    made.append(chunk)
        except BaseException:
            self._unmap(made)
            heapq.heappush(self._free, place)
            raise
        for chunk in self._pool.chunks(place):
            self._users[chunk] = self._users.get(chunk, 0) + 1
        return place, made

    def adopt(self, places: Collection[int], descriptors: dict[int, int]) -> None:
        """Take places that an earlier process filled, with the memory of their chunks.

        What is mapped is taken out of ``descriptors``. Raises RuntimeError, with a part mapped.
        """
        for place in places:
            for chunk in self._pool.chunks(place):
                if chunk not in self._users:
                    tensor, number = self._pool.part(chunk)
                    self._memory[tensor.name].adopt(number, descriptors.pop(chunk), writable=True)
                self._users[chunk] = self._users.get(chunk, 0) + 1
        self._free = sorted(set(self._free).difference(places))

    def unused(self, place: int) -> list[int]:
        """Return the chunks that `give_back` unmaps."""
        return [chunk for chunk in self._pool.chunks(place) if self._users[chunk] == 1]

    def give_back(self, place: int) -> None:
        unused = self.unused(place)
        for chunk in self._pool.chunks(place):
            self._users[chunk] -= 1
        for chunk in unused:
            del self._users[chunk]
        self._unmap(unused)
        heapq.heappush(self._free, place)

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """All places of each tensor of the experts, by its name."""
        found = {}
        for tensor in self._pool.tensors:
            memory = self._memory[tensor.name]
            found[tensor.name] = as_places(memory, self._pool, tensor, self._pool.places)
        return found

    def descriptor(self, chunk: int) -> int:
        tensor, number = self._pool.part(chunk)
        return self._memory[tensor.name].descriptor(number)

    def close(self) -> None:
        self.__dict__.pop("parts", None)
        for memory in self._memory.values():
            memory.close()

    def _unmap(self, chunks: list[int]) -> None:
        for chunk in chunks:
            tensor, number = self._pool.part(chunk)
            self._memory[tensor.name].unmap(number)


def as_places(memory: Memory, pool: SlotPool, tensor: SlotTensor, places: int) -> Tensor:
    """Return the beginning of a range of addresses as places of a tensor, (places, ...)."""
    stride, size = pool.stride_bytes(tensor), torch.Size(tensor.shape).numel()
    rows = memory.tensor(places * stride).view(tensor.dtype).view(places, -1)
    return rows[:, :size].unflatten(1, tensor.shape)
