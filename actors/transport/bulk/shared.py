"""Memory of a client that it shares with a host: a memfd, mapped by both."""

from __future__ import annotations

import mmap
import os

import numpy as np

from ....kernels.slabs import memfd
from ....proto.errors import CallError, ClusterError, HostLost
from ....proto.limits import MAX_BULK_BYTES

_ROUND_BYTES = 1 << 20


class SharedMemory:
    """A mapping, as ``octets`` (uint8)."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._map = mapping
        # numpy arrays keep the mapping from being closed while they exist, and so do the tensors
        # that are made of them.
        self.octets = np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        self.octets = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:
            # A tensor is still in use; the mapping ends with the last one.
            return


def make_memory(nbytes: int) -> tuple[int, SharedMemory]:
    """Make memory with room for ``nbytes``; return its descriptor, which the caller closes, too.

    Raises CallError if no transfer may have so many, and ClusterError if the system lacks them.
    """
    if nbytes > MAX_BULK_BYTES:
        raise CallError(
            f"total_bytes: {nbytes} bytes are more than the {MAX_BULK_BYTES} of one transfer"
        )
    size = max(1, -(-nbytes // _ROUND_BYTES)) * _ROUND_BYTES
    try:
        descriptor, mapping = memfd.create("bulk", size, b"")
    except OSError as error:
        raise _lacking(size, error) from error
    try:
        # Now, as an error: later the system would kill the process that first writes to a page.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        mapping.close()
        raise _lacking(size, error) from error
    return descriptor, SharedMemory(mapping)


def _lacking(size: int, error: OSError) -> ClusterError:
    return ClusterError(f"there is no shared memory of {size} bytes for a transfer: {error}")


def map_memory(descriptor: int) -> SharedMemory:
    """Map the memory of a client; the caller closes the descriptor. Raises HostLost."""
    size = os.fstat(descriptor).st_size
    if not 0 < size <= MAX_BULK_BYTES:
        raise HostLost(f"the client's memory has {size} bytes, and not 1 to {MAX_BULK_BYTES}")
    try:
        return SharedMemory(memfd.adopt(descriptor))
    except ValueError as error:
        raise HostLost(f"the client's memory: {error}") from error
