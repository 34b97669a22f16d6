"""What a controller knows when it starts: the cluster as it is stored, and its predecessor's state.

The placement itself is not stored: the controller takes it from what the hosts hold.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from ...cluster.control.control import Control
from ...cluster.scaling.fleet import Fleet
from ...cluster.spec.deployment import Deployment
from ...cluster.update_folder import UpdateFolder
from ...proto.errors import CheckpointError, ClusterError
from ..runtime.ray_border import cluster_of
from ..store.durable_state import (
    stored_asleep,
    stored_constraints,
    stored_deployment,
    stored_fleet,
    stored_history,
    stored_updates,
)

log = logging.getLogger(__name__)


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
    groups = {number: group.fleet for number, group in deployment.groups.items()}
    own = {number: groups[number] for number in deployment.order}
    policy, pending_s = spec.autoscale.policy, spec.autoscale.pending_s
    first = Fleet(own, policy, pending_s=pending_s).desired()
    fleet = Fleet(
        groups,
        policy,
        pending_s=pending_s,
        order=deployment.order,
        kept=stored_fleet(namespace),
    )
    control = Control(fleet.pool_hosts(), term=term, policy=spec.balance.policy)
    fleet.take_over(control)
    # The controller before may have died before its hosts followed what it had stored.
    fleet.follow(control, groups, deployment.order, who="controller", now=now)
    control.set_constraints(stored_constraints(namespace))
    control.idle_models.keep_asleep(stored_asleep(namespace))
    changes, passed_s = stored_history(namespace)
    control.changes.restore(changes, now, passed_s=passed_s)
    updates = stored_updates(namespace, term)
    if updates is not None:
        control.restore(updates)
    return Restored(deployment, control, fleet, first, updates is not None)


def replay(control: Control, model: str, updates: str, *, lenient: bool) -> None:
    """Serve what the updates in a model's folder lead to.

    With ``lenient`` a folder that cannot be read is only logged: an earlier controller knew the
    updates, and serving goes on. Raises CheckpointError.
    """
    folder = UpdateFolder(updates, model)
    known = control.updates.last_number(model)
    try:
        found = folder.updates()
        if known is not None and known not in [one.number for one in found]:
            raise CheckpointError(f"{folder.path}: the record of update {known} is gone")
        control.updates.replay(model, found, folder.last_number())
    except CheckpointError as error:
        if not lenient:
            raise
        log.error("model %s: its updates cannot be read again: %s", model, error)
        return
    try:
        unused = folder.remove_unused()
    except OSError as error:
        log.warning("model %s: cannot tidy up %s: %s", model, folder.path, error)
    else:
        if unused:
            log.info("model %s: deleted weights of updates that never ended: %s", model, unused)
