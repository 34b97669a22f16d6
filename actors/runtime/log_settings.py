"""What the environment says about logs: `MOESAIC_LOG`, levels by room, and `MOESAIC_LOG_FORMAT`.

This needs neither Ray nor torch, so that the command line can read it before it loads anything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, cast, get_args

from ...proto.errors import SpecError

LOG, LOG_FORMAT = "MOESAIC_LOG", "MOESAIC_LOG_FORMAT"
PACKAGE = "moesaic"

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
# Folders in the package's own; only code in these, and the package's own modules, log anything.
_TOPS = ("proto", "kernels", "models", "cluster", "actors", "cli")
_EXAMPLE = f"write a level ({', '.join(LEVELS)}) or a list such as `info,router=debug,host=warning`"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How one process logs."""

    level: int | None = None  # of all rooms that `rooms` does not name; None: none was given
    rooms: Mapping[str, int] = field(default_factory=dict)  # level by dotted name of a room
    form: Format = "text"


def log_settings(environ: Mapping[str, str] | None = None) -> LogSettings:
    """Return what the environment asks for. Raises SpecError that names the variable."""
    environ = os.environ if environ is None else environ
    level, levels = _levels(environ.get(LOG, ""))
    form = environ.get(LOG_FORMAT, "").strip().lower() or "text"
    if form not in FORMATS:
        raise SpecError(f"{LOG_FORMAT}: {form!r} is unknown; write {' or '.join(FORMATS)}")
    return LogSettings(level=level, rooms=levels, form=cast(Format, form))


def log_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables about logs that are set, for processes that a joined Ray starts."""
    environ = os.environ if environ is None else environ
    return {name: environ[name] for name in (LOG, LOG_FORMAT) if environ.get(name)}


def log_runtime_env(
    variables: Mapping[str, str] | None = None,
) -> dict[str, dict[str, dict[str, str]]]:
    """Return Ray's option that carries these variables (None: this process's); empty for none.

    An actor without the option may use a worker process that Ray has started beforehand.
    """
    variables = log_environment() if variables is None else variables
    return {"runtime_env": {"env_vars": dict(variables)}} if variables else {}


def _levels(text: str) -> tuple[int | None, dict[str, int]]:
    level: int | None = None
    levels: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        room, equals, word = (piece.strip() for piece in part.rpartition("="))
        value = LEVELS.get(word.lower())
        if value is None:
            raise SpecError(f"{LOG}: {word!r} is not a level; {_EXAMPLE}")
        if not equals:
            if level is not None:
                raise SpecError(f"{LOG}: {text!r} names the level of all rooms twice; {_EXAMPLE}")
            level = value
            continue
        for name in _named(room):
            if name in levels:
                raise SpecError(f"{LOG}: {text!r} names the room {name} twice; {_EXAMPLE}")
            levels[name] = value
    return level, levels


def _named(room: str) -> list[str]:
    """Return the rooms of that name: one by its full name, or all whose last part it is."""
    found = [name for name in rooms() if room in (name, name.rpartition(".")[2])]
    if room in found:
        return [room]
    if not found:
        raise SpecError(
            f"{LOG}: {room!r} is not a room, which is a folder of Moesaic's source such as router, "
            f"host, actors.endpoint or cluster.routing; {_EXAMPLE}"
        )
    return found


@cache
def rooms() -> tuple[str, ...]:
    """Return the dotted names of all rooms, for example ``actors.router``."""
    package = Path(__file__).absolute().parents[2]
    if not (package / "cli").is_dir():
        # Imported by the folder that the package's link leads to.
        package = package / "src" / PACKAGE
    return tuple(sorted(name for top in _TOPS for name in _folders(package / top, top)))


def _folders(folder: Path, name: str) -> Iterator[str]:
    yield name
    for inside in folder.iterdir():
        if inside.is_dir() and inside.name.isidentifier() and not inside.name.startswith("__"):
            yield from _folders(inside, f"{name}.{inside.name}")
