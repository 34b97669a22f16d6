"""Small files of one user, which nobody else can write, read, or redirect with a link.

They lie in a folder of mode 0700. A file is created under a random name, never through a link, and
gets its own name when it is complete. Before a file is read, its kind, owner and mode are checked
on the open descriptor, so that nobody can replace it between the check and the reading.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .proto.errors import ClusterError

_MOST_BYTES = 1 << 20
_WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write_private(file: Path, text: str) -> None:
    """Write ``file`` atomically with mode 0600; its folder is created if it is absent.

    Raises ClusterError if the folder is not this user's alone, or cannot be written.
    """
    with _wrapped(file), _folder(file.parent, make=True) as folder:
        _replace(folder, file.name, text.encode(), 0o600)


def replace_file(file: Path, data: bytes) -> None:
    """Write a file that the user named atomically, in whatever folder it is.

    Anything that others put there under the draft's name is neither followed nor written to. The
    mode follows the user's umask. Raises OSError.
    """
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _replace(folder, file.name, data, 0o666)
    finally:
        os.close(folder)


def _replace(folder: int, name: str, data: bytes, mode: int) -> None:
    draft = f".{secrets.token_hex(8)}.draft"
    with os.fdopen(os.open(draft, _NEW, mode, dir_fd=folder), "wb") as opened:
        try:
            opened.write(data)
            opened.flush()
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=folder)
            raise


def new_private(file: Path) -> int:
    """Open a new ``file`` for writing, mode 0600; an existing one is removed first.

    Returns the descriptor. Raises ClusterError as `write_private` does.
    """
    with _wrapped(file), _folder(file.parent, make=True) as folder:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name, dir_fd=folder)
        return os.open(file.name, _NEW, 0o600, dir_fd=folder)


def read_private(file: Path) -> str:
    """Return the text of ``file``.

    Raises FileNotFoundError if there is none, and ClusterError if anybody but this user may have
    written it, or may read it.
    """
    with _wrapped(file), _folder(file.parent) as folder:
        # O_NONBLOCK: opening must not block if somebody put a pipe there.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        opened = os.open(file.name, flags, dir_fd=folder)
        try:
            found = os.fstat(opened)
            if not stat.S_ISREG(found.st_mode):
                raise ClusterError(f"{file}: this is not a regular file; remove it")
            _check_owner(file, found)
            if found.st_mode & _OF_OTHERS:
                raise ClusterError(
                    f"{file}: the file's mode {stat.S_IMODE(found.st_mode):04o} lets other users "
                    "read or write the file; end the cluster of this name, remove the file, and "
                    "start the cluster anew"
                )
            if found.st_size > _MOST_BYTES:
                raise ClusterError(
                    f"{file}: the file has {found.st_size} bytes, which no cluster writes; remove "
                    "the file"
                )
            return os.read(opened, _MOST_BYTES).decode(errors="replace")
        finally:
            os.close(opened)


def is_own(file: Path) -> bool:
    """Return whether ``file`` is a regular file that only this user can have written.

    Raises ClusterError for a folder in which others may write.
    """
    try:
        found = file.lstat()
        with _wrapped(file), _folder(file.parent):
            own = found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode)
            return own and not found.st_mode & _WRITTEN_BY_OTHERS
    except FileNotFoundError:
        return False


def remove_private(file: Path) -> None:
    """Remove ``file`` if it exists."""
    with contextlib.suppress(FileNotFoundError), _wrapped(file), _folder(file.parent) as folder:
        os.unlink(file.name, dir_fd=folder)


@contextmanager
def _folder(folder: Path, *, make: bool = False) -> Iterator[int]:
    """Give a descriptor of ``folder``, after checking that it is this user's alone."""
    if make:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(opened)
        _check_owner(folder, found)
        if found.st_mode & _WRITTEN_BY_OTHERS:
            raise ClusterError(
                f"{folder}: the folder's mode {stat.S_IMODE(found.st_mode):04o} lets other users "
                f"put files there; check the files in the folder, then run `chmod 700 {folder}`"
            )
        if make and found.st_mode & _OF_OTHERS:
            os.fchmod(opened, 0o700)
        yield opened
    finally:
        os.close(opened)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise ClusterError(
            f"{path}: the owner is user {found.st_uid}, but this process runs as user "
            f"{os.geteuid()}; run as user {found.st_uid}, remove {path.name}, or set "
            "MOESAIC_CACHE to a folder of your own"
        )


@contextmanager
def _wrapped(file: Path) -> Iterator[None]:
    """Turn errors of the system into ours, except that a file is absent."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        links = [one for one in (file, file.parent) if one.is_symlink()]
        if links:
            raise ClusterError(
                f"{links[0]}: this is a symbolic link, which Moesaic does not follow here; "
                "remove it"
            ) from error
        raise ClusterError(
            f"{file}: {error.strerror}; set MOESAIC_CACHE to another folder for such files"
        ) from error
