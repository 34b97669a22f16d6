"""Memory in which a process makes tensors for hosts of its node to read where they lie.

So gradients change hands without a copy. The memory is a memfd as long as all tensors that may ever
lie in it. Only what a tensor was made in takes memory, and keeps it for the next one of its place:
memory that is used for the first time costs more than what is written into it.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from ....cluster.training.orders import BulkKey
from ....kernels.slabs import memfd
from ....proto.errors import CallError, ClusterError
from ....proto.expert_pb2 import Bulk
from ....proto.wire import ALIGNMENT_BYTES, DTYPE_FROM_WIRE, DTYPE_TO_WIRE
from ..grpc.weights import key_to_wire
from .datagrams import DATAGRAM_BYTES

_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY
# Upper bounds for a message's gradients, and for what it says besides each one's own bytes.
_MESSAGE_BYTES = DATAGRAM_BYTES - 1024
_FRAME_BYTES = 16


class LentTensor(NamedTuple):
    """Where a tensor lies in the memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class LentMemory:
    """Tensors by their places (any keys). Any thread may use it."""

    def __init__(self, nbytes: int, tensors: int) -> None:
        """Make room for so many bytes of so many tensors. Raises ClusterError."""
        size = _up(max(1, nbytes + tensors * ALIGNMENT_BYTES), _PAGE_BYTES)
        try:
            self.descriptor, self._map = memfd.create("lent", size, b"")
        except (OSError, ValueError) as error:
            raise ClusterError(f"no shared memory of {size} bytes can be made: {error}") from error
        self._octets = np.frombuffer(self._map, np.uint8)
        self._lock = threading.Lock()
        self._places: dict[Hashable, Tensor] = {}
        self._end = 0
        self._closed = False

    def tensor(
        self, place: Hashable, shape: torch.Size | Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """Return the tensor of a place, with any content; None if there is no room for it.

        A place keeps its shape and dtype. Raises ClusterError if the system lacks memory.
        """
        with self._lock:
            found = self._places.get(place)
            if found is None:
                found = self._make(tuple(shape), dtype)
                if found is not None:
                    self._places[place] = found
        if found is not None and (found.shape != tuple(shape) or found.dtype != dtype):
            raise ValueError(f"{place} is {found.dtype} {tuple(found.shape)}, not {dtype} {shape}")
        return found

    def hold(self, key: Hashable, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return tensors as they lie here, under their key; those that do not are copied.

        They are returned as they are if there is no room for them. Raises ClusterError.
        """
        if self.find(tensors) is not None:
            return tensors
        held = {name: self.tensor((key, name), t.shape, t.dtype) for name, t in tensors.items()}
        found = {name: tensor for name, tensor in held.items() if tensor is not None}
        if len(found) < len(tensors):
            return tensors
        with torch.no_grad():
            for name, tensor in found.items():
                tensor.copy_(tensors[name])
        return found

    def find(self, tensors: Mapping[str, Tensor]) -> list[LentTensor] | None:
        """Return where tensors lie; None if one of them lies elsewhere, or is not contiguous."""
        found = []
        for name, tensor in tensors.items():
            offset = tensor.data_ptr() - self._octets.ctypes.data if self._octets.size else -1
            inside = tensor.device.type == "cpu" and 0 <= offset < self._octets.size
            if not inside or not tensor.is_contiguous() or tensor.dtype not in DTYPE_TO_WIRE:
                return None
            found.append(LentTensor(name, tensor.dtype, tuple(tensor.shape), offset))
        return found

    def close(self) -> None:
        """Free the memory, as soon as no tensor of it is in use any more, here and elsewhere."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._places.clear()
            self._octets = np.empty(0, np.uint8)
            os.close(self.descriptor)
            try:
                self._map.close()
            except BufferError:
                return  # the mapping ends with the last tensor

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        count = math.prod(shape)
        begin = _up(self._end, ALIGNMENT_BYTES)
        size = count * dtype.itemsize
        if self._closed or not count or begin + size > self._octets.size:
            return None
        try:
            # Now, as an error: later the system would kill the process that first writes to a page.
            os.posix_fallocate(self.descriptor, begin, size)
        except OSError as error:
            raise ClusterError(
                f"there is no memory for a tensor of {size} bytes: {error}"
            ) from error
        self._end = begin + size
        with torch.inference_mode(False):
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin)
            return flat.view(shape)


def to_wire(tensors: Sequence[LentTensor]) -> list[Bulk.Tensor]:
    return [
        Bulk.Tensor(name=one.name, dtype=DTYPE_TO_WIRE[one.dtype], shape=one.shape, at=one.offset)
        for one in tensors
    ]


def lending_messages(
    gradients: Mapping[BulkKey, Mapping[str, Tensor]], memory: LentMemory
) -> tuple[list[list[Bulk.Gradient]], list[BulkKey]]:
    """Return what messages say of gradients that lie in the memory, and the keys of the others.

    Those are all that do not lie there, or have so many tensors that no message names them all.
    """
    messages: list[list[Bulk.Gradient]] = []
    others: list[BulkKey] = []
    left_bytes = 0
    for key, tensors in gradients.items():
        lent = memory.find(tensors)
        one = Bulk.Gradient(key=key_to_wire(key), tensors=to_wire(lent or ()))
        if not lent or (size := one.ByteSize() + _FRAME_BYTES) > _MESSAGE_BYTES:
            others.append(key)
            continue
        if size > left_bytes:
            messages.append([])
            left_bytes = _MESSAGE_BYTES
        messages[-1].append(one)
        left_bytes -= size
    return messages, others


def from_wire(tensors: Sequence[Bulk.Tensor]) -> list[LentTensor]:
    """Return what a message says of tensors. Raises CallError for an unknown dtype."""
    for one in tensors:
        if one.dtype not in DTYPE_FROM_WIRE:
            raise CallError(f"dtype: {one.name} has the unknown type {one.dtype}")
    return [
        LentTensor(one.name, DTYPE_FROM_WIRE[one.dtype], tuple(one.shape), one.at)
        for one in tensors
    ]


class BorrowedMemory:
    """Another process's memory, mapped here to be read; whoever has a tensor of it keeps it."""

    def __init__(self, descriptor: int) -> None:
        """Map it; the descriptor stays the caller's. Raises CallError for memory that could shrink.

        It is mapped as a whole, and only what is read takes entries of the page table. They stay
        for the next read: making them takes as long as copying the page.
        """
        self._size = os.fstat(descriptor).st_size
        try:
            self._memory = memfd.readable(memfd.borrow(os.dup(descriptor)))
        except (OSError, ValueError) as error:
            raise CallError(f"the client's memory cannot be read: {error}") from error

    def tensors(self, lent: Sequence[LentTensor]) -> dict[str, Tensor]:
        """View tensors, which are to be read only. Their content is the other process's.

        Raises CallError for those that do not lie in the memory.
        """
        for one in lent:
            if one.offset % one.dtype.itemsize or one.offset + one.nbytes > self._size:
                raise CallError(
                    f"tensors: {one.name}, {one.dtype} {one.shape} at byte {one.offset}, does not "
                    f"lie in the memory of {self._size} bytes"
                )
        if not lent or any(one.nbytes == 0 for one in lent):
            raise CallError("tensors: none, or an empty one, cannot be read from another's memory")
        return {
            one.name: torch.frombuffer(
                self._memory, dtype=one.dtype, count=math.prod(one.shape), offset=one.offset
            ).view(one.shape)
            for one in lent
        }


class BorrowedMemories:
    """The memory of clients, each mapped once, as long as somebody keeps it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By device and inode, which no other memory has while this one is mapped.
        self._known = WeakValueDictionary[tuple[int, int], BorrowedMemory]()

    def of(self, descriptor: int) -> BorrowedMemory:
        """Return the memory of a descriptor, which stays the caller's. Raises CallError."""
        about = os.fstat(descriptor)
        with self._lock:
            found = self._known.get((about.st_dev, about.st_ino))
            if found is None:
                found = self._known[about.st_dev, about.st_ino] = BorrowedMemory(descriptor)
            return found


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
