"""What a running cluster leaves for other processes of its user: who owns it and how to reach it.

One small file for each cluster, of its user alone (`private_files`), gone when the cluster ends.
Who reads one connects to what it names, shows it Ray's token and may signal its owner: so its
values are looked at first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import psutil
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from .private_files import read_private, remove_private, write_private
from .proto.errors import ClusterError

log = logging.getLogger(__name__)


def _address(value: str) -> str:
    named = re.fullmatch(r"[\w.\-]+:(\d{1,5})|\[[\da-fA-F:.%\w]+\]:(\d{1,5})", value)
    if named is None or not 0 < int(named[1] or named[2]) <= 65_535:
        raise ValueError("not host:port")
    return value


def _url(value: str) -> str:
    """http, a host and a port, perhaps a path: nothing that sends a request elsewhere."""
    parts = urlsplit(value)
    plain = re.fullmatch(r"(/[\w.\-~]*)*", parts.path) is not None
    if parts.scheme != "http" or not plain or parts.query or parts.fragment:
        raise ValueError("not http://host:port")
    _address(parts.netloc)
    return value


def _absolute(value: str) -> str:
    if not Path(value).is_absolute() or "\0" in value:
        raise ValueError("not the absolute path of a folder")
    return value


Address = Annotated[str, AfterValidator(_address)]
Url = Annotated[str, AfterValidator(_url)]
Folder = Annotated[str, AfterValidator(_absolute)]
# What goes into a header, or an environment, as it is.
Secret = Annotated[str, Field(pattern=r"^[!-~]{1,4096}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A running cluster as its owner described it."""

    name: str
    pid: Annotated[int, Field(gt=0)]
    # Of the owning process, to tell it from a later one with the same pid.
    started: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    ray_address: Address
    embedded: bool  # Ray belongs to the cluster, and stays on loopback
    url: Url | None
    monitoring: Url | None = None  # of the endpoint: /status and /metrics
    # With which an embedded Ray lets others in.
    ray_token: Secret | None = field(default=None, repr=False)
    ray_insecure: bool = False  # Ray lets in whoever has no token, as the spec says
    router: Address | None = None  # of the router service
    router_key: Secret | None = field(default=None, repr=False)  # that it asks its clients for
    logs: Folder | None = None  # of Ray on this machine
    # Seconds that running answers have when the cluster ends.
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @property
    def alive(self) -> bool:
        return self._owner() is not None

    def end_owner(self) -> None:
        """Let the owner end the cluster (SIGTERM), if it still runs."""
        owner = self._owner()
        if owner is not None:
            try:
                # psutil looks once more whether it is that process.
                owner.send_signal(signal.SIGTERM)
            except psutil.NoSuchProcess:
                return

    def _owner(self) -> psutil.Process | None:
        """The process that started the cluster: one with its pid, start and user."""
        try:
            process = psutil.Process(self.pid)
            own = process.uids().real == os.getuid()
            # One that has ended and that nobody has asked for yet owns nothing.
            ended = process.status() == psutil.STATUS_ZOMBIE
            return process if own and not ended and process.create_time() == self.started else None
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None


_SESSION = TypeAdapter(Session)


def session_dir() -> Path:
    base = os.environ.get("MOESAIC_CACHE") or os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return (root if os.environ.get("MOESAIC_CACHE") else root / "moesaic") / "run"


def _file(name: str) -> Path:
    if not name or Path(name).name != name:
        raise ClusterError(f"name: {name!r} is not the name of a cluster")
    return session_dir() / f"{name}.json"


def write_session(
    *,
    name: str,
    ray_address: str,
    embedded: bool,
    url: str | None,
    monitoring: str | None = None,
    ray_token: str | None = None,
    ray_insecure: bool = False,
    router: str | None = None,
    router_key: str | None = None,
    logs: str | None = None,
    drain_s: float = 0.0,
) -> Session:
    """Announce the cluster that this process owns. Raises ClusterError where that cannot be done
    so that others of this machine neither read nor change it."""
    session = Session(
        name=name,
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        ray_address=ray_address,
        embedded=embedded,
        url=url,
        monitoring=monitoring,
        ray_token=ray_token,
        ray_insecure=ray_insecure,
        router=router,
        router_key=router_key,
        logs=logs,
        drain_s=drain_s,
    )
    write_private(_file(name), json.dumps(asdict(session)))
    return session


def find_session(name: str) -> Session | None:
    """The running cluster of that name, or None; what a dead one left is removed.

    Raises ClusterError where somebody else may have written what is there, or where it is not what
    a cluster writes.
    """
    file = _file(name)
    try:
        session = _SESSION.validate_json(read_private(file), strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ClusterError(_unlike(file, where, first["msg"])) from None
    if session.name != name:
        raise ClusterError(_unlike(file, "name", f"{session.name!r}, not {name!r}"))
    if not session.alive:
        remove_private(file)
        return None
    return session


def _unlike(file: Path, where: str, why: str) -> str:
    return (
        f"{file}: {where}: {why}: this version of Moesaic does not write such a file; end what "
        "runs under that name with the version that started it, or remove the file"
    )


def running_sessions() -> Iterator[Session]:
    """Of this user's clusters on this machine; a file that is none of theirs is passed over."""
    for file in sorted(session_dir().glob("*.json")):
        try:
            session = find_session(file.stem)
        except ClusterError as error:
            log.warning("%s", error)
            continue
        if session is not None:
            yield session


def need_session(name: str) -> Session:
    """Like `find_session`. Raises ClusterError when there is none."""
    session = find_session(name)
    if session is None:
        running = sorted(file.stem for file in session_dir().glob("*.json"))
        hint = f"running: {', '.join(running)}" if running else "`moesaic up` starts one"
        raise ClusterError(f"no cluster {name!r} is running here; {hint}")
    return session


def remove_session(name: str) -> None:
    remove_private(_file(name))


def remove_own_session(name: str) -> None:
    """Only where this process owns the cluster."""
    session = find_session(name)
    if session is not None and session.pid == os.getpid():
        remove_session(name)


def note_logs(name: str, folder: str) -> None:
    """Where the cluster's processes print, so that a start that fails can be read about."""
    write_private(_noted(name), folder)


def _noted(name: str) -> Path:
    return _file(name).with_name(f"{name}.logs")


def owner_log(name: str) -> Path:
    """What the owner of a cluster prints that was started in the background."""
    return _file(name).with_name(f"{name}.log")


def logged_session(name: str) -> Session:
    """The running cluster of that name, or what is left of the last one: its logs. Raises
    ClusterError when there is neither."""
    session = find_session(name)
    if session is not None:
        return session
    try:
        folder = _absolute(read_private(_noted(name)))
    except FileNotFoundError:
        return need_session(name)
    except ValueError as error:
        raise ClusterError(f"{_noted(name)}: {error}; remove it") from None
    return Session(
        name=name, pid=0, started=0.0, ray_address="", embedded=True, url=None, logs=folder
    )
