"""The weight files of a model folder: only safetensors, and only files in the folder itself."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...proto.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LONGEST_NAME = 200  # no file system has names of more than 255 bytes
_LFS = b"version https://git-lfs"
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# Safetensors' names of dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "C64": torch.complex64,
}


class Header(NamedTuple):
    """One tensor as a file's header describes it; a model may have 90,000, so a tuple."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The tensors of a folder, whose files are complete."""

    headers: dict[str, Header]
    # Names that only the index has, no file: (name -> file that the index names). They matter only
    # if the model needs them.
    lost: dict[str, str] = field(default_factory=dict)


def list_tensors(path: Path) -> Listing:
    """Read the safetensors headers in folder ``path``, each once, and no tensor.

    As in transformers, `model.safetensors` takes precedence over an index. Raises CheckpointError
    for a missing or malformed index, for file names that leave the folder, for damaged or truncated
    files, and for a missing numbered file if there is no index.
    """
    index = _read_index(path / INDEX_FILE) if is_whole(path / INDEX_FILE) else None
    if is_whole(path / SINGLE_FILE):
        return Listing(_headers(path / SINGLE_FILE))
    if index is not None:
        headers: dict[str, Header] = {}
        for file in sorted(set(index.values())):
            if is_whole(path / file):
                headers |= _headers(path / file)
        lost = {name: file for name, file in index.items() if name not in headers}
        return Listing(headers, lost)
    return _list_numbered(path)


def is_whole(file: Path) -> bool:
    """Return whether the file exists.

    Raises CheckpointError if its name is that of something else: a link whose target is gone, or a
    folder.
    """
    if file.is_file():
        return True
    if file.is_symlink():
        raise CheckpointError(
            f"{file}: a link to {file.readlink()}, which does not exist; download the file again"
        )
    if file.exists():
        raise CheckpointError(f"{file}: not a file, but a folder or a device; download it again")
    return False


def _list_numbered(path: Path) -> Listing:
    """List numbered files without an index, by their own headers."""
    found = {file.name: match for file in path.glob("*") if (match := _SHARD.fullmatch(file.name))}
    if not found:
        raise CheckpointError(f"{path}: {_what_else(path)}")
    parts = {int(match[1]) for match in found.values()}
    counts = {int(match[2]) for match in found.values()}
    # Only the first missing number is searched, because names may claim any number of parts.
    missing = next((n for n in range(1, max(counts) + 1) if n not in parts), None)
    if len(counts) > 1 or missing:
        wrong = f"part {missing} is missing" if missing else "some of them belong to another set"
        raise CheckpointError(
            f"{path}: no {INDEX_FILE}, and the numbered files are no complete set: {wrong}; found "
            + ", ".join(sorted(found)[:3])
        )
    headers: dict[str, Header] = {}
    for file in sorted(found):
        headers |= _headers(path / file)
    return Listing(headers)


def _what_else(path: Path) -> str:
    """Return why a folder has no weights, by what it holds instead."""
    neither = f"neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
    others = sorted(file.name for file in path.glob("*.safetensors"))
    pickles = sorted(
        file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind)
    )
    gguf = sorted(file.name for file in path.glob("*.gguf"))
    if "adapter_model.safetensors" in others:
        return (
            "holds an adapter (adapter_model.safetensors) instead of a model; merge it into its "
            "base model and save that"
        )
    if others:
        return f"{neither}, under these names; there is {', '.join(others[:3])}"
    if pickles:
        return (
            f"{neither}, and {pickles[0]} is pickled; load it with transformers and save it with "
            "save_pretrained, which writes safetensors"
        )
    if gguf:
        return f"{neither}; {gguf[0]} is a GGUF file, which only `moesaic upcycle` reads"
    return neither


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of safetensors files: {error!r}") from error
    for file in sorted(set(names.values())):
        plain = Path(file).name == file and file.isprintable() and len(file) <= _LONGEST_NAME
        if not plain or not file.endswith(".safetensors"):
            named = repr(file if len(file) <= _LONGEST_NAME else file[:40] + "...")
            raise CheckpointError(
                f"{index}: weight_map names {named}; only *.safetensors files in its folder "
                "are read"
            )
    return names


def _headers(file: Path) -> dict[str, Header]:
    with open_weights(file) as opened:
        found, keys = {}, opened.keys()
        for key in keys:
            part = opened.get_slice(key)
            kind = part.get_dtype()
            if kind not in DTYPES:
                raise CheckpointError(f"{file}: {key} is {kind}, an unknown dtype")
            found[key] = Header(file, key, DTYPES[kind], tuple(part.get_shape()))
        return found


def open_weights(file: Path) -> Any:
    """Open a safetensors file. Raises CheckpointError when it is damaged or truncated."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: {lfs_pointer(file) or f'damaged or truncated: {error}; download it again'}"
        ) from error


def lfs_pointer(file: Path) -> str:
    """Return what is wrong with a file that Git LFS has not fetched; empty for any other."""
    try:
        with file.open("rb") as opened:
            begin = opened.read(len(_LFS))
    except OSError:
        return ""  # whoever needs the file reports why it cannot be read
    if begin != _LFS:
        return ""
    return "only a pointer of Git LFS; `git lfs pull` in the folder fetches the file"


def read_tensor(file: Path, key: str, expert: int | None = None, rows: int = 1) -> Tensor:
    """Read a tensor of a safetensors file, or only the part of one expert.

    With ``expert`` the tensor holds ``rows`` rows for each expert, and only this expert's are read.
    Raises CheckpointError.
    """
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
