"""A Ray of Moesaic's own: its processes belong to no other, and outlive the one that started them.

A busy machine may be too slow for the 30 s in which Ray expects its processes to start. Ray then
raises an error and leaves the processes that it had started: they are ended, and the start is tried
once more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import IO, Any

import psutil
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._private import worker

from ...proto.errors import ClusterError
from .ray_head import KEPT
from .ray_token import make_token

log = logging.getLogger(__name__)

TRIES = 2
# The only one of Ray's waits for its processes that can be set; its default is 30 s.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "60")
# Ray's own waits, one after the other, take less.
START_S = 300.0
# Log files to quote after a failed start, the most telling first.
_LOGS = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out")
_TAIL_LINES = 3
_END_S = 10.0
_HEAD = "moesaic.actors.runtime.ray_head"

# The programs by which this process has started Rays that are not kept yet, by their ids.
_starters: dict[int, subprocess.Popen[str]] = {}
# All of them: a Ray's folder is named by its program's id.
_started_by: set[int] = set()


@dataclass(frozen=True, slots=True)
class EmbeddedRay:
    """A Ray that Moesaic started on this machine."""

    address: str  # host:port of its GCS
    folder: Path  # of its sockets and logs; its name is in the command lines of its processes


def start_embedded(
    said: Callable[[str], None] = log.warning,
    *,
    num_cpus: int,
    num_gpus: int | None = None,
    object_store_memory: int | None = None,
) -> EmbeddedRay:
    """Start a new Ray, to which this process is not connected yet.

    It ends with `end_embedded`, and with this process unless `keep_embedded` was called.
    ``said`` is called with a message if a start failed and is tried once more. Raises ClusterError
    with the cause if the last attempt fails too.
    """
    make_token()
    options = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "object_store_memory": object_store_memory,
        "include_dashboard": False,
        "temp_dir": str(_ray_folder()),
    }
    command = [sys.executable, "-m", _HEAD, json.dumps(options)]
    for number in range(1, TRIES + 1):
        before = sessions()
        try:
            return _started(command)
        except BaseException as error:
            # An interrupted start leaves processes, too.
            folders = sorted(sessions() - before)
            words = f"Ray did not start: {_reason(error)}{_last_words(folders)}"
            end_sessions(folders)
            if not isinstance(error, ClusterError):
                raise
            if number == TRIES:
                raise ClusterError(f"ray.address: local: {words}") from error
            said(f"{words}; Moesaic tries once more")
    raise AssertionError("the last attempt returns or raises")


def _started(command: list[str]) -> EmbeddedRay:
    """Run the program that starts a Ray. Raises ClusterError with the last line that it printed."""
    # Not a pipe: what a failed start leaves would keep it open.
    with TemporaryFile("w+") as errors:
        reader, writer = os.pipe()
        with os.fdopen(reader) as told:
            try:
                starter = subprocess.Popen(
                    [*command, str(writer)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    text=True,
                    pass_fds=[writer],
                    # Ray's processes do not get the terminal's Ctrl-C.
                    start_new_session=True,
                )
            finally:
                os.close(writer)
            _starters[starter.pid] = starter
            _started_by.add(starter.pid)
            try:
                if not select.select([told], [], [], START_S)[0]:
                    raise ClusterError(f"its processes did not start within {START_S:g} s")
                line = told.readline()
                if not line:
                    starter.wait(_END_S)
                    raise ClusterError(_last_line(errors) or "its starter wrote nothing")
            except BaseException:
                _end_starter(starter.pid)
                raise
    found = json.loads(line)
    return EmbeddedRay(found["address"], Path(found["folder"]))


def keep_embedded(folder: Path) -> None:
    """Let the Ray with this folder outlive this process: from now on somebody can end it."""
    starter = _starters.pop(_starter_of(folder), None)
    if starter is not None:
        starter.communicate(KEPT, timeout=_END_S)


def _end_starter(pid: int) -> None:
    starter = _starters.pop(pid, None)
    if starter is not None:
        starter.kill()
        starter.communicate()


def _starter_of(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def _last_line(file: IO[str]) -> str:
    file.seek(0)
    return next((line for line in reversed(file.read().splitlines()) if line.strip()), "")


def started_processes() -> list[psutil.Process]:
    """Return the processes of all Rays that this process started."""
    return processes_of(*(folder.name for folder in sessions()))


def end_embedded(folder: Path) -> None:
    """End the Ray with this folder; processes that do not end in time are killed.

    If this process is connected to that Ray, it is disconnected first.
    """
    running = processes_of(folder.name)
    try:
        if session_folder() == folder:
            disconnect()
        _end_starter(_starter_of(folder))
        raylets = [process for process in running if _name(process) == "raylet"]
        # A raylet that is asked to end takes its workers along.
        for process in raylets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(raylets, timeout=_END_S)
    finally:
        _kill(running)
        _kill_sessions([folder.name])


def session_folder() -> Path | None:
    """Return the folder of the Ray that this process is connected to, if it is to one."""
    # Ray has no public call that says it without a warning.
    node: Any = worker._global_node
    if not ray.is_initialized() or node is None:
        return None
    return Path(node.get_session_dir_path())


def connected_own_ray() -> EmbeddedRay | None:
    """Return the Ray that this process is connected to, if it is one of Moesaic's own."""
    folder = session_folder()
    if folder is None or folder.parent != _ray_folder():
        return None
    return EmbeddedRay(ray.get_runtime_context().gcs_address, folder)


def disconnect() -> None:
    """Disconnect this process from Ray, and keep its handler of SIGTERM.

    Ray's library resets the signal to its default, which ends a process in the middle of its work,
    while Python still believes that its handler is installed.
    """
    handler = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def kill_embedded() -> None:
    """Kill all processes of Rays that this process started."""
    for starter in list(_starters.values()):
        starter.kill()
    _kill_sessions([folder.name for folder in sessions()])


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def sessions() -> set[Path]:
    """Return the folders of all Rays that this process started."""
    return {folder for pid in _started_by for folder in _ray_folder().glob(f"session_*_{pid}")}


@cache
def _ray_folder() -> Path:
    """Return the folder for sockets, logs and packages of this user's Rays.

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
