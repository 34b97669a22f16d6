"""Invariants of every call in a simulated pool; see `invariants.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...proto.errors import ExpertUnavailable
from .experts import expected
from .trace_events import Ended, Sent, Wrote

if TYPE_CHECKING:
    from .world import World

# A call may end this many seconds after its deadline, because it waits for one more event.
_GRACE_S = 0.05


def right_sums(fact: Ended, world: World) -> str:
    """Check that each token has the sum of its experts, in the versions that its call began with.

    So each assignment was computed once, with whole weights of one version. Tokens that were lost
    have zeros.
    """
    call = fact.call
    wanted_TH = expected(call.key, call.ids_TK, call.versions, world.contents)
    dead = [row for row in call.dead if row < len(wanted_TH)]
    wanted_TH[dead] = 0.0
    wrong = np.flatnonzero((fact.result_TH != wanted_TH).any(axis=1)).tolist()
    if not wrong:
        return ""
    row = wrong[0]
    return (
        f"{fact.router.name}: token {row} of {call.key} with experts {call.ids_TK[row].tolist()} "
        f"has {fact.result_TH[row, 0]:g}, and {wanted_TH[row, 0]:g} is right"
    )


def lost_late(fact: Ended, now: float) -> str:
    """Check that a call has no error, and that no token was lost before its time."""
    for row, error in fact.call.lost.items():
        if not isinstance(error, ExpertUnavailable):
            return f"{fact.router.name}: token {row} was lost by {error.code}: {error}"
        early_s = float(fact.call.until_T[row]) - now
        if early_s > 1e-9:
            return f"{fact.router.name}: token {row} is lost {early_s:.3f} s too early"
    return ""


def end_in_time(world: World) -> str:
    """Check that no call goes on after its deadline."""
    now = world.clock.now
    for router in world.routers.values():
        for call in [] if router.frozen else router.calls:
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


def wrote_own(fact: Wrote) -> str:
    """Check that a host wrote an answer into a slot that no other call uses by now."""
    if fact.used_for in (None, fact.seq):
        return ""
    return (
        f"{fact.connection.name}: the answer to {fact.seq} was written into slot {fact.slot}, "
        f"which call {fact.used_for} uses"
    )
