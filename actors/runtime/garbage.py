"""Python's garbage collector in processes whose start makes millions of objects that stay.

Looking through them all takes 0.3 s where torch and transformers are loaded (measured), during
which a process computes and answers nothing. Frozen objects are not looked at any more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
