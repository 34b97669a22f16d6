"""A slab of another process, mapped so that it can only be read."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any

import numpy as np

from .layout import SlabLayout
from .slab import SlabReader


def borrow(descriptor: int) -> SlabReader:
    """Map the slab that a descriptor from `Slab.lend` names, and close the descriptor.

    The mapping ends with the last tensor over it. Raises ValueError for what is no slab, or one
    that could shrink: whoever touched its end then would be killed.
    """
    try:
        try:
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"the descriptor's memory cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    if not sealed & fcntl.F_SEAL_SHRINK:
        raise ValueError("the memory is not sealed against shrinking")
    return SlabReader(SlabLayout.read(memoryview(memory)), readable(memory))


def readable(memory: mmap.mmap) -> Any:
    """Return a buffer over the mapping that PyTorch takes: it warns of any that is read-only."""
    buffer: Any = (ctypes.c_char * len(memory)).from_address(
        np.frombuffer(memory, np.uint8).ctypes.data
    )
    buffer._mapping = memory  # kept with the buffer, which every tensor over it keeps
    return buffer
