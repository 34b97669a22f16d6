"""Ending the cluster of a session, from whatever process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from .proto.errors import ClusterError
from .session import ClusterSession

log = logging.getLogger(__name__)


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
