"""Reading training checkpoints, and removing old ones.

Opening one compares the sizes of all files with the manifest. Whoever loads an expert reads only
its files, and its checksum says whether the tensors are those that were written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...proto.errors import CheckpointError, describe_error
from ..folder.expert_file import Place, read_expert
from ..folder.files import open_weights
from ..trunk.checkpoint import Checkpoint
from ..trunk.config import read_config, torch_dtype
from ..trunk.fitting import first_few
from .draft import remove_folder, tidy
from .manifest import (
    INSTEAD,
    MANIFEST_FILE,
    Manifest,
    StoredExpert,
    StoredPart,
    read_manifest,
    stored_file,
    sum_of_tensors,
)


def read_checkpoint(folder: Path) -> TrainingCheckpoint:
    """Open a training checkpoint.

    Raises CheckpointError if the manifest is damaged, an expert or a file is missing, or a file has
    another size. Files without tensors are compared byte by byte.
    """
    manifest = read_manifest(folder)
    found = TrainingCheckpoint(folder, manifest)
    for name in manifest.files:
        found._check_size(name)
        if not name.endswith(".safetensors"):
            found._check_bytes(name)
    return found


class TrainingCheckpoint:
    """A training checkpoint that was opened. Any thread may read."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def digest(self) -> str:
        """What tells checkpoints apart: all that is in them."""
        files = sorted((name, repr(one)) for name, one in self._manifest.files.items())
        return hashlib.sha256(repr((self.step, files)).encode()).hexdigest()

    @property
    def run(self) -> Mapping[str, Any]:
        """The run's own state, as it was given to `write_checkpoint`."""
        return self._manifest.run

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the experts' weights."""
        return torch_dtype(self._manifest.dtype)

    @property
    def experts(self) -> list[Place]:
        """All experts, as (layer, expert)."""
        return sorted(self._manifest.experts)

    def weights(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Return an expert's weights by their names in the pool.

        The first call builds the model on the meta device (`plan_export` says when that is safe).
        Raises CheckpointError.
        """
        which = f"weights of expert {expert} of layer {layer}"
        part = self._expert(layer, expert).weights
        return self._read(which, part, lambda: self._reader.read(layer, expert).tensors())

    def state(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Return {"NAME.KIND": tensor} of an expert, or nothing if it was saved without.

        Raises CheckpointError.
        """
        which = f"state of expert {expert} of layer {layer}"
        part = self._expert(layer, expert).state
        if part is None:
            return {}
        (file,) = part.files
        return self._read(which, part, lambda: read_expert(self.path / file, layer, expert))

    def trunk_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of ``trunk_state``, after comparing their files' bytes.

        The trunk's weights are the folder's own (`load_trunk`). Raises CheckpointError.
        """
        for name in self._manifest.trunk_state:
            self._check_bytes(name)
            with open_weights(self.path / name) as opened:
                for key in opened.keys():  # noqa: SIM118
                    yield key, opened.get_tensor(key)

    def check(self) -> None:
        """Read all files and compare their bytes. Raises CheckpointError."""
        for name in self._manifest.files:
            self._check_bytes(name)

    def _expert(self, layer: int, expert: int) -> StoredExpert:
        found = self._manifest.experts.get((layer, expert))
        if found is None:
            raise CheckpointError(f"{self.path}: the model has no expert {expert} of layer {layer}")
        return found

    @cached_property
    def _reader(self) -> Checkpoint:
        return Checkpoint(self.path, read_config(self.path), dtype=self.dtype)

    def _read(
        self, which: str, part: StoredPart, read: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        where = " and ".join(str(self.path / file) for file in part.files)
        try:
            tensors = read()
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"{where}: unreadable {which}: {describe_error(error)}; {INSTEAD}"
            ) from error
        if sum_of_tensors(tensors) != part.xxh3:
            raise CheckpointError(
                f"{where}: damaged {which}: the checksum is not that of what was written; {INSTEAD}"
            )
        return tensors

    def _check_size(self, name: str) -> None:
        file, wanted = self.path / name, self._manifest.files[name].size_bytes
        try:
            found = file.stat().st_size
        except OSError as error:
            raise self._damaged(name, f"missing ({describe_error(error)})") from error
        if found != wanted:
            raise self._damaged(name, f"has {found} bytes instead of {wanted}")

    def _check_bytes(self, name: str) -> None:
        try:
            found = stored_file(self.path / name)
        except OSError as error:
            raise self._damaged(name, f"cannot be read ({describe_error(error)})") from error
        if found != self._manifest.files[name]:
            raise self._damaged(name, "its bytes are not those that were written")

    def _damaged(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path / name}: {what}{self._in_file(name)}; {INSTEAD}")

    def _in_file(self, name: str) -> str:
        """Return which experts have tensors in a file."""
        inside = [
            f"expert {expert} of layer {layer}"
            for (layer, expert), one in sorted(self._manifest.experts.items())
            if name in one.weights.files or (one.state is not None and name in one.state.files)
        ]
        return f"; it has tensors of {first_few(inside, 3)}" if inside else ""


# ---- several of them ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointList:
    """The training checkpoints in a folder."""

    whole: list[TrainingCheckpoint]  # by step, the newest last
    damaged: dict[Path, CheckpointError]  # folders with a manifest that cannot be used, and why


def list_checkpoints(folder: Path) -> CheckpointList:
    """Return the checkpoints in ``folder``. Raises OSError if it cannot be read."""
    whole: list[TrainingCheckpoint] = []
    damaged: dict[Path, CheckpointError] = {}
    for path in sorted(folder.iterdir()):
        # What begins with a dot is being written or removed.
        if path.name.startswith(".") or not (path / MANIFEST_FILE).is_file():
            continue
        try:
            whole.append(read_checkpoint(path))
        except CheckpointError as error:
            damaged[path] = error
    return CheckpointList(sorted(whole, key=lambda one: one.step), damaged)


def keep_last(folder: Path, count: int) -> list[Path]:
    """Remove all whole checkpoints in ``folder`` but the newest ``count``; return those removed.

    Damaged ones do not count, and stay. What killed processes left is removed as well. Raises
    ValueError if ``count`` is not positive, and OSError.
    """
    if count < 1:
        raise ValueError(f"count: {count}; at least the newest checkpoint is kept")
    tidy(folder)
    removed = [one.path for one in list_checkpoints(folder).whole[:-count]]
    for path in removed:
        remove_folder(path)
    return removed
