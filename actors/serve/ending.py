"""End a cluster, from whatever process: hosts, controller, trunks, ingress, router service.

What has ended already is passed over, so an end that was interrupted is finished by the next one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection
from typing import Any

import ray

from ...proto.errors import ClusterError
from ..controller.host_provisioner import end_hosts, host_names
from ..router_service.service_actor import NAME as ROUTER_SERVICE
from ..runtime.embedded_ray import EmbeddedRay, end_embedded
from ..runtime.placement_groups import release
from ..runtime.ray_border import CONTROLLER, namespace_of, others_on_ray
from ..store.durable_state import forget_all
from .draining import drain
from .end_at_once import is_over
from .serve_border import LEAVE_S, leave_serve, serves

log = logging.getLogger(__name__)


def end_cluster(
    name: str,
    own_ray: EmbeddedRay | None,
    drain_s: float | None = None,
    told: Callable[[str], None] = log.info,
    keep: Collection[str] = (),
) -> None:
    """End all actors and release all resources, even when ending one fails or is interrupted.

    With ``drain_s`` new requests are refused first, and running ones have that many seconds to
    finish; ``told`` receives the progress line by line. ``own_ray`` is Moesaic's own Ray, which
    ends with the last cluster on it. Without ``drain_s`` nothing is waited for. Applications of
    ``keep`` are Serve's to end.
    """
    log.info("cluster %s ends", name)
    namespace = namespace_of(name)
    # A Ray of Moesaic's own takes trunks and ingress along when it ends.
    ray_ends = own_ray is not None and not others_on_ray(namespace)
    try:
        served = serves(name)
    except ClusterError as error:
        # It may: what does not answer keeps no other part from its end.
        log.warning("cluster %s: %s", name, error)
        served = True
    with contextlib.ExitStack() as last_first:
        last_first.callback(is_over, namespace)
        if own_ray is not None:
            last_first.callback(end_own_ray, own_ray, namespace)
        last_first.callback(release, namespace)
        last_first.callback(forget_all, namespace)
        last_first.callback(_end_hosts, namespace)
        for actor in (CONTROLLER, ROUTER_SERVICE):
            last_first.callback(_end_actor, actor, namespace)
        if served and not ray_ends:
            patience_s = 0.0 if drain_s is None else LEAVE_S
            last_first.callback(leave_serve, name, patience_s=patience_s, keep=keep)
        if drain_s is not None:
            drain(
                drain_s=drain_s,
                app=namespace if served else None,
                router_service=_actor(ROUTER_SERVICE, namespace),
                told=told,
            )


def end_leftovers(namespace: str) -> None:
    """End what an earlier cluster of this name has left, whose end was cut off."""
    for part in (CONTROLLER, ROUTER_SERVICE):
        _end_actor(part, namespace)
    _end_hosts(namespace)
    release(namespace)


def end_own_ray(own_ray: EmbeddedRay, namespace: str) -> None:
    """End a Ray of Moesaic's own, unless there is another cluster than that of ``namespace``."""
    if not others_on_ray(namespace):
        end_embedded(own_ray.folder)


def _end_hosts(namespace: str) -> None:
    # The controller may have been starting one when it was ended.
    while left := host_names(namespace):
        end_hosts(namespace, sorted(left))


def _end_actor(actor: str, namespace: str) -> None:
    if (handle := _actor(actor, namespace)) is not None:
        ray.kill(handle, no_restart=True)


def _actor(actor: str, namespace: str) -> Any:
    try:
        return ray.get_actor(actor, namespace=namespace)
    except ValueError:
        return None
