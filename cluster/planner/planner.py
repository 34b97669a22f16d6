"""The planner: a pure function from loads, hosts and the current placement to a better one.

It pursues four aims in the order of their weight: every expert has a replica; every expert survives
the loss of as many failure domains as the policy says; operators' constraints are granted; layers
that are not balanced enough are improved, the worst first, within the budget and as long as each
move saves more time than its bytes cost. A layer that is balanced enough keeps its replicas, and
only its shares follow the load. While a run trains a model, its replicas cost bytes in every step;
they are made only if they save more than that, and those that do not any more are given back.

Shapes: E experts of one layer, H hosts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..expert_keys import LayerKey
from ..placement import LayerPlacement, ModelShape
from .moves import EvaluatedStep, Step
from .plan import OperatorConstraints, Plan, PlannerPolicy, PoolHost
from .plan_builder import UNLIMITED, PlanBuilder
from .protection import protect
from .search import LayerSearch
from .upkeep import ReplicaUpkeep

# Intermediate aims: all layers reach each of these balancednesses before any is improved further.
_LADDER = (0.6, 0.8)


def plan(
    *,
    models: Sequence[ModelShape],
    hosts: Sequence[PoolHost],
    current: Mapping[LayerKey, LayerPlacement],
    loads: Mapping[LayerKey, np.ndarray],
    policy: PlannerPolicy,
    constraints: OperatorConstraints | None = None,
    upkeep: ReplicaUpkeep | None = None,
) -> Plan:
    """Plan a placement for ``loads``, an array (E,) for each layer in the unit of hosts' speeds.

    ``upkeep`` is what replicas of the model cost that a run trains now; None: there is no run.
    Hosts that are gone are simply missing from ``hosts``. Layers without load count as evenly
    loaded. Raises ValueError if no host is left to place experts on.
    """
    builder = PlanBuilder(
        models, hosts, current, loads, policy, constraints or OperatorConstraints(), upkeep
    )
    # Step 1: give every expert a replica.
    _place(builder)
    # Step 2: protect every expert as the policy says, and grant operators' constraints.
    protect(builder)
    _grant(builder)
    # Step 3: improve the layers that are not balanced enough, the worst first.
    _balance(builder)
    # Step 4: give back replicas that cost a training run more than they bring.
    _give_back(builder)
    return builder.result()


def _place(builder: PlanBuilder) -> None:
    """Give every expert without a replica one, or note it as unplaced."""
    _chain(builder)
    missing = [
        (key, int(expert))
        for key, search in builder.searches.items()
        for expert in np.flatnonzero(~search.held_EH.any(axis=1))
    ]
    # Layer by layer, since a layer's experts are spread by that layer's load alone; the heaviest
    # expert first, as in longest-processing-time-first scheduling.
    missing.sort(key=lambda one: (one[0], -builder.searches[one[0]].load_E[one[1]]))
    for key, expert in missing:
        known = builder.current.get(key)
        if known is None:
            kind, why = "place", f"{key.model} is new"
        elif any(r.host in builder.constraints.leaving for r in known.replicas[expert]):
            kind, why = "drain", "its host is leaving"
        else:
            kind, why = "restore", "no host holds it"
        if not builder.add(key, expert, kind, why):
            builder.unplaced.append(key.expert(expert))


def _chain(builder: PlanBuilder) -> None:
    """Place the hottest experts of new layers several times, as a chain around the ring of hosts.

    This uses the slots that new layers do not need. Each hot expert stands on neighbouring hosts,
    and the next one begins on the last of these, so any host can hand load on around the whole
    ring, and later shifts of the load cost few moves. (Jordan and Graves, "Principles on the
    Benefits of Manufacturing Process Flexibility", 1995: a long chain is worth nearly as much as
    full flexibility.)
    """
    hosts = len(builder.hosts)
    fresh = [
        key
        for key, search in builder.searches.items()
        if not search.held_EH.any()
        and np.ptp(search.load_E) > 0
        and not search.is_light
        and search.upkeep_EH is None
    ]
    lacking = {
        key: int((~search.held_EH.any(axis=1)).sum()) for key, search in builder.searches.items()
    }
    if not fresh or hosts < 2 or builder.policy.redundancy:
        return
    # How many replicas fit on each host, counted with the largest expert of the new layers.
    most = max(builder.searches[key].expert_bytes for key in fresh)
    free_H = (
        builder.free.slots_H
        if not most
        else np.minimum(builder.free.slots_H, builder.free.bytes_H // most)
    )
    # Without bounds there is no number of spare slots.
    if free_H.max() >= UNLIMITED // max(most, 1):
        return
    # What is left for each new layer after the first replica of every expert that lacks one.
    spare = (int(free_H.sum()) - sum(lacking.values())) // len(fresh)
    host = 0
    for key in fresh:
        search = builder.searches[key]
        for expert, copies in _copies(search.load_E, spare, hosts):
            for place in range(copies):
                step = Step(((expert, (host + place) % hosts),))
                if builder.free.fits(search.expert_bytes)[(host + place) % hosts]:
                    kind = "spare" if place else "place"
                    builder.note(key, step, kind, f"{key.model} is new, and this expert is hot")
                    builder.apply(search, step)
            # The next expert begins on the last host of this one, which links the two.
            host += copies - 1


def _copies(load_E: np.ndarray, spare: int, hosts: int) -> list[tuple[int, int]]:
    """Return (expert, number of replicas) for the experts with several, the hottest first.

    Each of the ``spare`` replicas goes to the expert with the largest load per replica. What that
    makes of replicas beyond one on each of the ``hosts`` is not used: an expert that stands on all
    of them evens out the others, and the free slots serve later moves.
    """
    copies_E = np.ones(len(load_E), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    for _ in range(spare):
        _, expert = heapq.heappop(heap)
        copies_E[expert] += 1
        heapq.heappush(heap, (-float(load_E[expert]) / float(copies_E[expert]), expert))
    copies_E = np.minimum(copies_E, hosts)
    return [(int(e), int(copies_E[e])) for e in np.argsort(-load_E) if copies_E[e] > 1]


def _grant(builder: PlanBuilder) -> None:
    """Add the replicas that operators pinned, and those that experts lack to their minimum."""
    for key, search in builder.searches.items():
        for expert, host in np.argwhere(search.constraints.pinned_EH & ~search.held_EH):
            among_H = np.arange(len(builder.hosts)) == host
            builder.add(
                key,
                int(expert),
                "constraint",
                "an operator pinned it to this host",
                among_H=among_H,
            )
        lacking_E = search.constraints.min_replicas_E - search.held_EH.sum(axis=1)
        for expert in np.flatnonzero((lacking_E > 0) & search.held_EH.any(axis=1)):
            for _ in range(int(lacking_E[expert])):
                least = search.constraints.min_replicas_E[expert]
                if not builder.add(
                    key, int(expert), "constraint", f"it needs at least {least} replicas"
                ):
                    break


def _balance(builder: PlanBuilder) -> None:
    """Improve the layers below ``rebalance_below``, step by step up to the policy's ``target``."""
    lacking = [
        key for key, s in builder.searches.items() if s.retarget(builder.policy.rebalance_below) > 0
    ]
    budget = UNLIMITED if builder.policy.budget is None else builder.policy.budget
    # Low aims first: under them only the busiest hosts have excess, so the budget goes to the worst
    # hosts of all layers before any layer is perfected.
    for aim in (*(aim for aim in _LADDER if aim < builder.policy.target), builder.policy.target):
        budget = _climb(builder, lacking, aim, budget)


