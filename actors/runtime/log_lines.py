"""The form of a line in a log: text for people, JSON for machines, and which ids it has.

Whatever a client or a file has chosen is escaped, so that no line can look like another one.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .log_settings import LEVELS, PACKAGE, Format

# Keys of every line, which no id may replace.
BASE = ("ts", "level", "logger", "process", "pid", "message", "exception")
_WORDS = {value: word for word, value in LEVELS.items()}
# What Python itself gives a record; everything else came with `extra`.
_PYTHONS = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "exc_text", "taskName"}
)
_OURS = re.compile(
    r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:debug|info|warning|error|critical) |\{"ts": "'
)
_PLAIN = re.compile(r"[^\s\"=]+")


def is_log_line(text: str) -> bool:
    """Return whether a line of a process's output is one of these, which names its process."""
    return _OURS.match(text) is not None


def escaped(text: str) -> str:
    """Return ``text`` with everything escaped that is not printable, line breaks included."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escape(one) for one in text)


def _escape(one: str) -> str:
    return one.encode("unicode_escape").decode()


def formatter(form: Format, process: str) -> logging.Formatter:
    """Return the formatter of a process, which calls itself ``process``."""
    return JsonLines(process) if form == "json" else TextLines(process)


class _Lines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process
        self._pid = os.getpid()

    def _time(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z"

    def _level(self, record: logging.LogRecord) -> str:
        return _WORDS.get(record.levelno) or record.levelname.lower()

    def _exception(self, record: logging.LogRecord) -> str:
        if record.exc_info and record.exc_info[0] is not None:
            return self.formatException(record.exc_info)
        return ""


class TextLines(_Lines):
    """One line each; a traceback follows in lines that are indented."""

    def format(self, record: logging.LogRecord) -> str:
        ids = "".join(f" {name}={_shown(value)}" for name, value in ids_of(record).items())
        line = (
            f"{self._time(record)} {self._level(record)} {escaped(self._process)}[{self._pid}] "
            f"{logger_name(record.name)}: {escaped(record.getMessage())}{ids}"
        )
        trace = self._exception(record)
        return line + "".join(f"\n    {escaped(one)}" for one in trace.splitlines())


class JsonLines(_Lines):
    """One JSON object each, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "ts": self._time(record),
            "level": self._level(record),
            "logger": logger_name(record.name),
            "process": self._process,
            "pid": self._pid,
            "message": record.getMessage(),
            **ids_of(record),
        }
        if trace := self._exception(record):
            values["exception"] = trace
        return json.dumps(values, default=str).replace("\x7f", "\\u007f")


def logger_name(name: str) -> str:
    """Return a logger's name as `MOESAIC_LOG` names rooms; other libraries keep theirs."""
    return name.removeprefix(f"{PACKAGE}.")


def ids_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """Return the ids of one of Moesaic's own lines: what it has besides its message."""
    if not record.name.startswith(f"{PACKAGE}."):
        return {}
    return {
        name: value
        for name, value in vars(record).items()
        # Ray adds attributes of its own to every record; they begin with "_".
        if name not in _PYTHONS and name not in BASE and name[0] != "_" and value is not None
    }


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) and text.isprintable() else escaped(json.dumps(text))
