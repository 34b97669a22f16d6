"""A file of tokens, packed once and read at any place.

It is one safetensors file with the tensors ``tokens`` (int32, (N,)) and ``learned`` (uint8, (N,): 1
where the loss of predicting the token counts). Its metadata have the version of this format, the
number of documents and tokens, and a digest of what the tokens were made from.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...proto.errors import BadInput, CheckpointError
from .packing import Packed

# Raised when the file, or what packing makes of the same documents, changes.
VERSION = 1
_VERSION, _MADE_FROM = "moesaic_token_file", "made_from"
# The header is written last, into room that is left for it.
_HEADER_BYTES = 1024
_AGAIN = "remove it, and the tokens are packed again"


def write_token_file(path: Path, packed: Iterable[Packed], *, about: Mapping[str, Any]) -> None:
    """Write all of ``packed`` into a file, which appears whole or not at all.

    ``about`` is what the tokens are made from, as JSON (`made_from`). A file at ``path`` is
    replaced. One document at a time is in memory. Raises OSError, and BadInput if there are no
    tokens.
    """
    documents = tokens = 0
    with _draft(path) as draft, tempfile.TemporaryFile(dir=path.parent) as flags:
        draft.seek(8 + _HEADER_BYTES)
        for document in packed:
            draft.write(document.tokens.astype("<i4", copy=False).tobytes())
            flags.write(document.learned.astype("u1", copy=False).tobytes())
            documents, tokens = documents + 1, tokens + len(document.tokens)
        if not tokens:
            raise BadInput(f"{path}: there are no tokens to write; the documents are empty")
        flags.seek(0)
        shutil.copyfileobj(flags, draft, 2**20)
        draft.seek(0)
        draft.write(_header(documents, tokens, about))


def is_current(path: Path, about: Mapping[str, Any]) -> bool:
    """Return whether ``path`` is a token file of this version that was made from the same.

    Raises CheckpointError if the file is damaged, and BadInput if it is none of tokens, because
    whoever packs again would overwrite it.
    """
    if not path.exists():
        return False
    metadata = _metadata(_open(path), path)
    return metadata[_VERSION] == str(VERSION) and metadata.get(_MADE_FROM) == _digest(about)


class TokenFile:
    """An open token file of ``len`` tokens, which is mapped, so that reading costs little memory.

    ``documents``: how many there are. Raises CheckpointError if the file is damaged or truncated,
    and BadInput if it does not exist, is no token file, or has another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise BadInput(f"{path}: does not exist; pack documents into it first")
        opened = _open(path)
        metadata = _metadata(opened, path)
        if metadata[_VERSION] != str(VERSION):
            raise BadInput(
                f"{path}: a token file of version {metadata[_VERSION]}, and this Moesaic reads "
                f"version {VERSION}; {_AGAIN}"
            )
        try:
            self._tokens: Any = opened.get_slice("tokens")
            self._learned: Any = opened.get_slice("learned")
            self.documents, self._length = int(metadata["documents"]), int(metadata["tokens"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged: {error}; {_AGAIN}") from error
        kinds = [(part.get_dtype(), part.get_shape()) for part in (self._tokens, self._learned)]
        if kinds != [("I32", [self._length]), ("U8", [self._length])]:
            raise CheckpointError(
                f"{path}: damaged: its tensors are {kinds}, and it should have {self._length} "
                f"tokens of int32 and as many flags of uint8; {_AGAIN}"
            )

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return ``count`` tokens from number ``start`` on, and which of them are learned.

        They are int64 (count,) and bool (count,). Raises BadInput if the file has fewer.
        """
        if start < 0 or count < 0 or start + count > self._length:
            raise BadInput(
                f"{self.path}: has {self._length} tokens, and {count} from {start} on are not "
                "among them"
            )
        part = slice(start, start + count)
        return self._tokens[part].to(torch.int64), self._learned[part].to(torch.bool)

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        # Safetensors unmaps a file when nothing refers to it.
        self._tokens = self._learned = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated, or no token file: {error}; if it is one, {_AGAIN}"
        ) from error


def _metadata(opened: Any, path: Path) -> dict[str, str]:
    """Return the metadata of a token file of any version."""
    metadata = opened.metadata() or {}
    if _VERSION not in metadata:
        raise BadInput(
            f"{path}: a safetensors file, but none of tokens; give another path to the token file"
        )
    return metadata


def _header(documents: int, tokens: int, about: Mapping[str, Any]) -> bytes:
    header = {
        "__metadata__": {
            _VERSION: str(VERSION),
            _MADE_FROM: _digest(about),
            "documents": str(documents),
            "tokens": str(tokens),
        },
        "tokens": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, 4 * tokens]},
        "learned": {"dtype": "U8", "shape": [tokens], "data_offsets": [4 * tokens, 5 * tokens]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    return _HEADER_BYTES.to_bytes(8, "little") + text.ljust(_HEADER_BYTES)


def _digest(about: Mapping[str, Any]) -> str:
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _draft(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file beside ``path``, which becomes ``path`` and is on the disk at the end.

    Its process holds a lock on it. A draft without a lock is what a process left that was killed.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
        with left.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its process is writing it
            left.unlink(missing_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.draft")
    with draft.open("xb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX)
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
