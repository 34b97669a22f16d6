"""`moesaic.connect`: to a cluster by its name, or to a router service by its address."""

from __future__ import annotations

import logging
from typing import Any

from .proto.errors import ClusterError
from .session import ClusterSession, find_session, need_session, this_process

log = logging.getLogger(__name__)


def connect(target: str = "local") -> Any:
    """Return a `Cluster` for a cluster's name, or a `RouterClient` for moesaic://host:port.

    The cluster is one that another process of this user owns on this machine, or one of the Ray
    that runs on this machine. The router service's key is in the session file of a cluster on this
    machine; for one elsewhere it is MOESAIC_ROUTER_KEY of the environment. Raises ClusterError,
    RequestError for a malformed address, and Unauthenticated without a key.
    """
    if "://" in target:
        from .clients.router_client import RouterClient

        return RouterClient(target)
    from .handle import connect as connect_by_name

    return connect_by_name(target)


def running_cluster(name: str) -> ClusterSession:
    """Return the running cluster of that name.

    It is one with a session file of this user, or else one on the Ray that `ray start` has started
    here or RAY_ADDRESS names; Ray Serve may have deployed it there. Raises ClusterError.
    """
    if find_session(name) is None:
        from .actors.runtime.joining import ray_is_here

        if ray_is_here() and (found := _on_ray(name)) is not None:
            return found
    return need_session(name)


def _on_ray(name: str) -> ClusterSession | None:
    from .actors.serve.found import find_cluster

    try:
        found = find_cluster(name)
    except ClusterError as error:
        log.warning("cluster %s is not looked for on the Ray that is here: %s", name, error)
        return None
    if found is None:
        return None
    deployment, (pid, started) = found.deployment, this_process()
    place = deployment.endpoint
    return ClusterSession(
        name=deployment.spec.name,
        id=deployment.id,
        pid=pid,
        started=started,
        ray_address=found.ray_address,
        ray_insecure=True,  # this process has joined it already
        url=None if place is None else place.url,
        monitoring=None if place is None else place.monitoring_url,
        router=deployment.router,
        router_key=None if deployment.router is None else found.router_key,
        operator_key=found.operator_key,
        logs=found.logs,
        drain_s=deployment.spec.drain_s,
    )
