"""What a running cluster leaves for other processes of its user: who owns it and how to reach it.

One small file for each cluster, readable by its user alone, gone when the cluster ends.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from .places import session_dir
from .proto.errors import ClusterError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A running cluster as its owner described it."""

    name: str
    pid: int
    started: float  # of the owning process, to tell it from a later one with the same pid
    ray_address: str
    embedded: bool  # Ray belongs to the cluster, and stays on loopback
    url: str | None
    ray_token: str | None = field(default=None, repr=False)  # lets others into an embedded Ray
    router: str | None = None  # host:port of the router service
    router_key: str | None = field(default=None, repr=False)  # that it asks its clients for
    logs: str | None = None  # the folder of Ray's logs on this machine

    @property
    def alive(self) -> bool:
        try:
            return psutil.Process(self.pid).create_time() == self.started
        except psutil.NoSuchProcess:
            return False


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
    ray_token: str | None = None,
    router: str | None = None,
    router_key: str | None = None,
    logs: str | None = None,
) -> Session:
    """Announce the cluster that this process owns."""
    session = Session(
        name=name,
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        ray_address=ray_address,
        embedded=embedded,
        url=url,
        ray_token=ray_token,
        router=router,
        router_key=router_key,
        logs=logs,
    )
    file = _file(name)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(asdict(session)))
    draft.replace(file)
    return session


def find_session(name: str) -> Session | None:
    """The running cluster of that name, or None; what a dead one left is removed."""
    file = _file(name)
    try:
        session = Session(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        file.unlink(missing_ok=True)
        return None
    if not session.alive:
        file.unlink(missing_ok=True)
        return None
    return session


def running_sessions() -> Iterator[Session]:
    """Of all clusters of this user on this machine."""
    for file in sorted(session_dir().glob("*.json")):
        try:
            session = find_session(file.stem)
        except ClusterError as error:
            log.warning("a session file is left out: %s", error)
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
    _file(name).unlink(missing_ok=True)


def note_logs(name: str, folder: str) -> None:
    """Where the cluster's processes print, so that a start that fails can be read about."""
    file = _file(name).with_suffix(".logs")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_text(folder)


def logged_session(name: str) -> Session:
    """The running cluster of that name, or what is left of the last one: its logs. Raises
    ClusterError when there is neither."""
    session = find_session(name)
    if session is not None:
        return session
    try:
        folder = _file(name).with_suffix(".logs").read_text()
    except OSError:
        return need_session(name)
    return Session(
        name=name, pid=0, started=0.0, ray_address="", embedded=True, url=None, logs=folder
    )
