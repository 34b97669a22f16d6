"""The weight files of a model folder: safetensors only, and only what lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..proto.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def weight_files(path: Path) -> dict[str, str]:
    """{tensor name: file name} of a model folder, whose files are whole.

    Raises CheckpointError for a missing or malformed index, for file names that leave the folder,
    and for files that are damaged, truncated or lack what the index says of them.
    """
    if (path / INDEX_FILE).is_file():
        names = _read_index(path / INDEX_FILE)
        for file in sorted(set(names.values())):
            if not (path / file).is_file():
                raise CheckpointError(f"{path / file}: missing, though {INDEX_FILE} names it")
            with open_weights(path / file) as opened:
                held = set(opened.keys())
            lacking = sorted(t for t, f in names.items() if f == file and t not in held)
            if lacking:
                raise CheckpointError(
                    f"{path / file}: has no {lacking[0]}, though {INDEX_FILE} says so"
                )
        return names
    if not (path / SINGLE_FILE).is_file():
        raise CheckpointError(
            f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
        )
    with open_weights(path / SINGLE_FILE) as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error!r}") from error
    for file in sorted(set(names.values())):
        if Path(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map names {file!r}; only *.safetensors files beside the index "
                "are read"
            )
    return names


def open_weights(file: Path) -> Any:
    """An open safetensors file. Raises CheckpointError when it is damaged or truncated."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or truncated: {error}") from error


def read_tensor(file: Path, key: str, expert: int | None = None, rows: int = 1) -> Tensor:
    """A tensor of a safetensors file; of one that holds ``rows`` for each expert those of
    ``expert``, and no more is read. Raises CheckpointError."""
    with open_weights(file) as opened:
        try:
            if expert is None:
                return opened.get_tensor(key)
            tensor = opened.get_slice(key)[expert * rows : (expert + 1) * rows]
        except (SafetensorError, OSError, IndexError) as error:
            raise CheckpointError(f"{file}: {key}: {error}") from error
    if not tensor.shape[0]:
        raise CheckpointError(f"{file}: {key} has no expert {expert}")
    return tensor
