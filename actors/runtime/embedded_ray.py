"""A Ray that this process starts: a failed start is cleaned up, and tried once more.

A busy machine may be too slow for the 30 s in which Ray expects its processes to start. Ray then
raises an error and leaves the processes that it had started; they hold memory and ports until this
process ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import shutil
import signal
import stat
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import worker

from ...proto.errors import ClusterError
from .ray_token import make_token

log = logging.getLogger(__name__)

TRIES = 2
# The only one of Ray's waits for its processes that can be set; its default is 30 s.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")
# Log files to quote after a failed start, the most telling first.
_LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out")
_TAIL_LINES = 3
_END_S = 10.0


def start_embedded(said: Callable[[str], None] = log.warning, **options: Any) -> None:
    """Start a new Ray with `ray.init` and these options.

    ``said`` is called with a message if a start failed and is tried once more. Raises ClusterError
    with the cause if the last attempt fails too.
    """
    make_token()
    for number in range(1, TRIES + 1):
        before = sessions()
        try:
            ray.init(address="local", _temp_dir=str(_ray_folder()), **options)
            return
        except BaseException as error:
            # Ray raises errors of many types here, and an interrupted start leaves processes too.
            folders = sorted(sessions() - before)
            words = f"Ray did not start: {_reason(error)}{_last_words(folders)}"
            end_sessions(folders)
            # A start that failed late may have connected this process already.
            _shut_down_ray()
            _forget_processes(error)
            if not isinstance(error, Exception):
                raise
            if number == TRIES:
                raise ClusterError(f"ray.address: local: {words}") from error
            said(f"{words}; Moesaic tries once more")


def end_embedded() -> None:
    """Shut down the Ray that this process started, and kill processes that do not end in time."""
    running = processes_of(*(folder.name for folder in sessions()))
    try:
        _shut_down_ray()
    finally:
        _, left = psutil.wait_procs(running, timeout=_END_S)
        _kill(left)


def _shut_down_ray() -> None:
    """Shut down Ray, and keep this process's handler of SIGTERM.

    Ray's library resets the signal to its default, which ends a process in the middle of its work,
    while Python still believes that its handler is installed. Then Ray waits for its processes to
    end, which takes seconds; so the handler is put back before that, too.
    """
    handler = signal.getsignal(signal.SIGTERM)
    in_main = threading.current_thread() is threading.main_thread()

    def put_back() -> None:
        if handler is not None and in_main:
            signal.signal(signal.SIGTERM, handler)

    node: Any = worker._global_node
    if node is not None:
        end_processes = node.kill_all_processes

        def kill_all_processes(*arguments: Any, **named: Any) -> None:
            put_back()
            end_processes(*arguments, **named)

        node.kill_all_processes = kill_all_processes
    ray.shutdown()
    put_back()


def kill_embedded() -> None:
    """Kill all processes of Rays that this process started."""
    _kill_sessions([folder.name for folder in sessions()])


def _forget_processes(error: BaseException) -> None:
    """Free Ray's process objects, which the error keeps alive, without their warnings."""
    traceback.clear_frames(error.__traceback__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def sessions() -> set[Path]:
    """Return the folders of all Rays that this process started."""
    return set(_ray_folder().glob(f"session_*_{os.getpid()}"))


@cache
def _ray_folder() -> Path:
    """Return the folder for sockets, logs and packages of this process's Rays.

    Ray lets all users of the machine write there, so it lies in a folder that no other user can
    enter. Its name is short, because the path of a socket may have only 107 characters.
    """
    above = Path(get_default_system_temp_dir())
    private = above / f"moesaic-{os.geteuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            private.mkdir(mode=0o700)
        found = private.lstat()
        own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not own or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            # Another user has made a folder of this name, or others can enter it.
            private = Path(mkdtemp(prefix="moesaic-", dir=above))
    except OSError as error:
        raise ClusterError(
            f"ray.address: local: Ray's folder cannot be made in {above} ({error.strerror}); set "
            "RAY_TMPDIR to another folder"
        ) from error
    return private / "ray"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _last_words(folders: list[Path]) -> str:
    """Quote the last lines of the logs of a failed start."""
    for folder in folders:
        for name in _LOGS:
            with contextlib.suppress(OSError):
                text = (folder / "logs" / name).read_text(errors="replace")
                if lines := [line for line in text.splitlines() if line.strip()]:
                    return f" {name} ends with: " + " | ".join(lines[-_TAIL_LINES:])
    return " (none of its processes wrote a log)"


def end_sessions(folders: list[Path]) -> None:
    """End all processes of the Rays with these folders, and remove the folders.

    The processes are those with the session's unique name in their command lines, and all children
    of these.
    """
    _kill_sessions([folder.name for folder in folders])
    for folder in folders:
        latest = folder.with_name("session_latest")
        if latest.is_symlink() and latest.readlink() == folder:
            latest.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_sessions(names: list[str]) -> None:
    deadline = time.monotonic() + _END_S
    while found := processes_of(*names):
        _kill(found)
        if time.monotonic() > deadline:
            left = ", ".join(str(process.pid) for process in found)
            log.warning("processes of Ray could not be ended; their ids are %s", left)
            return


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=1.0)


def processes_of(*sessions: str) -> list[psutil.Process]:
    """Return the processes that run for one of these sessions of Ray."""
    if not sessions:
        return []
    named = re.compile(rf"\b({'|'.join(map(re.escape, sessions))})\b")
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if named.search(" ".join(process.cmdline())):
                # Workers are children of a raylet and rename themselves, without the session.
                found += [process, *process.children(recursive=True)]
    return list(dict.fromkeys(found))
