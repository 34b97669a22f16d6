"""What happens to the cluster of a session as a whole: it follows another spec, and it ends."""

from __future__ import annotations

import getpass
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .proto.errors import ClusterError
from .session import ClusterSession, is_noted, write_session

if TYPE_CHECKING:
    from .actors.serve.beginning import Progress
    from .cluster.reports.applying import ApplyReport
    from .cluster.spec.spec import Spec

log = logging.getLogger(__name__)


def apply_spec(
    session: ClusterSession,
    namespace: str,
    spec: Spec,
    *,
    dry_run: bool,
    restarts: bool,
    progress: Progress,
    warn: Callable[[str], None],
) -> tuple[ApplyReport, ClusterSession]:
    """See `Cluster.apply`; return the session as it is then, too."""
    from .actors.serve.applying import carry_out, known_deployment, plan_change
    from .actors.store.cluster_secret import router_key_of

    change = plan_change(known_deployment(namespace), spec, progress, warn)
    if dry_run:
        return change.report, session
    if change.report.restarts and not restarts:
        raise ClusterError(
            "parts of the cluster have to start anew for this, and the caller does not allow it: "
            + "; ".join(change.report.restarts)
        )
    carry_out(change, getpass.getuser(), progress)
    after, found = change.after, change.after.endpoint
    reachable = found is not None and session.monitoring is not None
    now = replace(
        session,
        monitoring=found.monitoring_url if found is not None and reachable else None,
        router=after.router,
        router_key=None if after.router is None else router_key_of(namespace),
        drain_s=spec.drain_s,
    )
    if now != session and is_noted(session):
        write_session(now)
    return change.report.model_copy(update={"applied": True}), now


def end_session(
    session: ClusterSession,
    join: Callable[[], str],
    drain_s: float | None,
    told: Callable[[str], None],
) -> None:
    """End the cluster that ``session`` describes, and no later one of its name.

    ``join`` connects to the cluster's Ray, and returns the namespace. ``drain_s`` and ``told`` are
    those of `actors.serve.ending.end_cluster`. Raises ClusterError if it may still run.
    """
    if not session.alive:
        if session.embedded:
            return  # it has ended with its Ray
        raise ClusterError(
            f"cluster {session.name!r}: nothing answers at {session.ray_address}, the address of "
            "its Ray; try again when it is back"
        )
    from .actors.runtime.embedded_ray import EmbeddedRay, end_embedded

    own_ray = None
    if session.ray_folder is not None:
        own_ray = EmbeddedRay(session.ray_address, Path(session.ray_folder))
        if not session.answers:
            log.warning("cluster %s is ended with its Ray, whose GCS is gone", session.name)
            end_embedded(own_ray.folder)
            return
    namespace = join()
    from .actors.serve.ending import end_cluster
    from .actors.store.durable_state import stored_deployment

    found = stored_deployment(namespace)
    if found is None or found.id == session.id:
        end_cluster(session.name, own_ray, drain_s, told)
    else:
        log.warning("cluster %s has ended; another one of this name runs there", session.name)
