"""End a cluster of this process at once, even while it is starting or ending.

It asks nothing and waits for nothing. Any thread may call it, also several times.
"""

from __future__ import annotations

from contextlib import ExitStack

import ray

from ...cluster.spec.spec import Spec
from ..runtime.embedded_ray import kill_embedded
from ..runtime.placement_groups import release
from ..runtime.ray_border import CONTROLLER, kill_named, named_actors, namespace_of
from ..store.durable_state import forget_all
from .serve_border import leave_serve

# Namespaces in which this process started something, or was about to. Clusters of other owners may
# be on the same Ray and are left alone.
_begun: set[str] = set()
_ROUNDS = 10


def begins(namespace: str) -> None:
    """Note that this process owns what is in ``namespace`` from now on."""
    _begun.add(namespace)


def is_over(namespace: str) -> None:
    """Note that nothing is left in ``namespace``."""
    _begun.discard(namespace)


def end_at_once(spec: Spec) -> None:
    """Kill all processes of the cluster, and remove its state from a Ray that others share."""
    if spec.ray.address == "local":
        kill_embedded()
        return
    namespace = namespace_of(spec.name)
    if namespace not in _begun or not ray.is_initialized():
        return
    with ExitStack() as last_first:
        last_first.callback(is_over, namespace)
        last_first.callback(forget_all, namespace)
        last_first.callback(release, namespace)
        last_first.callback(leave_serve, spec.name, patience_s=0.0)
        last_first.callback(_kill_all, namespace)


def _kill_all(namespace: str) -> None:
    # The controller first, and all until none is left: it may be starting hosts.
    kill_named(namespace, CONTROLLER)
    for _ in range(_ROUNDS):
        if not named_actors(namespace):
            return
        kill_named(namespace)
