"""The checksum of an expert as it lies in its slot: XXH3 over the bytes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import xxhash
from torch import Tensor

# Few enough to be in a core's cache for the second look at them. Between two steps another thread
# of this process can run Python.
_STEP_BYTES = 512 << 10


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the checksum of tensors, one after another; those on a device are copied from it."""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        digest.update(octets_of(tensor).data)
    return digest.intdigest()


def octets_of(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes; those of one on a device, or not contiguous, are copied."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def copy_and_digest(source: np.ndarray, target: np.ndarray, digest: xxhash.xxh3_64) -> None:
    """Copy bytes, and digest the copy while it is still in a core's cache."""
    for start in range(0, len(source), _STEP_BYTES):
        step = slice(start, start + _STEP_BYTES)
        target[step] = source[step]
        digest.update(target[step].data)
