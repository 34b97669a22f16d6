"""Ending a cluster of this process at once, whatever the process is doing: starting it, ending it.

Nothing is asked and nothing is waited for. May be called in any thread, and again.
"""

from __future__ import annotations

from contextlib import ExitStack

import ray

from ...cluster.spec.spec import Spec
from ..runtime.durable_state import forget_all
from ..runtime.embedded_ray import kill_embedded
from ..runtime.ray_border import kill_named, namespace_of
from .serve_border import leave_serve

# Namespaces in which this process started something, or was about to: others' are left alone.
_begun: set[str] = set()


def begins(namespace: str) -> None:
    """From now on what is in ``namespace`` is this process's own."""
    _begun.add(namespace)


def is_over(namespace: str) -> None:
    """Nothing of it is left."""
    _begun.discard(namespace)


def end_at_once(spec: Spec) -> None:
    """Leave no process of the cluster, and nothing of it on a Ray that is not its own."""
    if spec.ray.address == "local":
        kill_embedded()
        return
    namespace = namespace_of(spec.name)
    if namespace not in _begun or not ray.is_initialized():
        return
    with ExitStack() as last_first:
        last_first.callback(is_over, namespace)
        last_first.callback(forget_all, namespace)
        last_first.callback(leave_serve, spec, patience_s=0.0)
        last_first.callback(kill_named, namespace)
