"""A model folder's tensors compared with what its configuration needs, by their headers.

No tensor is read, so a model of any size takes seconds. `moesaic spec check`, `inspect` and `up`
check it before anything starts; hosts and trunk check the same when they load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...proto.errors import CheckpointError
from .config import read_config
from .describe import ModelDescription, describe_model
from .fitting import first_few, fit
from .trunk import meta_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A folder whose tensors make its model."""

    path: Path
    described: ModelDescription  # the result of `describe` for the folder
    tensors: int  # in the files
    stored_bytes: int  # of the files
    surplus: tuple[str, ...]  # names on disk of tensors that the model does not use
    warnings: tuple[str, ...]  # sentences about what is unusual and harmless


def _check_top_k(path: Path, described: ModelDescription) -> None:
    """Check that a gate chooses at least one expert, and no more than its layer has."""
    experts = min(described.layers.values())
    if described.top_k is not None and not 1 <= described.top_k <= experts:
        raise CheckpointError(
            f"{path}/config.json: {described.top_k} experts per token, but layers have "
            f"{experts}; give a number from 1 to {experts}"
        )


def check_folder(path: Path, *, dtype: torch.dtype) -> Inventory:
    """Compare the safetensors headers of ``path`` with what its config.json needs in ``dtype``.

    Raises CheckpointError for tensors that are missing, have another shape or dtype, or are unused
    codes and scales, with the names of as many as fit a line; and UnsupportedModel for
    architectures and quantisations that are not served.
    """
    config = read_config(path)
    model = meta_model(config)
    described = describe_model(path, config, model, dtype)  # raises if there are no experts
    _check_top_k(path, described)
    fitting = fit(path, config, model)
    fitting.check()
    warnings = []
    if fitting.surplus:
        count = len(fitting.surplus)
        are = "tensor of the checkpoint is" if count == 1 else "tensors of the checkpoint are"
        named = first_few(fitting.surplus)
        warnings.append(f"{count} {are} not read, because the model does not use them: {named}")
    return Inventory(
        path=path,
        described=described,
        tensors=sum(fitting.files.values()),
        stored_bytes=sum(file.stat().st_size for file in fitting.files),
        surplus=tuple(fitting.surplus),
        warnings=tuple(warnings),
    )
