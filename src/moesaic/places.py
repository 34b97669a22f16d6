"""Where Moesaic leaves what is not part of a cluster's own files. Standard library alone: clients
without the rest look there, too."""

from __future__ import annotations

import os
from pathlib import Path


def session_dir() -> Path:
    """The folder of the session files of this user's clusters on this machine."""
    base = os.environ.get("MOESAIC_CACHE") or os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return (root if os.environ.get("MOESAIC_CACHE") else root / "moesaic") / "run"
