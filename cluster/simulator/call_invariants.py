"""Invariants of every call in a simulated pool; see `invariants.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .trace_events import Accepted, Ended, Sent, Wrote

if TYPE_CHECKING:
    from .world import World

# A call may end this many seconds after its deadline, because it waits for one more event.
_GRACE_S = 0.05


def accepted_once(fact: Accepted) -> str:
    """Check that no assignment of a call is answered twice."""
    accepted = fact.call.accepted
    if len(set(accepted)) == len(accepted):
        return ""
    return f"{fact.router.name}: assignments {fact.assignments.tolist()} again, by call {fact.seq}"


def whole(fact: Ended) -> str:
    """Check that each assignment of a call was either answered once or lost."""
    wanted = set(np.flatnonzero(fact.call.ids_TK.reshape(-1) >= 0).tolist())
    accepted, lost = fact.call.accepted, fact.lost.tolist()
    if sorted(accepted + lost) == sorted(wanted):
        return ""
    return f"{fact.router.name}: of {sorted(wanted)} accepted {accepted}, lost {lost}"


def lost_late(fact: Ended, now: float) -> str:
    """Check that a call has no error, and that no assignment was lost before its token's time."""
    if fact.error:
        return f"{fact.router.name}: refused for good: {fact.error}"
    until_T = fact.call.until_T
    for choice in fact.lost.tolist():
        early_s = float(until_T[choice // fact.call.ids_TK.shape[1]]) - now
        if early_s > 0:
            return f"{fact.router.name}: assignment {choice} is lost {early_s:.3f} s too early"
    return ""


def end_in_time(world: World) -> str:
    """Check that no call goes on after its deadline."""
    now = world.clock.now
    for router in world.routers.values():
        for call in [] if router.frozen else router.calls.values():
            if now > max(call.deadline, router.woke_at) + _GRACE_S:
                return f"{router.name}: a call goes on {now - call.deadline:.3f} s too long"
    return ""


def slot_is_free(fact: Sent) -> str:
    """Check that a call goes into a slot into which no answer can still be written."""
    if not fact.still_owed:
        return ""
    return (
        f"{fact.connection.name}: call {fact.seq} goes into slot {fact.slot}, into which the "
        f"host may still write the answer to {list(fact.still_owed)}"
    )


def one_version(fact: Sent) -> str:
    """Check that all sends of a call name the same version of an expert."""
    call = fact.call
    for key, version in fact.weights:
        before = call.versions.setdefault(key, version)
        if before != version:
            return f"{fact.router.name}: a call uses versions {before} and {version} of {key}"
    return ""


def wrote_own(fact: Wrote) -> str:
    """Check that a host wrote an answer into a slot that no other call uses by now."""
    if fact.used_for in (None, fact.seq):
        return ""
    return (
        f"{fact.connection.name}: the answer to {fact.seq} was written into slot {fact.slot}, "
        f"which call {fact.used_for} uses"
    )


def read_its_own(fact: Accepted) -> str:
    """Check that a router read the answer to its own call."""
    own = isinstance(fact.read, tuple) and fact.read[1] == fact.seq
    return "" if own else f"{fact.router.name}: call {fact.seq} read {fact.read}"
