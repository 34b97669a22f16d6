"""`up`: starts a cluster from a spec."""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .clients.router_keys import take_key
from .handle import Cluster, quiet
from .proto.errors import ClusterError
from .session import (
    ClusterSession,
    find_session,
    note_logs,
    ray_token,
    remove_session,
    stay_on_loopback,
    this_process,
    write_session,
)

if TYPE_CHECKING:
    from .actors.runtime.embedded_ray import EmbeddedRay
    from .actors.serve.launch import Progress
    from .cluster.spec.spec import Spec

log = logging.getLogger(__name__)


def spec_from(spec: Spec | Mapping[str, Any] | str | Path) -> Spec:
    """Return a spec that is given as it is, as values, or as a file. Raises SpecError."""
    from .cluster.spec.spec import Spec, load_spec, parse_spec

    if isinstance(spec, Spec):
        return spec
    return parse_spec(dict(spec)) if isinstance(spec, Mapping) else load_spec(spec)


def up(
    spec: Spec | Mapping[str, Any] | str | Path,
    *,
    progress: Progress | None = None,
    warn: Callable[[str], None] = log.warning,
) -> Cluster:
    """Start a cluster from a spec, its values, or a YAML file, and wait until it answers.

    Before anything starts, the spec is checked (`check_spec`): errors are raised, other findings go
    to ``warn``. The cluster ends with `Cluster.down`, with the `with` block, or when this program
    ends; after `Cluster.detach`, or if this process is killed, it runs until `moesaic down`. Raises
    SpecError, CheckpointError, UnsupportedModel and ClusterError.
    """
    # First of all: every process that starts later would inherit the key.
    router_key = take_key()
    wanted = spec_from(spec)
    _check_name(wanted.name, warn)
    if wanted.ray.address == "local":
        stay_on_loopback()
    from .actors.runtime.embedded_ray import keep_embedded
    from .actors.runtime.ray_border import log_folder, ray_address
    from .actors.serve.launch import Noting, launch
    from .actors.store.cluster_secret import router_key_of, secret_of

    found: list[ClusterSession] = []
    cluster_id = secrets.token_hex(8)

    def on_ray(own_ray: EmbeddedRay | None) -> None:
        """Note what there is to end, before anything starts."""
        pid, started = this_process()
        session = ClusterSession(
            name=wanted.name,
            id=cluster_id,
            pid=pid,
            started=started,
            ready=False,
            ray_address=ray_address(),
            ray_folder=None if own_ray is None else str(own_ray.folder),
            ray_token=None if own_ray is None else ray_token(),
            ray_insecure=wanted.ray.insecure,
            logs=log_folder(),
            drain_s=wanted.drain_s,
        )
        running = find_session(wanted.name)
        elsewhere = running is not None and running.ray_address != session.ray_address
        if running is not None and (elsewhere or running.starts):
            raise _running(running)
        write_session(session)
        found.append(session)
        if own_ray is not None:
            keep_embedded(own_ray.folder)
        note_logs(wanted.name, log_folder())

    def undone() -> None:
        for session in found:
            remove_session(session)

    noting = Noting(cluster_id, on_ray, undone)
    launched = launch(wanted, progress or quiet, warn, noting, router_key)
    session = replace(
        found[0],
        ready=True,
        url=launched.url,
        monitoring=launched.monitoring,
        router=launched.router,
        router_key=None if launched.router is None else router_key_of(launched.namespace),
        operator_key=secret_of(launched.namespace).operator_key,
    )
    cluster = Cluster(session, ends_with_program=True)
    try:
        write_session(session)
    except BaseException:
        cluster.down()
        raise
    return cluster


def _check_name(name: str, warn: Callable[[str], None]) -> None:
    """Raise ClusterError if a cluster of that name runs; end what a cut-off start left of one.

    A cluster on a Ray that others started may have ended without its session file: the new one asks
    that Ray.
    """
    session = find_session(name)
    if session is None or (session.ready and not session.embedded):
        return
    if session.ready or session.starts:
        raise _running(session)
    warn(f"an earlier start of cluster {name!r} was cut off; what it left is ended")
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    Cluster(session).down()
    if not connected:
        from .actors.runtime.embedded_ray import disconnect

        disconnect()  # the new cluster may be on another Ray


def _running(session: ClusterSession) -> ClusterError:
    state = "starting" if session.starts else "running"
    return ClusterError(
        f"name: a cluster {session.name!r} is {state}; `moesaic down --name {session.name}` ends it"
    )
