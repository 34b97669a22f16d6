"""The tokenizer of a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...proto.errors import CheckpointError
from .files import is_whole, lfs_pointer

# Files that hold a vocabulary, besides those that a tokenizer's own class names.
_VOCABULARIES = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.*")
# All that a tokenizer may be read from.
_FILES = (
    *_VOCABULARIES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("merges.txt", "*.jinja"),
)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files in ``folder`` that a tokenizer may be read from. Raises CheckpointError."""
    # iterdir, because glob does not list links whose target is gone.
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if any(map(path.match, _FILES)) and is_whole(path)]


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer in ``folder``, without running code from there.

    Raises CheckpointError if it is missing or damaged. transformers makes some tokenizers without
    any file; such a one has no vocabulary, and every prompt would be empty.
    """
    folder = Path(folder)
    files = tokenizer_files(folder)
    there = any(path.match(pattern) for pattern in _VOCABULARIES for path in files)
    try:
        found: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:
        # The parsers below may raise anything, and a panic of Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if not there:
            raise CheckpointError(_missing(folder)) from error
        for file in files:
            if pointer := lfs_pointer(file):
                raise CheckpointError(f"{file}: {pointer}") from error
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: {type(error).__name__}: {_short(error)}; "
            "copy the files tokenizer* of the model's publisher into the folder again"
        ) from error
    named = set(getattr(type(found), "vocab_files_names", {}).values())
    if named and not there and not any((folder / name).is_file() for name in named):
        raise CheckpointError(_missing(folder))
    return found


def _missing(folder: Path) -> str:
    return (
        f"{folder}: no tokenizer: there is no tokenizer.json, nor any other file of a vocabulary; "
        "copy the files tokenizer* of the model's publisher into the folder"
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no further message"
