"""Every expert survives the loss of hosts whenever the slots allow it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesaic.cluster.expert_keys import ExpertKey, LayerKey
from moesaic.cluster.placement import LayerPlacement, ModelShape, Replica
from moesaic.cluster.planner.balance import balancedness, even_split
from moesaic.cluster.planner.plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from moesaic.cluster.planner.planner import plan
from tests.helpers.effort import tries

M = "m"


def domain(host: PoolHost) -> str:
    return host.domain or host.name


def allowed(hosts: list[PoolHost], experts: int, domains: int) -> bool:
    """Whether ``experts`` fit into so many domains each: Gale's and Ryser's condition, where
    every expert needs as many."""
    slots: Counter[str] = Counter()
    for host in hosts:
        slots[domain(host)] += host.slots or 0
    return sum(min(count, experts) for count in slots.values()) >= domains * experts


def domains_of(found: Plan, hosts: list[PoolHost]) -> dict[ExpertKey, set[str]]:
    by_name = {host.name: domain(host) for host in hosts}
    return {
        key.expert(expert): {by_name[replica.host] for replica in replicas}
        for key, layer in found.layers.items()
        for expert, replicas in enumerate(layer.replicas)
    }


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=tries(120), deadline=None)
def test_every_expert_is_protected_whenever_the_slots_allow_it(seed: int, later: bool) -> None:
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 3)), int(rng.integers(1, 9))
    count, redundancy = int(rng.integers(2, 6)), int(rng.integers(1, 3))
    most = 2 * layers * experts * (redundancy + 1) // count + 2
    hosts = [
        PoolHost(
            name=f"h{n}",
            slots=int(rng.integers(1, most)),
            speed=float(rng.choice([0.5, 1, 2])),
            domain=str(rng.choice(["", "a", "b"])),
        )
        for n in range(count)
    ]
    assume(allowed(hosts, layers * experts, redundancy + 1))
    shape = ModelShape(model=M, experts=dict.fromkeys(range(layers), experts))
    current: dict[LayerKey, LayerPlacement] = {}
    for step in range(3):
        # With ``later`` every slot is taken already when protection is first asked for.
        asked = 0 if later and not step else redundancy
        found = plan(
            models=[shape],
            hosts=hosts,
            current=current,
            loads={LayerKey(M, layer): np.exp(rng.normal(size=experts)) for layer in range(layers)},
            policy=PlannerPolicy(redundancy=asked, horizon_s=1e9),
        )
        assert not found.unplaced
        assert not found.unprotected
        stand = domains_of(found, hosts).values()
        assert min(map(len, stand)) >= min(asked + 1, len({domain(host) for host in hosts}))
        used = Counter(r.host for la in found.layers.values() for e in la.replicas for r in e)
        assert all(used[host.name] <= (host.slots or 0) for host in hosts)
        current = dict(found.layers)


def test_others_make_room_for_what_lacks_a_domain() -> None:
    # Experts 0 and 1 stand in domain x alone, and the other domains are full of 2 and 3, of which
    # each needs two domains as well: they can give way only by going to x.
    hosts = [
        PoolHost(name="a", slots=2, domain="x"),
        PoolHost(name="b", slots=2),
        PoolHost(name="c", slots=2),
        PoolHost(name="d", slots=2, domain="x"),
    ]
    stand = (("a",), ("a", "d"), ("b", "c"), ("b", "c"))
    layer = LayerPlacement(
        tuple(tuple(Replica(host, 1 / len(names)) for host in names) for names in stand)
    )
    found = plan(
        models=[ModelShape(model=M, experts={0: 4})],
        hosts=hosts,
        current={LayerKey(M, 0): layer},
        loads={LayerKey(M, 0): np.ones(4)},
        policy=PlannerPolicy(redundancy=1, budget=0),
    )
    assert not found.unprotected
    assert all(
        len(domains) == 2 and "x" in domains for domains in domains_of(found, hosts).values()
    )
    assert {move.kind for move in found.moves} == {"protect"}
    assert any("makes room" in move.reason for move in found.moves)


@pytest.mark.parametrize(("slots", "unprotected"), [(1, 1), (2, 0)])
def test_pinned_experts_do_not_make_room(slots: int, unprotected: int) -> None:
    hosts = [
        PoolHost(name="a", slots=1),
        PoolHost(name="b", slots=slots),
        PoolHost(name="c", slots=1),
    ]
    stand = (("a",), ("b", "c"))
    layer = LayerPlacement(
        tuple(tuple(Replica(host, 1 / len(names)) for host in names) for names in stand)
    )
    pins = {ExpertKey(M, 0, expert): frozenset(names) for expert, names in enumerate(stand)}
    found = plan(
        models=[ModelShape(model=M, experts={0: 2})],
        hosts=hosts,
        current={LayerKey(M, 0): layer},
        loads={},
        policy=PlannerPolicy(redundancy=1, budget=0),
        constraints=OperatorConstraints(pins=pins),
    )
    assert len(found.unprotected) == unprotected
    assert [move.key.expert for move in found.moves] == [0] * (1 - unprotected)


def after_a_loss(found: Plan, hosts: list[PoolHost]) -> list[tuple[float, float]]:
    """For each host and layer, balancedness of the others once the host is gone: as routers go on
    by the shares that they know, and with the best shares."""
    names = [host.name for host in hosts]
    parts = []
    for layer in found.layers.values():
        share_EH = np.zeros((len(layer.replicas), len(hosts)))
        held_EH = np.zeros_like(share_EH, dtype=bool)
        for expert, replicas in enumerate(layer.replicas):
            for host, share in replicas:
                held_EH[expert, names.index(host)] = True
                share_EH[expert, names.index(host)] = share
        for lost in range(len(hosts)):
            left_EH, known_EH = np.delete(held_EH, lost, 1), np.delete(share_EH, lost, 1)
            known_EH = np.where(known_EH.any(axis=1, keepdims=True), known_EH, left_EH)
            going_on_H = (known_EH / known_EH.sum(axis=1, keepdims=True)).sum(axis=0)
            speed_H = np.ones(len(hosts) - 1)
            best_EH = even_split(left_EH, np.ones(len(left_EH)), speed_H)
            parts.append(
                (balancedness(going_on_H, speed_H), balancedness(best_EH.sum(axis=0), speed_H))
            )
    return parts


@pytest.mark.parametrize("count", [4, 8])
def test_what_a_host_leaves_behind_is_shared_by_all_others(count: int) -> None:
    """Were hosts each other's mirrors, one would get twice the load: 0.57 of 8 hosts."""
    hosts = [PoolHost(name=f"h{n}") for n in range(count)]
    shape = ModelShape(model=M, experts=dict.fromkeys(range(4), 8 * count))
    found = plan(
        models=[shape], hosts=hosts, current={}, loads={}, policy=PlannerPolicy(redundancy=1)
    )
    going_on, best = zip(*after_a_loss(found, hosts), strict=True)
    assert min(going_on) > 0.7
    assert min(best) > 0.95
