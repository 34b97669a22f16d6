"""Experts that other processes keep on a device of this one, mapped so that they can only be read.

The places of all lenders whose experts are alike lie side by side in one range of addresses for
each tensor. So one computation takes experts of several lenders.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor

from .device_pool import Memory, as_places
from .layout import SlabLayout, SlotPool, SlotTensor
from .slot_entries import SlotEntries

log = logging.getLogger(__name__)

_MOST_LENDERS = 16  # of one pool at a time; addresses are reserved for all of them
_LONGEST_WAIT_S = 5.0  # of a computation for changes that wait for others; then it goes first


class LentPool:
    """The places of one form of experts, of all that lend them."""

    def __init__(self, pool: SlotPool, allocate: Callable[[int], Memory]) -> None:
        self._pool = pool
        self._memory = {
            tensor.name: allocate(_MOST_LENDERS * pool.apart * pool.stride_bytes(tensor))
            for tensor in pool.tensors
        }
        self._free = list(range(_MOST_LENDERS))

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """All places of each tensor, by its name; those without memory must not be used."""
        places = _MOST_LENDERS * self._pool.apart
        return {
            tensor.name: as_places(self._memory[tensor.name], self._pool, tensor, places)
            for tensor in self._pool.tensors
        }

    def join(self) -> int:
        """Return the first of the places of another lender. Raises ValueError if none is left."""
        if not self._free:
            raise ValueError(f"{_MOST_LENDERS} hosts lend experts of this form already")
        return self._free.pop(0) * self._pool.apart

    def leave(self, first: int) -> None:
        """Undo a `join`; nothing of the lender is mapped any more."""
        self._free.append(first // self._pool.apart)

    def map(self, first: int, chunk: int, descriptor: int) -> None:
        """Map a chunk of the lender whose places begin at ``first``, and close the descriptor."""
        memory, number = self._find(first, chunk)
        memory.adopt(number, descriptor)

    def unmap(self, first: int, chunk: int) -> None:
        memory, number = self._find(first, chunk)
        memory.unmap(number)

    def close(self) -> None:
        self.__dict__.pop("parts", None)
        for memory in self._memory.values():
            memory.close()

    def _find(self, first: int, chunk: int) -> tuple[Memory, int]:
        tensor, number = self._pool.part(chunk)
        start = first * self._pool.stride_bytes(tensor) // self._pool.chunk_bytes
        return self._memory[tensor.name], start + number


class LentPools:
    """The pools of all forms of experts that are lent to this process.

    A computation must find mapped what it found within reach. So nothing is mapped or unmapped
    while one is running (`in_use`), and who has found something compares `unmapped` before it
    computes.
    """

    def __init__(self, allocate: Callable[[int, int], Memory]) -> None:
        """``allocate`` takes a number of bytes, and that of a chunk."""
        self.unmapped = 0  # how often something was unmapped
        self._allocate = allocate
        self._pools: dict[tuple[tuple[SlotTensor, ...], int, int], LentPool] = {}
        self._turn = threading.Condition()
        self._entered = threading.local()
        self._users = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def of(self, pool: SlotPool) -> LentPool:
        key = pool.tensors, pool.places, pool.chunk_bytes
        if key not in self._pools:
            self._pools[key] = LentPool(pool, lambda size: self._allocate(size, pool.chunk_bytes))
        return self._pools[key]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep everything mapped as it is; a thread may enter it again."""
        depth = getattr(self._entered, "depth", 0)
        if not depth:
            with self._turn:
                # Computations that overlap without end would keep changes waiting.
                self._turn.wait_for(lambda: not self._waiting, _LONGEST_WAIT_S)
                self._users += 1
        self._entered.depth = depth + 1
        try:
            yield
        finally:
            self._entered.depth = depth
            if not depth:
                with self._turn:
                    self._users -= 1
                    self._run()

    def change(self, change: Callable[[], None]) -> None:
        """Map or unmap something now, or as soon as no computation is running."""
        with self._turn:
            self._waiting.append(change)
            self._run()

    def _run(self) -> None:
        while self._waiting and not self._users:
            self._waiting.popleft()()
            self._turn.notify_all()

    def close(self) -> None:
        """Unmap everything, when no computation is running."""
        self.change(self._close)

    def _close(self) -> None:
        self.unmapped += 1
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class DeviceSlabReader:
    """What one process keeps on a device, as it says in shared memory, and what of it is here."""

    def __init__(self, layout: SlabLayout, memory: Any) -> None:
        self.layout = layout
        self.entries = SlotEntries(layout, memory)
        self._serials = np.frombuffer(
            memory, np.uint64, count=layout.chunks, offset=layout.chunks_start
        )
        self._mapped: dict[int, int] = {}  # {chunk: its serial number}
        self._joined: list[tuple[SlotPool, LentPool, int]] = []
        self._pools: LentPools | None = None

    def join(self, pools: LentPools) -> None:
        """Reserve places in ``pools``, for chunks to come. Raises ValueError."""
        self._pools = pools
        try:
            for pool in self.layout.pools:
                lent = pools.of(pool)
                self._joined.append((pool, lent, lent.join()))
        except BaseException:
            self.close()
            raise

    def take(self, chunk: int, serial: int, descriptor: int, then: Callable[[], None]) -> None:
        """Map a chunk of the device's memory, and close its descriptor; ``then`` follows."""
        assert self._pools is not None
        self._pools.change(partial(self._take, chunk, serial, descriptor, then))

    def drop(self, chunk: int, serial: int) -> None:
        """Unmap a chunk, if it is there."""
        assert self._pools is not None
        self._pools.change(partial(self._drop, chunk, serial))

    def close(self) -> None:
        """Unmap everything."""
        if self._pools is not None:
            self._pools.change(self._close)

    def place(self, layer: int, slot: int) -> int | None:
        """Return the place of a filled slot in the layer's pool, or None if it is not mapped."""
        joined = self._of_layer(layer)
        place = self.entries.place(slot)
        if joined is None or place >= joined[0].places:
            return None
        chunks = joined[0].chunks(place)
        there = (self._mapped.get(chunk) == int(self._serials[chunk]) for chunk in chunks)
        return joined[2] + place if all(there) else None

    def parts(self, layer: int) -> dict[str, Tensor]:
        """Return all places of each tensor of a layer's experts, by its name."""
        joined = self._of_layer(layer)
        assert joined is not None, "no expert of the layer is within reach"
        return joined[1].parts

    def _take(self, chunk: int, serial: int, descriptor: int, then: Callable[[], None]) -> None:
        joined = next((one for one in self._joined if one[0].has(chunk)), None)
        if joined is None:  # it was closed, or there is no such chunk
            os.close(descriptor)
            return
        try:
            if chunk in self._mapped:
                self._drop(chunk, self._mapped[chunk])
            joined[1].map(joined[2], chunk, descriptor)
        except RuntimeError as error:
            # Its experts are sent.
            log.warning("chunk %d of a device's memory cannot be mapped: %s", chunk, error)
            return
        self._mapped[chunk] = serial
        then()

    def _drop(self, chunk: int, serial: int) -> None:
        if self._mapped.get(chunk) != serial:
            return
        assert self._pools is not None
        self._pools.unmapped += 1
        del self._mapped[chunk]
        for pool, lent, first in self._joined:
            if pool.has(chunk):
                lent.unmap(first, chunk)

    def _close(self) -> None:
        for chunk, serial in list(self._mapped.items()):
            self._drop(chunk, serial)
        for _, lent, first in self._joined:
            lent.leave(first)
        self._joined.clear()

    def _of_layer(self, layer: int) -> tuple[SlotPool, LentPool, int] | None:
        tensors = self.layout.layers[layer].tensors
        return next((one for one in self._joined if one[0].tensors == tensors), None)
