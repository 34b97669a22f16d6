"""What a model's folder holds, compared with what its configuration needs: from headers alone.

No tensor is read, so that a model of any size takes seconds: `moesaic spec check`, `inspect` and
`up` ask before anything starts, and hosts and trunk ask the same when they load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .describe import Described, describe
from .trunk import read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A folder whose tensors make its model."""

    path: Path
    described: Described  # what `describe` says of the folder
    tensors: int  # in the files
    stored_bytes: int  # of the files
    surplus: tuple[str, ...]  # names on disk of tensors that the model has no use for
    warnings: tuple[str, ...]  # sentences for people: what is odd, and harmless


def check_folder(path: Path, *, dtype: torch.dtype) -> Inventory:
    """Compare the safetensors headers of ``path`` with what its config.json needs in ``dtype``.

    Raises CheckpointError for tensors that are missing, have another shape or dtype, or are codes
    and scales that nothing uses, with the names of as many as fit a line; UnsupportedModel for
    architectures and quantisations that are not served.
    """
    checkpoint = Checkpoint(path, read_config(path), dtype=dtype)
    files = {stored.file for stored in checkpoint._tensors.values()}
    return Inventory(
        path=path,
        described=describe(path, dtype),
        tensors=len(checkpoint._tensors),
        stored_bytes=sum(file.stat().st_size for file in files),
        surplus=(),
        warnings=(),
    )
