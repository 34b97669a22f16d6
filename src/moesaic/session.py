"""Session files, which tell the processes of a user how to reach a cluster on this machine.

There is one small file for each cluster, private to its user (`private_files`), and removed when
the cluster ends. A reader connects to the addresses in it, shows Ray's token there and may end the
processes of its Ray, so it checks the values first.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .private_files import read_private, remove_private, write_private
from .proto.errors import ClusterError

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

_REACH_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSession:
    """A running cluster as the process that started it described it.

    Reading a file checks that its values have these types, and the forms of `_FORMS`.
    """

    name: str
    id: str = ""  # another one for each cluster, whatever its name
    pid: int  # of the process that started it, which may have ended
    started: float  # of that process, to tell it from a later one with the same pid
    ray_address: str
    ray_folder: str | None = None  # of a Ray of Moesaic's own, which stays on loopback
    ready: bool = True  # False: it is starting, or its start was cut off
    url: str | None = None
    monitoring: str | None = None  # the address of the page, /status and /metrics
    ray_token: str | None = field(default=None, repr=False)  # of an embedded Ray
    ray_insecure: bool = False  # the spec allows a Ray that asks for no token
    router: str | None = None  # host:port of the router service
    router_key: str | None = field(default=None, repr=False)  # that its clients must show
    operator_key: str | None = field(default=None, repr=False)  # for the actions of the page
    logs: str | None = None  # the folder of Ray's logs on this machine
    drain_s: float = 0.0  # seconds for running answers when the cluster ends

    @property
    def embedded(self) -> bool:
        """Whether Ray is Moesaic's own."""
        return self.ray_folder is not None

    @property
    def alive(self) -> bool:
        """Whether its Ray runs: a raylet of Moesaic's own, or else something at Ray's address."""
        return self.raylet() is not None if self.embedded else self.answers

    @property
    def answers(self) -> bool:
        """Whether something takes connections at Ray's address."""
        host, _, port = self.ray_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
        except OSError:
            return False
        return True

    @property
    def starts(self) -> bool:
        """Whether the process that started it is still starting it."""
        import psutil

        if self.ready:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.started and is_alive(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def raylet(self) -> psutil.Process | None:
        """Return the raylet of Moesaic's own Ray, if it runs."""
        import psutil  # a client of a router service elsewhere need not have it

        session = Path(self.ray_folder or "").name
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                own = process.name() == "raylet" and process.uids().real == os.getuid()
                if own and session in " ".join(process.cmdline()) and is_alive(process):
                    return process
        return None


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs. A zombie has ended."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- what a file may say ------------------------------------------------------------------------


def _address(value: str) -> bool:
    named = re.fullmatch(r"[\w.\-]+:(\d{1,5})|\[[\da-fA-F:.%\w]+\]:(\d{1,5})", value)
    return named is not None and 0 < int(named[1] or named[2]) <= 65_535


def _url(value: str) -> bool:
    """Return whether it has only http, host, port and path, so no request goes elsewhere."""
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    plain = re.fullmatch(r"(/[\w.\-~]*)*", parts.path) is not None
    rest = parts.query or parts.fragment
    return parts.scheme == "http" and _address(parts.netloc) and plain and not rest


def _secret(value: str) -> bool:
    """Return whether it can go into a header, or an environment, unchanged."""
    return re.fullmatch(r"[!-~]{1,4096}", value) is not None


def _folder(value: str) -> bool:
    return Path(value).is_absolute() and "\0" not in value


def _ray_folder(value: str) -> bool:
    # Processes whose command lines have this name are ended with the cluster.
    return _folder(value) and re.fullmatch(r"session_[\d_\-]+", Path(value).name) is not None


_Form = tuple[Callable[[Any], bool], str]
_FORMS: dict[str, _Form] = {
    "pid": (lambda pid: pid > 0, "the number of a process"),
    "started": (lambda started: math.isfinite(started) and started >= 0, "a time"),
    "ray_address": (_address, "host:port"),
    "url": (_url, "http://host:port"),
    "monitoring": (_url, "http://host:port"),
    "router": (_address, "host:port"),
    "ray_token": (_secret, "a token"),
    "router_key": (_secret, "a key"),
    "operator_key": (_secret, "a key"),
    "drain_s": (lambda seconds: math.isfinite(seconds) and seconds >= 0, "seconds"),
    "logs": (_folder, "the absolute path of a folder"),
    "ray_folder": (_ray_folder, "the folder of a Ray"),
}
_TYPES = {"str": str, "int": int, "float": (float, int), "bool": bool, "None": type(None)}


def _parsed(text: str, name: str) -> ClusterSession:
    """Parse a session file; unknown keys, which later versions may write, are ignored.

    Raises ValueError with what is wrong.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it is not a JSON object")
    known = {one.name: str(one.type).split(" | ") for one in fields(ClusterSession)}
    secret = {one.name for one in fields(ClusterSession) if not one.repr}
    values = {key: value for key, value in values.items() if key in known}
    for key, value in values.items():
        right = any(
            isinstance(value, _TYPES[one]) and (one == "bool" or not isinstance(value, bool))
            for one in known[key]
        )
        fits, form = _FORMS.get(key, (lambda _: True, " or ".join(known[key])))
        if not right or (value is not None and not fits(value)):
            raise ValueError(
                f"{key}: {'its value' if key in secret else repr(value)} is not {form}"
            )
    if values.get("name") != name:
        raise ValueError(f"name: {values.get('name')!r} is not {name!r}")
    try:
        return ClusterSession(**values)
    except TypeError as error:
        raise ValueError(str(error)) from None


# ---- the files ----------------------------------------------------------------------------------


def session_dir() -> Path:
    base = os.environ.get("MOESAIC_CACHE") or os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return (root if os.environ.get("MOESAIC_CACHE") else root / "moesaic") / "run"


def _file(name: str) -> Path:
    if not name or Path(name).name != name:
        raise ClusterError(f"name: {name!r} is not the name of a cluster")
    return session_dir() / f"{name}.json"


def write_session(session: ClusterSession) -> None:
    """Write a cluster's file. Raises ClusterError if other users could read or change it."""
    write_private(_file(session.name), json.dumps(asdict(session)))


def this_process() -> tuple[int, float]:
    """Return this process's id, and when it began."""
    import psutil

    return os.getpid(), psutil.Process().create_time()


def find_session(name: str) -> ClusterSession | None:
    """Return the cluster of that name that runs, or starts, or whose start was cut off, or None.

    The file of a cluster whose own Ray has ended is removed. Raises ClusterError if somebody else
    may have written the file, or if it is not of the form that a cluster writes.
    """
    file = _file(name)
    try:
        session = _parsed(read_private(file), name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ClusterError(
            f"{file}: {error}: this version of Moesaic does not write such a file; end what runs "
            "under that name with the version that started it, or remove the file"
        ) from None
    if session.alive:
        return session
    if session.embedded:
        _kill_rest(session)
        remove_private(file)
    return None  # the GCS of a Ray that others started may come back


def _kill_rest(session: ClusterSession) -> None:
    """Kill what a Ray without its raylet has left: without one it is of no use to anybody."""
    import psutil

    folder = Path(session.ray_folder or "").name
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.uids().real == os.getuid() and folder in " ".join(process.cmdline()):
                process.kill()


def running_sessions() -> Iterator[ClusterSession]:
    """Yield this user's clusters on this machine; log and skip files that are not theirs."""
    for file in sorted(session_dir().glob("*.json")):
        try:
            session = find_session(file.stem)
        except ClusterError as error:
            log.warning("%s", error)
            continue
        if session is not None and session.ready:
            yield session


def need_session(name: str) -> ClusterSession:
    """Return the running cluster of that name. Raises ClusterError when there is none."""
    session = find_session(name)
    if session is None:
        running = sorted(file.stem for file in session_dir().glob("*.json"))
        hint = f"choose one of: {', '.join(running)}" if running else "`moesaic up` starts one"
        raise ClusterError(f"no cluster {name!r} of this user is running on this machine; {hint}")
    if session.starts:
        raise ClusterError(f"cluster {name!r} is still starting (process {session.pid})")
    if not session.ready:
        raise ClusterError(
            f"the start of cluster {name!r} was cut off; `moesaic down --name {name}` removes what "
            "is left of it"
        )
    return session


def remove_session(session: ClusterSession) -> None:
    """Remove a cluster's file, unless it is of a later cluster of the same name."""
    try:
        found = _parsed(read_private(_file(session.name)), session.name)
    except (FileNotFoundError, ValueError):
        return
    if found.id == session.id:
        remove_private(_file(session.name))


def own_session(name: str) -> ClusterSession | None:
    """Return the session of the cluster if this process has started it."""
    session = find_session(name)
    return session if session is not None and session.pid == os.getpid() else None


def is_noted(session: ClusterSession) -> bool:
    """Return whether the cluster's file is still there, and not one of a later cluster."""
    try:
        return _parsed(read_private(_file(session.name)), session.name).id == session.id
    except (FileNotFoundError, ValueError):
        return False


def note_logs(name: str, folder: str) -> None:
    """Note where the cluster's processes log, so that the logs of a failed start can be found."""
    write_private(_noted(name), folder)


def _noted(name: str) -> Path:
    return _file(name).with_name(f"{name}.logs")


def logged_session(name: str) -> ClusterSession:
    """Return the running cluster of that name, or what is left of the last one: its logs.

    Raises ClusterError when there is neither.
    """
    session = find_session(name)
    if session is not None:
        return session
    try:
        folder = read_private(_noted(name))
    except FileNotFoundError:
        return need_session(name)
    if not _folder(folder):
        raise ClusterError(
            f"{_noted(name)} does not hold the absolute path of a folder; remove this file"
        )
    return ClusterSession(name=name, pid=0, started=0.0, ray_address="", logs=folder)


# ---- what Ray must find in the environment of a process that starts it or joins it ---------------


def stay_on_loopback() -> None:
    """Let an embedded Ray, and whoever joins it, listen on loopback only.

    Ray reads the variable when it is imported; the odd name is Ray's own.
    """
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@contextmanager
def show_token(token: str | None) -> Iterator[None]:
    """Show Ray its token in the environment for a moment; Ray keeps it.

    Nothing in the environment may say meanwhile that there is no token. Processes that this one
    starts later do not inherit the token.
    """
    if token is None:
        yield
        return
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["RAY_AUTH_TOKEN"] = token
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def ray_token() -> str | None:
    """Return the token of this process's embedded Ray, which Ray itself generates."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    kept = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    try:
        return Path(kept).read_text().strip() or None
    except OSError:
        return None
