"""Folders that appear whole or not at all.

A folder is written under another name beside its own, a *draft*, brought to the disk, and renamed.
Whoever writes a draft holds a lock on it, so a draft without a lock is what a process left that was
killed. Into a folder that has other files, too, a draft's files are moved one by one, and the file
that says that all are there is moved last. The names beside folder X all begin with a dot:

- ``.X.*.draft``: is being written;
- ``.X.*.replaced``: the whole folder that had been X; it is X again if nothing replaced it;
- ``.X.*.removed``: is being removed, and no longer whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_BESIDE = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(draft|replaced|removed)")


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty draft, which becomes ``target`` and is on the disk at the end.

    A crash leaves no target, or a whole one. With ``overwrite`` an existing target is replaced; a
    crash between two renames leaves it under another name, from which `tidy` brings it back. Raises
    OSError, and FileExistsError if the target exists; what was written is removed then.
    """
    if target.parent.is_dir():
        tidy(target.parent, target.name)
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "the folder exists", str(target))
    with _draft(target) as draft:
        yield draft
        _sync_all(draft)
        _put(draft, target, overwrite)


@contextmanager
def filled_folder(target: Path, last: str, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Yield an empty draft, whose files are in ``target`` at the end, and on the disk.

    Other files of ``target`` stay, but for those that the patterns ``replaced`` match. While files
    are moved it has no file ``last``, which comes last. Raises OSError.
    """
    if not os.path.lexists(target):
        with new_folder(target) as draft:
            yield draft
        return
    tidy(target.parent, target.name)
    with _draft(target) as draft:
        yield draft
        _sync_all(draft)
        (target / last).unlink(missing_ok=True)
        _sync(target)
        new = {file.relative_to(draft) for file in draft.rglob("*") if file.is_file()}
        for old in [file for pattern in replaced for file in target.glob(pattern)]:
            if old.is_file() and old.relative_to(target) not in new:
                old.unlink()
        for file in sorted(new - {Path(last)}):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (draft / file).replace(target / file)
        for folder in {(target / file).parent for file in new}:
            _sync(folder)
        (draft / last).replace(target / last)
        _sync(target)


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Yield an empty draft with a lock on it; what is left of it at the end is removed."""
    draft = _beside(target, "draft")
    draft.mkdir()
    opened = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # what stays is removed by `tidy`
        os.close(opened)


def _put(draft: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not os.path.lexists(target):
        draft.rename(target)  # fails if a folder with files has come there meanwhile
        _sync(target.parent)
        return
    replaced = _beside(target, "replaced")
    target.rename(replaced)
    try:
        draft.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    _sync(target.parent)
    remove_folder(replaced, of=target)


def remove_folder(folder: Path, *, of: Path | None = None) -> None:
    """Remove a folder, which is gone under its name before the first of its files is.

    Raises OSError.
    """
    removed = _beside(of or folder, "removed")
    folder.rename(removed)
    _sync(folder.parent)
    shutil.rmtree(removed)


def tidy(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in ``folder``, and bring back what they had not replaced.

    With ``name`` only what belongs to the folder of that name. Raises OSError.
    """
    for path in sorted(folder.iterdir()):
        match = _BESIDE.fullmatch(path.name)
        if match is None or name not in (None, match[1]) or path.is_symlink():
            continue
        target = path.with_name(match[1])
        if match[2] == "replaced" and not os.path.lexists(target):
            path.rename(target)
            _sync(folder)
            continue
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # its process is writing it
        else:
            remove_folder(path, of=target)
        finally:
            os.close(opened)


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{kind}")


def _sync_all(folder: Path) -> None:
    """Bring the files below ``folder`` to the disk, and their names."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some file systems cannot do that for a folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)
