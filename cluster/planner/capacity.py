"""Capacity for experts: default slots, whether hosts suffice, and experts that cannot leave.

A plan puts nothing on hosts that are leaving. An expert on such a host that fits nowhere else would
have no replica in the plan, and no host would load it again if its own host died.
`keep_unplaced_on_leaving` keeps such experts where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..expert_keys import ExpertKey, LayerKey
from ..placement import LayerPlacement, ModelShape, Replica
from .plan import Plan, PoolHost

# A host without given slots gets its even part of what models need times this factor; the rest is
# for additional replicas of hot experts.
_HEADROOM = 1.25


def with_default_slots(
    hosts: Sequence[PoolHost],
    models: Collection[ModelShape],
    *,
    redundancy: int,
    leaving: Collection[str],
    held: Mapping[str, int],
) -> list[PoolHost]:
    """Return the hosts, with slots for those that state neither slots nor memory.

    These get an even part of what the models need, and some more. They never get fewer slots than
    they hold replicas (``held``), so that a pool that grew can still exchange replicas.
    """
    needed = sum(_copies(shape, redundancy) for shape in models)
    staying = max(1, sum(host.name not in leaving for host in hosts))
    slots = int(np.ceil(_HEADROOM * needed / staying)) + 1
    return [
        replace(host, slots=max(slots, held.get(host.name, 0)))
        if host.slots is None and host.memory_bytes is None
        else host
        for host in hosts
    ]


def capacity_shortage(
    hosts: Sequence[PoolHost], models: Collection[ModelShape], *, redundancy: int
) -> str:
    """Return why ``hosts`` alone cannot hold the models; empty if they can."""
    if not hosts:
        return "no host would be left"
    most = max((shape.replicas for shape in models), default=1)
    if len(hosts) < most:
        return f"a model needs {most} replicas of each expert, each on another host"
    domains = {host.domain or host.name for host in hosts}
    if models and len(domains) <= redundancy:
        return f"balance.redundancy {redundancy} needs {redundancy + 1} failure domains"
    if any(host.slots is None and host.room_bytes is None for host in hosts):
        return ""
    # Count the room in experts of the largest size: that underestimates it, never the reverse.
    expert_bytes = max((shape.expert_bytes for shape in models), default=0)
    room = sum(_room(host, expert_bytes) for host in hosts)
    needed = sum(_copies(shape, redundancy) for shape in models)
    if room < needed:
        return f"the hosts would have room for {room} replicas, but {needed} are needed"
    return ""


def _copies(shape: ModelShape, redundancy: int) -> int:
    return sum(shape.experts.values()) * max(redundancy + 1, shape.replicas)


def _room(host: PoolHost, expert_bytes: int) -> int:
    free = [] if host.slots is None else [host.slots]
    if host.room_bytes is not None:
        free.append(host.room_bytes // max(expert_bytes, 1))
    return min(free)


def keep_unplaced_on_leaving(
    found: Plan,
    *,
    models: Sequence[ModelShape],
    hosts: Sequence[PoolHost],
    leaving: frozenset[str],
    current: Mapping[LayerKey, LayerPlacement],
) -> Plan:
    """Return the plan with its unplaced experts on hosts that are leaving.

    An expert stays where it is; one that is nowhere goes to the leaving host that holds the fewest
    unplaced experts. The plan still names them as unplaced, and the next plan with room for them
    moves them.
    """
    there = {host.name: host for host in hosts if host.name in leaving}
    if not found.unplaced or not there:
        return found
    size = {shape.model: shape.expert_bytes for shape in models}
    stand: dict[ExpertKey, list[str]] = {}
    for key in found.unplaced:
        layer = current.get(LayerKey(key.model, key.layer))
        known = layer.hosts(key.expert) if layer is not None else ()
        stand[key] = [host for host in known if host in there]
    held, held_bytes = Counter[str](), Counter[str]()

    def put(key: ExpertKey, host: str) -> None:
        held[host] += 1
        held_bytes[host] += size[key.model]

    for key, names in stand.items():
        for host in names:
            put(key, host)
    for key in [key for key, names in stand.items() if not names]:
        able = [
            name
            for name, host in there.items()
            if (host.slots is None or held[name] < host.slots)
            and (host.room_bytes is None or held_bytes[name] + size[key.model] <= host.room_bytes)
        ]
        if able:
            stand[key] = [min(able, key=lambda name: held[name])]
            put(key, stand[key][0])
    layers = dict(found.layers)
    for key, names in stand.items():
        where = LayerKey(key.model, key.layer)
        replicas = list(layers[where].replicas)
        replicas[key.expert] = tuple(Replica(host, 1 / len(names)) for host in names)
        layers[where] = replace(layers[where], replicas=tuple(replicas))
    return replace(found, layers=layers)
