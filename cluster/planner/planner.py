"""The planner: from loads, hosts and the placement that stands to a better one, and the way there.

A pure function. It works in the order of what matters: every expert lives, every expert survives
the loss of hosts, what operators asked for stands, and then layers that are not balanced enough are
improved, the worst first, as far as the budget goes and moves pay for their bytes. A layer that is
balanced enough keeps its replicas; only the shares of its traffic follow the load.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..placement import LayerKey, LayerPlacement, ModelShape
from .moves import Found, Step
from .plan import Plan, Policy, PoolHost, Wishes
from .plan_builder import UNLIMITED, Draft
from .protection import protect
from .search import LayerSearch

# Balancedness that all layers reach before any goes on.
_LADDER = (0.6, 0.8)


def plan(
    *,
    models: Sequence[ModelShape],
    hosts: Sequence[PoolHost],
    current: Mapping[LayerKey, LayerPlacement],
    loads: Mapping[LayerKey, np.ndarray],
    policy: Policy,
    wishes: Wishes | None = None,
) -> Plan:
    """A placement for ``loads``: (E,) of each layer, in the unit of the hosts' speeds.

    Hosts that are gone are simply missing from ``hosts``. Layers without load count as evenly
    loaded. Raises ValueError when there is no host to place on.
    """
    draft = Draft(models, hosts, current, loads, policy, wishes or Wishes())
    # Step 1: every expert lives somewhere.
    _place(draft)
    # Step 2: every expert survives what the policy says, and operators have their way.
    protect(draft)
    _grant(draft)
    # Step 3: layers that are not balanced enough, the worst first.
    _balance(draft)
    return draft.result()


def _place(draft: Draft) -> None:
    _chain(draft)
    missing = [
        (key, int(expert))
        for key, search in draft.searches.items()
        for expert in np.flatnonzero(~search.held_EH.any(axis=1))
    ]
    # Each layer's heaviest first; a layer's experts spread by that layer's load alone.
    missing.sort(key=lambda one: (one[0], -draft.searches[one[0]].load_E[one[1]]))
    for key, expert in missing:
        known = draft.current.get(key)
        if known is None:
            kind, why = "place", f"{key.model} is new"
        elif any(r.host in draft.wishes.leaving for r in known.replicas[expert]):
            kind, why = "drain", "its host is leaving"
        else:
            kind, why = "restore", "nobody holds it"
        if not draft.add(key, expert, kind, why):
            draft.unplaced.append(key.expert(expert))


def _chain(draft: Draft) -> None:
    """Where there is more room than new layers need, their hottest experts stand several
    times, on neighbours in a ring of hosts: load can then be handed on all around it, and later
    shifts cost few moves. (Jordan and Graves, "Principles on the Benefits of Manufacturing Process
    Flexibility", 1995: a long chain is worth nearly as much as full flexibility.)"""
    hosts = len(draft.hosts)
    fresh = [
        key
        for key, search in draft.searches.items()
        if not search.held_EH.any() and np.ptp(search.load_E) > 0 and not search.is_light
    ]
    lacking = {
        key: int((~search.held_EH.any(axis=1)).sum()) for key, search in draft.searches.items()
    }
    if not fresh or hosts < 2 or draft.policy.redundancy:
        return
    most = max(draft.searches[key].expert_bytes for key in fresh)
    free_H = (
        draft.rooms.slots_H
        if not most
        else np.minimum(draft.rooms.slots_H, draft.rooms.bytes_H // most)
    )
    if free_H.max() >= UNLIMITED // max(most, 1):
        return
    spare = (int(free_H.sum()) - sum(lacking.values())) // len(fresh)
    host = 0
    for key in fresh:
        search = draft.searches[key]
        for expert, copies in _copies(search.load_E, spare):
            for place in range(min(copies, hosts)):
                step = Step(((expert, (host + place) % hosts),))
                if draft.rooms.fits(search.expert_bytes)[(host + place) % hosts]:
                    kind = "spare" if place else "place"
                    draft.note(key, step, kind, f"{key.model} is new, and this expert hot")
                    search.apply(step)
            # The next one begins where this one ends, which links them.
            host += copies - 1


def _copies(load_E: np.ndarray, spare: int) -> list[tuple[int, int]]:
    """(expert, replicas) of those with several, when each spare one goes to the expert with
    the largest load per replica."""
    copies_E = np.ones(len(load_E), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heapq.heappop(heap)
        copies_E[expert] += 1
        heapq.heappush(heap, (-float(load_E[expert]) / float(copies_E[expert]), expert))
    return [(int(e), int(copies_E[e])) for e in np.argsort(-load_E) if copies_E[e] > 1]


def _grant(draft: Draft) -> None:
    for key, search in draft.searches.items():
        for expert, host in np.argwhere(search.limits.pinned_EH & ~search.held_EH):
            among_H = np.arange(len(draft.hosts)) == host
            draft.add(key, int(expert), "wish", "it is pinned there", among_H=among_H)
        lacking_E = search.limits.least_E - search.held_EH.sum(axis=1)
        for expert in np.flatnonzero((lacking_E > 0) & search.held_EH.any(axis=1)):
            for _ in range(int(lacking_E[expert])):
                least = search.limits.least_E[expert]
                if not draft.add(key, int(expert), "wish", f"{least} replicas are asked for"):
                    break


def _balance(draft: Draft) -> None:
    lacking = [key for key, s in draft.searches.items() if s.aim(draft.policy.enough) > 0]
    budget = UNLIMITED if draft.policy.budget is None else draft.policy.budget
    # The busiest hosts of all layers first: a low aim leaves only them in excess.
    for aim in (*(aim for aim in _LADDER if aim < draft.policy.target), draft.policy.target):
        budget = _climb(draft, lacking, aim, budget)


def _climb(draft: Draft, keys: list[LayerKey], aim: float, budget: int) -> int:
    """Improve layers up to ``aim``; gives what is left of the budget."""
    heap = [(-draft.searches[key].aim(aim), key) for key in keys]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0 and budget > 0:
        _, key = heapq.heappop(heap)
        search = draft.searches[key]
        found = search.improve(budget) or _displace(draft, key, search, budget)
        if found is None or not _pays(draft, search, found.step):
            continue
        draft.note(key, found.step, "balance", _reason(draft, search, found.step))
        search.accept(found)
        budget -= len(found.step.adds)
        heapq.heappush(heap, (-search.excess_part, key))
    return budget


def _reason(draft: Draft, search: LayerSearch, step: Step) -> str:
    assert search.split is not None
    hot = int(np.argmax(search.split.excess_H / draft.speed_H))
    part = 100 / float(search.load_E.sum())
    return (
        f"{draft.names[hot]} has {part * search.split.excess_H[hot]:.1f} % of the layer's load "
        f"too much; this takes {part * step.gain:.1f} % off such hosts"
    )


def _pays(draft: Draft, search: LayerSearch, step: Step) -> bool:
    """Whether the host-seconds that a step saves, while the load lasts, exceed
    those of loading."""
    saved_s = step.gain / float(draft.speed_H.mean()) * draft.policy.horizon_s
    return saved_s >= len(step.adds) * search.expert_bytes / draft.policy.load_bytes_per_s


def _displace(draft: Draft, key: LayerKey, search: LayerSearch, budget: int) -> Found | None:
    """A step into a slot that another model does not need."""
    for host in search.wanted_hosts():
        for other in _colder(draft, key, search):
            lent = other.lend(host)
            if lent is None:
                continue
            found = search.improve(budget)
            if found is not None and any(h == host for _, h in found.step.adds):
                return found
            other.take_back(lent)
    return None


def _colder(draft: Draft, key: LayerKey, search: LayerSearch) -> Iterator[LayerSearch]:
    """Layers of other models with less load, the coldest first."""
    others = [
        (float(other.load_E.sum()), other_key)
        for other_key, other in draft.searches.items()
        if other_key.model != key.model and other.load_E.sum() < search.load_E.sum()
    ]
    for _, other_key in sorted(others)[:4]:
        yield draft.searches[other_key]
