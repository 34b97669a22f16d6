"""The manifest of a training checkpoint: what its folder has, and the checksums.

``manifest.json`` is written last. It has the format's version, and everything else with a checksum
of its own, so a manifest that was truncated or changed is not believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import xxhash
from torch import Tensor

from ...proto.errors import CheckpointError, describe_error
from ..folder.expert_file import Place

MANIFEST_FILE = "manifest.json"
FORMAT = 1
INSTEAD = "copy the folder again, or resume from an older checkpoint"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFile:
    size_bytes: int
    xxh3: str  # of its bytes


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Tensors in a few files, with a checksum of the tensors as they were in memory."""

    files: tuple[str, ...]
    xxh3: str


@dataclass(frozen=True, slots=True)
class StoredExpert:
    weights: StoredPart
    state: StoredPart | None  # None if the expert has none, or no expert has


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a training checkpoint. Names of files are relative to its folder."""

    step: int
    run: Mapping[str, Any]  # the run's own state, as JSON
    dtype: str  # of the experts' weights
    files: Mapping[str, StoredFile]
    layers: Mapping[int, int]  # layer -> its number of experts
    experts: Mapping[Place, StoredExpert]
    trunk_state: tuple[str, ...]  # files

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``. Raises OSError."""
        content = {
            "step": self.step,
            "run": self.run,
            "dtype": self.dtype,
            "files": {name: asdict(file) for name, file in self.files.items()},
            "layers": {str(layer): count for layer, count in self.layers.items()},
            "experts": {f"{la}.{e}": asdict(one) for (la, e), one in self.experts.items()},
            "trunk_state": self.trunk_state,
        }
        value = {"format": FORMAT, "xxh3": _sum_of(content), "checkpoint": content}
        (folder / MANIFEST_FILE).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder. Raises CheckpointError if it is missing or damaged."""
    file = folder / MANIFEST_FILE
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        version, content = value["format"], value["checkpoint"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: missing, so {folder} is no training checkpoint, or not a whole one; {INSTEAD}"
        ) from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{file}: truncated or damaged: {describe_error(error)}; {INSTEAD}"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: format: {version!r}, and this version of Moesaic reads format {FORMAT}; use "
            "the version that wrote it"
        )
    if value.get("xxh3") != _sum_of(content):
        raise CheckpointError(
            f"{file}: was changed after it had been written: its checksum does not match; {INSTEAD}"
        )
    try:
        manifest = _parsed(content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a manifest: {describe_error(error)}; {INSTEAD}"
        ) from error
    for layer, count in manifest.layers.items():
        for expert in range(count):
            if (layer, expert) not in manifest.experts:
                raise CheckpointError(
                    f"{file}: expert {expert} of layer {layer} is missing; {INSTEAD}"
                )
    return manifest


def _parsed(content: Mapping[str, Any]) -> Manifest:
    def part(value: Mapping[str, Any]) -> StoredPart:
        return StoredPart(tuple(map(str, value["files"])), str(value["xxh3"]))

    experts: dict[Place, StoredExpert] = {}
    for key, value in content["experts"].items():
        layer, expert = map(int, key.split("."))
        state = value["state"]
        experts[layer, expert] = StoredExpert(
            part(value["weights"]), None if state is None else part(state)
        )
    files = {
        name: StoredFile(int(value["size_bytes"]), str(value["xxh3"]))
        for name, value in content["files"].items()
    }
    trunk_state = tuple(map(str, content["trunk_state"]))
    named = {*trunk_state}
    for one in experts.values():
        named |= {*one.weights.files, *(one.state.files if one.state else ())}
    if unknown := sorted(named - files.keys()):
        raise ValueError(f"{unknown[0]} is not among the files")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{name!r} is not in the folder")
    return Manifest(
        step=int(content["step"]),
        run=dict(content["run"]),
        dtype=str(content["dtype"]),
        files=files,
        layers={int(layer): int(count) for layer, count in content["layers"].items()},
        experts=experts,
        trunk_state=trunk_state,
    )


def _sum_of(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode())


def sum_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of tensors, with their names, dtypes and shapes."""
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_file(file: Path) -> StoredFile:
    """Return the size and checksum of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_64()
    size_bytes = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return StoredFile(size_bytes, digest.hexdigest())
