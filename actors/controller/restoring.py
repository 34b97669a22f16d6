"""What a controller knows when it starts: the cluster as it is stored, and its predecessor's state.

The placement itself is not stored: the controller takes it from what the hosts hold.
"""

from __future__ import annotations

from typing import NamedTuple

from ...cluster.control.control import Control
from ...cluster.scaling.fleet import Fleet
from ...cluster.spec.deployment import Deployment
from ...proto.errors import ClusterError
from ..runtime.ray_border import cluster_of
from ..store.durable_state import (
    stored_asleep,
    stored_constraints,
    stored_deployment,
    stored_fleet,
    stored_history,
    stored_updates,
)


class Restored(NamedTuple):
    """A controller's beginning."""

    deployment: Deployment
    control: Control
    fleet: Fleet
    first: dict[str, int]  # the group of each host that the spec itself asks for
    follows_another: bool  # another controller has had the cluster before


def restore(namespace: str, term: int, now: float) -> Restored:
    """Read everything that is stored. Raises ClusterError."""
    deployment = stored_deployment(namespace)
    if deployment is None:
        raise ClusterError(f"cluster {cluster_of(namespace)!r}: nothing says what it is to be")
    spec = deployment.spec
    groups = [group.fleet for group in spec.hosts]
    policy, pending_s = spec.autoscale.policy, spec.autoscale.pending_s
    first = Fleet(groups, policy, pending_s=pending_s).desired()
    fleet = Fleet(groups, policy, pending_s=pending_s, kept=stored_fleet(namespace))
    control = Control(fleet.pool_hosts(), term=term, policy=spec.balance.policy)
    fleet.take_over(control)
    control.set_constraints(stored_constraints(namespace))
    control.idle_models.keep_asleep(stored_asleep(namespace))
    changes, passed_s = stored_history(namespace)
    control.changes.restore(changes, now, passed_s=passed_s)
    updates = stored_updates(namespace, term)
    if updates is not None:
        control.restore(updates)
    return Restored(deployment, control, fleet, first, updates is not None)
