"""Where a model comes from: a folder, the demo model, or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..proto.errors import CheckpointError

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]


def resolve_model(path: str, *, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """The local folder of ``path``: a folder as it is, ``demo`` made once, a hub id downloaded.

    Raises CheckpointError that says what was tried.
    """
    if path == "demo":
        from .demo import demo_model

        return demo_model(progress=progress)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or not _HUB_ID.match(path) or path.startswith("."):
        raise CheckpointError(
            f"path: {path!r} is not a folder, not a hub id (owner/name), not demo"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Folders hold the same weights in other forms, as gpt-oss's `original`.
        return Path(snapshot_download(path, allow_patterns=_WANTED, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"path: {path!r} is no folder here, and the hub does not give it: "
            f"{str(error).splitlines()[0]}"
        ) from error
