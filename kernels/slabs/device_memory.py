"""Addresses on a CUDA device of which any part can be given memory, and lose it again.

A range of addresses costs nothing. Memory is mapped into it in chunks, and unmapped again. Each
chunk has a file descriptor, as memory of a memfd has: another process maps it by that, and the
memory stays until the last descriptor and mapping are gone.

It needs ``cuda-bindings``, which CUDA builds of PyTorch bring.
"""

# The bindings' types are made at run time.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


def available() -> bool:
    """Return whether this process can map memory of a CUDA device."""
    try:
        import cuda.bindings.driver  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class _Interface:
    """Shows a range of addresses to PyTorch, which keeps this object with its tensor."""

    __cuda_array_interface__: dict[str, Any]
    owner: object


class DeviceMemory:
    """A range of addresses on one device; one thread at a time may change what is mapped."""

    def __init__(
        self, device: torch.device, nbytes: int, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self.device = torch.device("cuda", device.index or 0)
        torch.zeros(1, device=self.device)  # the device's context, which PyTorch makes
        self._properties = self._allocation_properties()
        grain = self._call(
            driver.cuMemGetAllocationGranularity,
            self._properties,
            driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        )
        self.chunk_bytes = math.ceil(chunk_bytes / grain) * grain
        self.nbytes = max(1, math.ceil(nbytes / self.chunk_bytes)) * self.chunk_bytes
        self._address = int(self._call(driver.cuMemAddressReserve, self.nbytes, grain, 0, 0))
        self._chunks: dict[int, Any] = {}
        # Of chunks that another process made. CUDA does not say that they may be exported again.
        self._descriptors: dict[int, int] = {}

    @property
    def backed_bytes(self) -> int:
        """The memory that is mapped."""
        return len(self._chunks) * self.chunk_bytes

    def map(self, chunk: int) -> None:
        """Give a chunk memory. Raises torch.OutOfMemoryError, with nothing changed."""
        self._map(chunk, self._create())

    def unmap(self, chunk: int) -> None:
        """Take a chunk's memory away; that waits for the device."""
        # A kernel that was enqueued before may still read there.
        torch.cuda.synchronize(self.device)
        self._unmap(chunk)

    def tensor(self, nbytes: int) -> Tensor:
        """Return the first bytes of the range, (nbytes,) uint8; only mapped chunks may be used."""
        if nbytes > self.nbytes:
            raise ValueError(f"a tensor of {nbytes} bytes is more than the range's {self.nbytes}")
        interface = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }
        # PyTorch asks the driver what is at the first address.
        empty = 0 not in self._chunks
        if empty:
            self.map(0)
        try:
            return torch.as_tensor(_Interface(interface, self), device=self.device)
        finally:
            if empty:
                self.unmap(0)

    def descriptor(self, chunk: int) -> int:
        """Return a new descriptor of a chunk's memory; the caller closes it."""
        if chunk in self._descriptors:
            return os.dup(self._descriptors[chunk])
        kind = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        export = self._driver.cuMemExportToShareableHandle
        return int(self._call(export, self._chunks[chunk], kind, 0))

    def adopt(self, chunk: int, descriptor: int, *, writable: bool = False) -> None:
        """Map a chunk that another process made; the descriptor is this object's now.

        A chunk that is ``writable`` has a `descriptor` from now on.
        """
        kind = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        try:
            handle = self._call(self._driver.cuMemImportFromShareableHandle, descriptor, kind)
            self._map(chunk, handle, writable=writable)
        except BaseException:
            os.close(descriptor)
            raise
        if writable:
            self._descriptors[chunk] = descriptor
        else:
            os.close(descriptor)

    def close(self) -> None:
        """Give back memory and addresses; no tensor over them may be used any more."""
        if self._address == 0:
            return
        torch.cuda.synchronize(self.device)
        for chunk in list(self._chunks):
            self._unmap(chunk)
        self._call(self._driver.cuMemAddressFree, self._address, self.nbytes)
        self._address = 0

    def _create(self) -> Any:
        driver = self._driver
        code, handle = driver.cuMemCreate(self.chunk_bytes, self._properties, 0)
        if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            # PyTorch keeps memory that it freed; it may be enough.
            torch.cuda.empty_cache()
            code, handle = driver.cuMemCreate(self.chunk_bytes, self._properties, 0)
        if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = torch.cuda.mem_get_info(self.device)
            raise torch.OutOfMemoryError(
                f"{self.device} has no {self.chunk_bytes >> 20} MiB left for experts: "
                f"{free >> 20} of {total >> 20} MiB are free"
            )
        self._check(driver.cuMemCreate, code)
        return handle

    def _map(self, chunk: int, handle: Any, *, writable: bool = True) -> None:
        driver = self._driver
        try:
            address = self._address_of(chunk)
            self._call(driver.cuMemMap, address, self.chunk_bytes, 0, handle, 0)
        except BaseException:
            self._call(driver.cuMemRelease, handle)
            raise
        access = driver.CUmemAccessDesc()
        access.location = self._properties.location
        flags = driver.CUmemAccess_flags
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            if writable
            else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        try:
            self._call(driver.cuMemSetAccess, address, self.chunk_bytes, [access], 1)
        except CudaError:
            self._call(driver.cuMemUnmap, address, self.chunk_bytes)
            self._call(driver.cuMemRelease, handle)
            raise
        self._chunks[chunk] = handle

    def _unmap(self, chunk: int) -> None:
        driver = self._driver
        self._call(driver.cuMemUnmap, self._address_of(chunk), self.chunk_bytes)
        self._call(driver.cuMemRelease, self._chunks.pop(chunk))
        if chunk in self._descriptors:
            os.close(self._descriptors.pop(chunk))

    def _address_of(self, chunk: int) -> int:
        if not 0 <= chunk < self.nbytes // self.chunk_bytes:
            raise IndexError(f"chunk {chunk} is not within {self.nbytes} bytes")
        return self._address + chunk * self.chunk_bytes

    def _allocation_properties(self) -> Any:
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = self.device.index
        kinds = driver.CUmemAllocationHandleType
        properties.requestedHandleTypes = kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        return properties

    def _call(self, function: Any, *arguments: Any) -> Any:
        code, *results = function(*arguments)
        self._check(function, code)
        return results[0] if len(results) == 1 else None

    def _check(self, function: Any, code: Any) -> None:
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise CudaError(f"{function.__name__}: {code.name}")
