"""Room for experts: what hosts without bounds of their own get, how few hosts will do, and what
becomes of experts on leaving hosts for which there is no room elsewhere.

A plan puts nothing on hosts that leave, so what fits nowhere else would stand nowhere in it; and
when such a host died, nobody would load it again. Such experts stay where they are (`let_stay`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, Replica
from .plan import Plan, PoolHost

# Room beside what models need, for replicas of hot experts, where a host's slots are not given.
_HEADROOM = 1.25


def with_room(
    hosts: Sequence[PoolHost],
    models: Collection[ModelShape],
    *,
    redundancy: int,
    leaving: Collection[str],
    held: Mapping[str, int],
) -> list[PoolHost]:
    """Hosts without slots and memory get an even part of what models need, and some more; never
    less than what they have (``held``), so that a pool that grew can still exchange replicas."""
    needed = sum(_copies(shape, redundancy) for shape in models)
    staying = max(1, sum(host.name not in leaving for host in hosts))
    slots = int(np.ceil(_HEADROOM * needed / staying)) + 1
    return [
        replace(host, slots=max(slots, held.get(host.name, 0)))
        if host.slots is None and host.memory_bytes is None
        else host
        for host in hosts
    ]


def lack(hosts: Sequence[PoolHost], models: Collection[ModelShape], *, redundancy: int) -> str:
    """Why ``hosts`` alone cannot hold the models; empty if they can."""
    if not hosts:
        return "no host would be left"
    most = max((shape.replicas for shape in models), default=1)
    if len(hosts) < most:
        return f"models want {most} replicas of each expert, each on another host"
    domains = {host.domain or host.name for host in hosts}
    if models and len(domains) <= redundancy:
        return f"balance.redundancy {redundancy} needs {redundancy + 1} failure domains"
    if any(host.slots is None and host.memory_bytes is None for host in hosts):
        return ""
    # Each host's room in experts of the largest kind: less than there is, never more.
    expert_bytes = max((shape.expert_bytes for shape in models), default=0)
    room = sum(_room(host, expert_bytes) for host in hosts)
    needed = sum(_copies(shape, redundancy) for shape in models)
    if room < needed:
        return f"there would be room for {room} experts, and {needed} need it"
    return ""


def _copies(shape: ModelShape, redundancy: int) -> int:
    return sum(shape.experts.values()) * max(redundancy + 1, shape.replicas)


def _room(host: PoolHost, expert_bytes: int) -> int:
    rooms = [] if host.slots is None else [host.slots]
    if host.memory_bytes is not None:
        rooms.append(host.memory_bytes // max(expert_bytes, 1))
    return min(rooms)


def let_stay(
    found: Plan,
    *,
    models: Sequence[ModelShape],
    hosts: Sequence[PoolHost],
    leaving: frozenset[str],
    current: Mapping[LayerKey, LayerPlacement],
) -> Plan:
    """The plan with its unplaced experts on the hosts that are to leave: where they stand, or else
    where most is free. They are named as unplaced all the same, and leave with the next plan that
    has room for them."""
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
            and (
                host.memory_bytes is None or held_bytes[name] + size[key.model] <= host.memory_bytes
            )
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
