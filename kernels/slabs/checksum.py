"""The checksum of an expert as it lies in its slot: XXH3 over the bytes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


def checksum(tensors: Iterable[Tensor]) -> int:
    """Return the checksum of tensors, one after another; those on a device are copied from it."""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        flat = tensor.cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.intdigest()
