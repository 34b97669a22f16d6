"""The one place that sets up logging in a process.

Only Moesaic's own processes do so: its actors and its command line. A program that imports
`moesaic` keeps its own logging, and ``logging.getLogger("moesaic")`` is that program's to set up.

One handler writes to stderr. Ray keeps that in a file for each process, which `moesaic logs` shows.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping

from ..tracing.log_ids import TraceIds
from .log_lines import formatter
from .log_settings import PACKAGE, LogSettings, log_settings
from .process_labels import ProcessKind, announce

log = logging.getLogger(__name__)

# The most lines that one place in the code writes in this time; the debug level has no limit.
MOST_LINES, WINDOW_S = 100, 10.0


class Seldom(logging.Filter):
    """Limits how often a line that repeats for ever is written.

    The last line that passes says so, and the next one after the pause has the number of lines that
    were left out. Lines at the debug level all pass: they are asked for.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        # By place in the code: when its window began, its lines, and how many were left out.
        self._windows: dict[tuple[str, int], tuple[float, int, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        place = record.pathname, record.lineno
        now = self._now()
        began, lines, left_out = self._windows.get(place, (now, 0, 0))
        if now - began >= WINDOW_S:
            if left_out:
                record.left_out = left_out
            began, lines, left_out = now, 0, 0
        passes = lines < MOST_LINES
        if passes and lines + 1 == MOST_LINES:
            record.then_silent_s = WINDOW_S
        self._windows[place] = began, lines + 1, left_out + (not passes)
        return passes


class _Stderr(logging.Handler):
    """Writes to what is stderr at that moment, as a progress bar may replace it."""

    def __init__(self, levels: Mapping[str, int]) -> None:
        """Set the loggers' levels; `end_logging` takes them back."""
        super().__init__()
        self.levels = levels
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            # As Python's own handlers do: whoever logs must not fail because of it.
            self.handleError(record)


def set_up_logging(
    process: str, *, default: int = logging.INFO, settings: LogSettings | None = None
) -> None:
    """Write this process's log to stderr, in the name of ``process``.

    ``default`` is Moesaic's level where `MOESAIC_LOG` names none; libraries log warnings. Raises
    SpecError for a value of the environment that means nothing.
    """
    settings = settings or log_settings()
    end_logging()
    rooms = {f"{PACKAGE}.{room}": level for room, level in settings.rooms.items()}
    every = default if settings.level is None else settings.level
    handler = _Stderr({PACKAGE: every} | rooms)
    handler.setFormatter(formatter(settings.form, process))
    handler.addFilter(Seldom())
    handler.addFilter(TraceIds())
    logging.getLogger().addHandler(handler)


def rename_log(process: str, *, default: int) -> None:
    """Call `set_up_logging` again, if this process's logging is Moesaic's to set up."""
    if _own_handlers():
        set_up_logging(process, default=default)


def _own_handlers() -> list[_Stderr]:
    return [one for one in logging.getLogger().handlers if isinstance(one, _Stderr)]


def end_logging() -> None:
    """Undo `set_up_logging`, if this process called it."""
    for handler in _own_handlers():
        logging.getLogger().removeHandler(handler)
        for name in handler.levels:
            logging.getLogger(name).setLevel(logging.NOTSET)


def begin_process(kind: ProcessKind, name: str, cluster: str, process: str | None = None) -> None:
    """Label this process of a cluster, set up its logging, and log that it has started.

    ``process`` is its name in the log (None: ``name``). Raises SpecError.
    """
    announce(kind, name, cluster)
    set_up_logging(process or name)
    log.info(
        "%s of cluster %s has started",
        process or name,
        cluster,
        extra={"version": _version(), "cluster": cluster},
    )


def _version() -> str:
    # Here, since the command line need not load it.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"  # it runs from a folder that was not installed
