"""Ray's placement groups of a cluster's hosts, which belong to no process."""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import GetTimeoutError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from ...cluster.spec.spec import HostGroup
from ...proto.errors import ClusterError

_GONE = "REMOVED"


def reserve(namespace: str, number: int, group: HostGroup, start_s: float) -> None:
    """Reserve what the hosts of a group need, one bundle for each. Raises ClusterError.

    ``number`` is the group's place in the spec. A group whose spec asks for none gets none.
    """
    if group.placement_group == "none":
        return
    bundle = {"CPU": group.num_cpus, "GPU": group.num_gpus, **group.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
    made = placement_group(
        [dict(bundle) for _ in range(group.count)],
        strategy=group.placement_group,
        name=_name(namespace, number),
        lifetime="detached",
    )
    try:
        ray.get(made.ready(), timeout=start_s)
    except GetTimeoutError:
        raise ClusterError(
            f"hosts: Ray could not reserve {group.count} x {bundle} ({group.placement_group}) "
            f"within {start_s:g} s (timeouts.start_s); Ray has {ray.cluster_resources()} in all: "
            "lower hosts.count or the group's resources, or add machines"
        ) from None


def reserved(namespace: str, number: int) -> PlacementGroup | None:
    """Return the placement group of a group of hosts, if it has one."""
    return dict(_groups(namespace)).get(_name(namespace, number))


def release(namespace: str) -> None:
    """Remove all placement groups of a cluster."""
    for _, group in _groups(namespace):
        remove_placement_group(group)


def _groups(namespace: str) -> list[tuple[str, PlacementGroup]]:
    # Ray finds a group by its name only in the namespace of the caller's own job.
    table: dict[str, Any] = placement_group_table()
    return [
        (entry["name"], PlacementGroup(PlacementGroupID(bytes.fromhex(number))))
        for number, entry in table.items()
        if entry["name"].startswith(_name(namespace)) and entry["state"] != _GONE
    ]


def _name(namespace: str, number: int | str = "") -> str:
    return f"{namespace}/hosts/{number}"
