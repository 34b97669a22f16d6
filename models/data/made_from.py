"""What a token file is made from, so that documents are packed again only when that changes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from ...proto.errors import BadInput
from ..folder.tokenizer import tokenizer_files
from .packing import Learn
from .sources import Source, listing


def made_from(source: Source, tokenizer: Path, learn: Learn) -> dict[str, Any]:
    """Return, as JSON, all that the tokens of ``source`` depend on.

    These are its files, by name, size and time of the last change, its format, ``learn``, and
    a digest of the files of the tokenizer in the folder ``tokenizer``. Names are relative, so
    folders can be moved. Raises BadInput if the source cannot be listed or the tokenizer cannot be
    read.
    """
    kind, files = listing(source)
    found: list[list[str | int]] = []
    for file in files:
        try:
            state = file.stat()
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error}") from error
        name = file.relative_to(source.path if source.path.is_dir() else source.path.parent)
        found.append([name.as_posix(), state.st_size, state.st_mtime_ns])
    return {
        "format": kind,
        "files": found,
        "learn": learn,
        "tokenizer": _tokenizer_digest(tokenizer),
    }


def _tokenizer_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in tokenizer_files(folder):
        try:
            octets = file.read_bytes()
        except OSError as error:
            raise BadInput(f"{file}: cannot be read: {error}") from error
        digest.update(f"{file.name} {len(octets)}\n".encode() + octets)
    return digest.hexdigest()
