"""Place every expert in enough failure domains.

An expert may find no free slot in any further domain. Then others make room: replicas move from
host to host along a path that ends at a slot that is free or holds a replica that can be dropped,
like an augmenting path in bipartite matching. An expert stays unprotected only if there is no such
path.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from ..expert_keys import LayerKey
from .moves import Step
from .plan_builder import PlanBuilder
from .search import LayerSearch


class _Hop(NamedTuple):
    """A replica that moves from one host to another."""

    key: LayerKey
    expert: int
    source: int
    target: int


def protect(builder: PlanBuilder) -> None:
    """Add replicas of experts that stand in too few domains, the rarest and hottest first."""
    # (domains, size) for which no slot was found: the search would fail again until a replica was
    # added somewhere.
    hopeless: set[tuple[frozenset[int], int]] = set()
    for key, expert in builder.unprotected():
        search = builder.searches[key]
        while len(taken := frozenset(builder.domains(search, expert))) <= builder.policy.redundancy:
            if (taken, search.expert_bytes) in hopeless:
                break
            fresh_H = ~np.isin(builder.domain_H, list(taken))
            if not _add(builder, key, expert, fresh_H):
                hopeless.add((taken, search.expert_bytes))
                break
            hopeless.clear()


def _add(builder: PlanBuilder, key: LayerKey, expert: int, among_H: np.ndarray) -> bool:
    """Add a replica on one of the hosts ``among_H``, (H,) bool; return False if nothing helps."""
    reason = "it is in too few failure domains"
    if builder.add(key, expert, "protect", reason, among_H=among_H):
        return True
    for hop in _path(builder, builder.searches[key].expert_bytes, among_H):
        if not _move(builder, hop):
            return False
    return builder.add(key, expert, "protect", reason, among_H=among_H)


def _path(builder: PlanBuilder, expert_bytes: int, wanted_H: np.ndarray) -> list[_Hop]:
    """Return the shortest chain of moves that frees a slot on one of the hosts ``wanted_H``.

    Breadth-first search over hosts, from the wanted ones: there is an edge from a host to each host
    that one of its replicas of this size may move to. The chain is in the order in which it is
    carried out, so the move into the free slot comes first. It is empty if there is no path.
    """
    searches = {k: s for k, s in builder.searches.items() if s.expert_bytes == expert_bytes}
    ends_H = builder.free.fits(expert_bytes)
    for search in searches.values():
        ends_H |= search.constraints.droppable(search.held_EH).any(axis=0)
    if not ends_H.any():
        return []
    reached: dict[int, _Hop | None] = {int(host): None for host in np.flatnonzero(wanted_H)}
    queue = deque(reached)
    while queue:
        source = queue.popleft()
        for key, search in searches.items():
            able_EH = _may_go(search, source)
            for target in np.flatnonzero(able_EH.any(axis=0)).tolist():
                if target in reached:
                    continue
                expert = int(np.argmax(able_EH[:, target]))
                reached[target] = hop = _Hop(key, expert, source, target)
                if ends_H[target]:
                    return _back(reached, hop)
                queue.append(target)
    return []


def _back(reached: dict[int, _Hop | None], last: _Hop) -> list[_Hop]:
    """Follow the path from its last hop back to the wanted host."""
    hops: list[_Hop] = []
    hop: _Hop | None = last
    while hop is not None:
        hops.append(hop)
        hop = reached[hop.source]
    return hops


def _may_go(search: LayerSearch, source: int) -> np.ndarray:
    """Return which experts may move from ``source`` to which hosts, (E, H) bool.

    An expert must stay in as many failure domains as before: the target is in the same domain, in
    one that the expert is not in yet, or the expert has another replica in the source's domain.
    """
    limits = search.constraints
    # in_domain_EH[e, h]: replicas of expert e in the failure domain of host h.
    in_domain_EH = np.stack(
        [search.held_EH[:, limits.domain_H == domain].sum(axis=1) for domain in limits.domain_H],
        axis=1,
    )
    same_H = limits.domain_H == limits.domain_H[source]
    apart_EH = same_H | (in_domain_EH == 0) | (in_domain_EH[:, [source]] > 1)
    movable_E = search.held_EH[:, source] & ~limits.pinned_EH[:, source]
    return movable_E[:, None] & ~search.held_EH & apart_EH


def _move(builder: PlanBuilder, hop: _Hop) -> bool:
    """Carry out one hop; return False if an earlier one has made it impossible."""
    search = builder.searches[hop.key]
    if not _may_go(search, hop.source)[hop.expert, hop.target]:
        return False
    among_H = np.arange(len(builder.hosts)) == hop.target
    reason = "it makes room for an expert that is in too few failure domains"
    if not builder.add(hop.key, hop.expert, "protect", reason, among_H=among_H):
        return False
    builder.apply(search, Step((), ((hop.expert, hop.source),)))
    return True
