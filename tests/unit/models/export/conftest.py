"""A disk that refuses changes from the n-th on: once, or for good, as for a killed process."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import moesaic.models.export.write_checkpoint as write_checkpoint
import moesaic.models.folder.expert_file as expert_file

_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")


class Disk:
    """Counts what changes the file system, and refuses some of it."""

    def __init__(self) -> None:
        self.changes = 0
        self.refused = 0
        self._first: int | None = None
        self._for_good = False
        self._watching = False

    @contextmanager
    def refusing(self, first: int | None, *, for_good: bool) -> Iterator[None]:
        self.changes = self.refused = 0
        self._first, self._for_good, self._watching = first, for_good, True
        try:
            yield
        finally:
            self._watching = False

    def change(self) -> None:
        if not self._watching:
            return
        self.changes += 1
        late = self._first is not None and self.changes >= self._first
        if late and (self._for_good or self.changes == self._first):
            self.refused += 1
            raise OSError(errno.EIO, "the disk is gone")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            _, mode, flags = arguments
            if mode is None and not isinstance(flags, int):
                return
            if (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.change()
        elif event in _CHANGES:
            self.change()


_DISK = Disk()
sys.addaudithook(_DISK.audit)  # which cannot be removed


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def changing(*args: Any, **kwargs: Any) -> Any:
        _DISK.change()
        return function(*args, **kwargs)

    return changing


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    # Writes to an open file, and those of safetensors, are not reported.
    for module, name in (
        (os, "pwrite"),
        (os, "fsync"),
        (expert_file, "save_file"),
        (write_checkpoint, "save_file"),
    ):
        monkeypatch.setattr(module, name, _counted(getattr(module, name)))
    return _DISK
