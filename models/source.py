"""Where a model comes from: a folder, the demo model, or a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..proto.errors import CheckpointError, describe_error
from .folder.files import INDEX_FILE, SINGLE_FILE

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FETCH = "`moesaic inspect {path}` downloads and checks it, `moesaic up` does so when it starts"
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
# Subfolders hold the same weights in other forms, like gpt-oss's `original`.
_IGNORED = ["*/*"]


@dataclass(frozen=True, slots=True)
class NotDownloaded:
    """Why an available model is not in a folder of this machine yet."""

    why: str


def local_model(path: str) -> Path | NotDownloaded:
    """Return the folder of ``path`` if it is here already; make and download nothing.

    Raises CheckpointError if `resolve_model` certainly would.
    """
    if path == "demo":
        from .upcycling.demo import made_demo

        return made_demo() or NotDownloaded(
            "the demo model is made at the first start, in a minute"
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    _check_hub_id(path, folder)
    cached = _cached(path)
    if cached is None:
        return NotDownloaded(
            f"{path!r} is not in the hub's cache on this machine; {_FETCH.format(path=path)}"
        )
    if not _complete(cached):
        return NotDownloaded(
            f"{path!r} is only partly in the hub's cache on this machine; "
            f"{_FETCH.format(path=path)}"
        )
    return cached


def resolve_model(path: str, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Return the local folder of ``path``, after making ``demo`` or downloading a hub id.

    Raises CheckpointError that says what was tried.
    """
    if path == "demo":
        from .upcycling.demo import demo_model

        return demo_model(progress=progress)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    _check_hub_id(path, folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=_WANTED, ignore_patterns=_IGNORED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"path: {path!r} is not a folder on this machine, and cannot be downloaded from the "
            f"hub: {describe_error(error).splitlines()[0]}"
        ) from error


def _check_hub_id(path: str, folder: Path) -> None:
    if folder.is_file():
        raise CheckpointError(
            f"path: {path!r} is a file; give the folder that holds the model's files"
        )
    if folder.exists() or not _HUB_ID.match(path) or path.startswith("."):
        seen_from = "" if folder.is_absolute() else f" (looked for in {Path.cwd()})"
        raise CheckpointError(
            f"path: {path!r} is neither a folder, a hub id (owner/name) nor demo{seen_from}"
        )


def _cached(hub_id: str) -> Path | None:
    """Return the folder of the newest snapshot that was downloaded here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=_WANTED, ignore_patterns=_IGNORED, local_files_only=True
            )
        )
    except LocalEntryNotFoundError:
        return None


def _complete(folder: Path) -> bool:
    """Return whether a download has all weight files; their contents are not checked."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / INDEX_FILE
    if not index.is_file():
        return (folder / SINGLE_FILE).is_file()
    try:
        named = json.loads(index.read_text())["weight_map"].values()
        return all((folder / str(name)).is_file() for name in set(named))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return True  # reading the index will report that it is broken
