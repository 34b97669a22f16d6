"""`up`: starts a cluster from a spec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .handle import Cluster, quiet
from .proto.errors import ClusterError
from .router_keys import take_key
from .session import (
    find_session,
    note_logs,
    ray_token,
    remove_session,
    stay_on_loopback,
    write_session,
)

if TYPE_CHECKING:
    from .actors.serve.launch import Progress
    from .cluster.spec.spec import Spec

log = logging.getLogger(__name__)


def _spec(spec: Spec | Mapping[str, Any] | str | Path) -> Spec:
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
    to ``warn``. The calling process owns the cluster, which ends with the process, with
    `Cluster.down`, or with the `with` block. Raises SpecError, CheckpointError, UnsupportedModel
    and ClusterError.
    """
    # First of all: every process that starts later would inherit the key.
    router_key = take_key()
    wanted = _spec(spec)
    if find_session(wanted.name) is not None:
        raise ClusterError(
            f"name: a cluster {wanted.name!r} is running; `moesaic down --name {wanted.name}` "
            "ends it"
        )
    if wanted.ray.address == "local":
        stay_on_loopback()
    from .actors.runtime.cluster_secret import router_key_of
    from .actors.runtime.ray_border import log_folder, ray_address
    from .actors.serve.launch import launch

    launched = launch(
        wanted,
        progress or quiet,
        warn,
        lambda: note_logs(wanted.name, log_folder()),
        router_key,
    )
    try:
        session = write_session(
            name=wanted.name,
            ray_address=ray_address(),
            embedded=launched.owns_ray,
            url=launched.url,
            monitoring=launched.monitoring,
            ray_token=ray_token() if launched.owns_ray else None,
            ray_insecure=wanted.ray.insecure,
            router=launched.router,
            router_key=None if launched.router is None else router_key_of(launched.namespace),
            logs=log_folder(),
            drain_s=wanted.drain_s,
        )
        return Cluster(session, launched)
    except BaseException:
        with ExitStack() as last_first:
            last_first.callback(remove_session, wanted.name)
            last_first.callback(launched.close)
        raise
