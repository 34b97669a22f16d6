"""A cluster of which no session file tells; the Ray that runs here knows it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import ray

from ...cluster.spec.deployment import Deployment
from ...proto.errors import ClusterError
from ..runtime.joining import join
from ..runtime.ray_border import (
    log_folder,
    namespace_of,
    others_on_ray,
    ray_address,
)
from ..store.cluster_secret import router_key_of, secret_of
from ..store.durable_state import stored_deployment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FoundCluster:
    """A cluster on the Ray to which this process is connected."""

    deployment: Deployment
    ray_address: str
    router_key: str
    operator_key: str
    logs: str


def find_cluster(name: str) -> FoundCluster | None:
    """Join the Ray that runs here, and return its cluster of that name; None: it has no such one.

    If there is only one cluster, ``local`` means that one. Whoever asks can reach this Ray, so it
    is joined even if it asks for no token. Raises ClusterError.
    """
    joined = not ray.is_initialized()
    if joined:
        options = {"log_to_driver": False, "logging_level": logging.WARNING}
        join("auto", insecure=True, namespace=namespace_of(name), **options)
    there = others_on_ray("")
    if name not in there:
        if name != "local" or len(there) != 1:
            if joined:
                ray.shutdown()  # what this program starts later is on a Ray of its own choice
            return None
        (name,) = there
    namespace = namespace_of(name)
    deployment = stored_deployment(namespace)
    if deployment is None:
        raise ClusterError(f"cluster {name!r}: Ray has lost what it is to be; end it with `ray`")
    return FoundCluster(
        deployment,
        ray_address(),
        router_key_of(namespace),
        secret_of(namespace).operator_key,
        log_folder(),
    )
