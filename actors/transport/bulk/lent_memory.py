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

import numpy as np
import torch
from torch import Tensor

from ....kernels.slabs import memfd
from ....proto.errors import CallError, ClusterError
from ....proto.expert_pb2 import Bulk
from ....proto.wire import ALIGNMENT_BYTES, DTYPE_FROM_WIRE, DTYPE_TO_WIRE

_PAGE_BYTES = mmap.ALLOCATIONGRANULARITY


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


def from_wire(tensors: Sequence[Bulk.Tensor]) -> list[LentTensor]:
    """Return what a message says of tensors. Raises CallError for an unknown dtype."""
    for one in tensors:
        if one.dtype not in DTYPE_FROM_WIRE:
            raise CallError(f"dtype: {one.name} has the unknown type {one.dtype}")
    return [
        LentTensor(one.name, DTYPE_FROM_WIRE[one.dtype], tuple(one.shape), one.at)
        for one in tensors
    ]


def borrow(descriptor: int, tensors: Sequence[LentTensor]) -> dict[str, Tensor]:
    """View tensors in another process's memory; the caller closes the descriptor.

    They are to be read only, and their memory stays as long as one of them does. Their content is
    the other process's, which may change it. Raises CallError for memory that could shrink, and
    for tensors that do not lie in it.
    """
    size = os.fstat(descriptor).st_size
    for one in tensors:
        if one.offset % one.dtype.itemsize or one.offset + one.nbytes > size:
            raise CallError(
                f"tensors: {one.name}, {one.dtype} {one.shape} at byte {one.offset}, does not lie "
                f"in the memory of {size} bytes"
            )
    if not tensors or any(one.nbytes == 0 for one in tensors):
        raise CallError("tensors: none, or an empty one, cannot be read from another's memory")
    first = min(one.offset for one in tensors) // _PAGE_BYTES * _PAGE_BYTES
    end = max(one.offset + one.nbytes for one in tensors)
    try:
        memory = memfd.readable(memfd.borrow(os.dup(descriptor), first, end - first))
    except (OSError, ValueError) as error:
        raise CallError(f"the client's memory cannot be read: {error}") from error
    return {
        one.name: torch.frombuffer(
            memory,
            dtype=one.dtype,
            count=math.prod(one.shape),
            offset=one.offset - first,
        ).view(one.shape)
        for one in tensors
    }


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
