"""On which machine a host starts, and starts again.

Ray would place a killed host's next process anywhere. The memory of its experts is on its own
machine, so hosts that lend are placed by this rule instead, and Ray keeps to it while the machine
lives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class PoolNode:
    """A machine of the Ray cluster, with all that it has."""

    id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


class PlacedHost(NamedTuple):
    """A host that was placed on a node, and what it reserves there."""

    node: str
    resources: Mapping[str, float]


def choose_node(
    nodes: Sequence[PoolNode],
    placed: Sequence[PlacedHost],
    wanted: Mapping[str, float],
    labels: Mapping[str, str],
) -> str | None:
    """Return the node that has the labels, room beside ``placed``, and the fewest of these hosts.

    None: there is no such node, and the host waits for one. ``labels`` are a label selector of Ray:
    a value, ``!value``, ``in(a,b)`` or ``!in(a,b)`` for each key.
    """
    hosts = Counter(host.node for host in placed)
    able = [
        node
        for node in nodes
        if all(_matches(node.labels.get(key), rule) for key, rule in labels.items())
        and all(
            node.resources.get(name, 0.0) - _taken(placed, node.id, name) >= amount
            for name, amount in wanted.items()
            if amount > 0
        )
    ]
    return min(able, key=lambda node: (hosts[node.id], node.id)).id if able else None


def _taken(placed: Sequence[PlacedHost], node: str, resource: str) -> float:
    return sum(host.resources.get(resource, 0.0) for host in placed if host.node == node)


def _matches(value: str | None, rule: str) -> bool:
    allowed = rule.removeprefix("!")
    if allowed.startswith("in(") and allowed.endswith(")"):
        found = value in [one.strip() for one in allowed[3:-1].split(",")]
    else:
        found = value == allowed
    return found != rule.startswith("!")
