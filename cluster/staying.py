"""Experts on hosts that are to leave, for which no other host has room: they stay where they are.

A plan puts nothing on hosts that leave, so what fits nowhere else would stand nowhere in it; and
when such a host died, nobody would load it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .placement import ExpertKey, LayerKey, LayerPlacement, ModelShape, Replica
from .plan import Plan, PoolHost


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
