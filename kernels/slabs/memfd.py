"""Memory without a name that processes hand to each other by its descriptor: Linux's memfd.

It is sealed against growing and shrinking: whoever maps it never runs into its end. It is not
sealed against writing, because its owner goes on writing. Nothing of it is left when the last
process that has it ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Any

import numpy as np

# Of Linux's fallocate; Python has no name for them.
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def create(name: str, nbytes: int, header: bytes) -> tuple[int, mmap.mmap]:
    """Make memory that begins with ``header``; return its descriptor, and a mapping of it."""
    descriptor = os.memfd_create(f"moesaic:{name}"[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        memory = mmap.mmap(descriptor, nbytes)
        memory[: len(header)] = header
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, memory


def adopt(descriptor: int) -> mmap.mmap:
    """Map the memory of a process that has ended, to be written. Raises ValueError."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    except (OSError, ValueError) as error:
        raise ValueError(f"the descriptor's memory cannot be mapped: {error}") from error
    if seals & _SEALS != _SEALS:
        raise ValueError("the memory is not sealed against growing and shrinking")
    return memory


def reopen(descriptor: int) -> int:
    """Return a new descriptor that only reads; the caller closes it.

    It is the memory opened again. A seal against writing would bind its owner, too.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def borrow(descriptor: int) -> mmap.mmap:
    """Map the memory of another process to be read, and close the descriptor.

    Raises ValueError for memory that could shrink: whoever touched its end then would be killed.
    """
    try:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise ValueError(f"the descriptor's memory cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError("the memory is not sealed against shrinking")
    return memory


def readable(memory: mmap.mmap) -> Any:
    """Return a buffer over the mapping that PyTorch takes: it warns of any that is read-only."""
    buffer: Any = (ctypes.c_char * len(memory)).from_address(
        np.frombuffer(memory, np.uint8).ctypes.data
    )
    buffer._mapping = memory  # kept with the buffer, which every tensor over it keeps
    return buffer


def punch_hole(descriptor: int, start: int, size: int) -> None:
    """Give a range of pages back to the system; it reads as zeros from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate(
        ctypes.c_int(descriptor),
        ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE),
        ctypes.c_long(start),
        ctypes.c_long(size),
    )
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}")
