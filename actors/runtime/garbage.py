"""What processes no longer need: Python's garbage collector, and the heap's free memory.

The start of some processes makes millions of objects that stay. Looking through them all takes
0.3 s where torch and transformers are loaded (measured), during which a process computes and
answers nothing. Frozen objects are not looked at any more.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@contextmanager
def starting_without_collections(*, makes_garbage: bool = True) -> Iterator[None]:
    """Collect no garbage while the block runs, and never look at what it has made afterwards.

    If it ``makes_garbage``, that is collected at its end.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
        if makes_garbage:
            gc.collect()
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def return_freed_memory() -> None:
    """Return the heap's free memory to the system, if the C library can do so (glibc).

    This covers released weights, the copies made while loading, which take half their size, and
    what a training run has left.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory(keeps: bool) -> None:
    """Let the heap keep what is freed for its next use, or return it to the system again (glibc).

    A training step frees as much as the next one takes, and memory from the system costs a page
    fault for every 4 KiB, which is more than what is written there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # The largest threshold that glibc takes for memory of its own mappings.
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1 if keeps else 64 << 20)