def _climb(builder: PlanBuilder, keys: list[LayerKey], aim: float, budget: int) -> int:
    """Improve the layers up to ``aim``, and return what is left of the budget.

    Each round takes one step in the layer with the largest excess. A layer for which no step pays
    is not looked at again under this aim.
    """
    heap = [(-builder.searches[key].retarget(aim), key) for key in keys]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0 and budget > 0:
        _, key = heapq.heappop(heap)
        search = builder.searches[key]
        found = search.improve(budget) or _displace(builder, key, search, budget)
        if found is None or not _pays(builder, search, found.step):
            continue
        builder.note(key, found.step, "balance", _reason(builder, search, found.step))
        search.accept(found)
        budget -= len(found.step.adds)
        heapq.heappush(heap, (-search.excess_part, key))
    return budget


def _reason(builder: PlanBuilder, search: LayerSearch, step: Step) -> str:
    """Say which host exceeds its capacity most, and how much of the excess the step removes."""
    assert search.split is not None
    hot = int(np.argmax(search.split.excess_H / builder.speed_H))
    part = 100 / float(search.load_E.sum())
    return (
        f"{builder.names[hot]} exceeds its target by {part * search.split.excess_H[hot]:.1f} % of "
        f"the layer's load; this takes {part * step.gain:.1f} % off such hosts"
    )


def _pays(builder: PlanBuilder, search: LayerSearch, step: Step) -> bool:
    """Return whether a step saves at least as many host-seconds as loading its replicas takes.

    Saved: what it gains beyond their upkeep / mean speed, for the ``horizon_s`` that the load is
    assumed to last. Loading: bytes / bytes per second.
    """
    saved_s = step.net / float(builder.speed_H.mean()) * builder.policy.horizon_s
    return saved_s >= len(step.adds) * _loading_s(builder, search)


def _loading_s(builder: PlanBuilder, search: LayerSearch) -> float:
    return search.expert_bytes / builder.policy.loading_bytes_per_s


def _give_back(builder: PlanBuilder) -> None:
    """Drop replicas whose upkeep costs more, for as long as the load lasts, than they bring.

    The difference must exceed what loading them again would take. Without a budget for moves
    nothing is known of the load, and all stay.
    """
    if builder.upkeep is None or builder.policy.budget == 0:
        return
    for search in builder.searches.values():
        if search.upkeep_EH is None:
            continue
        worth = _loading_s(builder, search) / builder.policy.horizon_s
        search.retarget(builder.policy.target)
        while (found := search.unneeded(worth * float(builder.speed_H.mean()))) is not None:
            search.accept(found)


def _displace(
    builder: PlanBuilder, key: LayerKey, search: LayerSearch, budget: int
) -> EvaluatedStep | None:
    """Find a step that pays, and uses a slot which a colder layer of another model can spare.

    The other layer's replica is already dropped when a step is returned, and is put back otherwise.
    """
    for host in search.wanted_hosts():
        for other in _colder(builder, key, search):
            lent = other.lend(host)
            if lent is None:
                continue
            found = search.improve(budget)
            uses = found is not None and any(h == host for _, h in found.step.adds)
            if found is not None and uses and _pays(builder, search, found.step):
                return found
            other.take_back(lent)
    return None


def _colder(builder: PlanBuilder, key: LayerKey, search: LayerSearch) -> Iterator[LayerSearch]:
    """Yield up to four layers of other models with less load, the coldest first."""
    others = [
        (float(other.load_E.sum()), other_key)
        for other_key, other in builder.searches.items()
        if other_key.model != key.model and other.load_E.sum() < search.load_E.sum()
    ]
    for _, other_key in sorted(others)[:4]:
        yield builder.searches[other_key]
