"""Which hosts are ready, by the controller's probes of their listeners.

A host is ready while the controller lists it (its process has reported, and is not known to be
gone) and its listener has answered a probe lately. A probe is a call to the address that routers
use, over a connection of its own, so an idle host is judged as a busy one is, and a host that only
Ray reaches is not ready. The controller makes it, because the controller is what lists hosts, and
the only process that knows them all, also those without experts to which no router sends anything.

Ages count only the time in which the controller has probed: a controller that was frozen has
received no answers, and must not report all hosts as unready when it resumes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from ..host_answers import HostAnswers
from ..placement import HostEntry
from ..reports.report import HostState

# How often each host is probed, and for how long a probe waits.
PROBE_S = 2.0
PROBE_TIMEOUT_S = 2.0
# A probe takes two milliseconds of the controller's time, so in a larger pool hosts are probed less
# often: at most so many in each look.
LOOK_S = 1.0
_AT_A_LOOK = 25
# After this many intervals without an answer a host is not ready.
_MISSED = 3

# A host whose report is late is listed, too: its listener says whether it is frozen or only busy.
LISTED = (HostState.UP, HostState.LOADING, HostState.NOT_ANSWERING)


@dataclass(slots=True)
class _Probed:
    incarnation: int
    asked_at: float | None = None
    answered_at: float | None = None
    answers: HostAnswers | None = None  # the last ones
    failure: str = ""  # of the last probe; empty: it was answered


class HostProbes:
    """The last probe of every host's listener."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Probed] = {}
        self._every_s = PROBE_S
        self._looked_s = 0.0  # the time that the controller has looked
        self._looked_at: float | None = None

    @property
    def recent_s(self) -> float:
        """For how long an answer counts: 6 s, and longer in a pool of more than 50 hosts."""
        return _MISSED * self._every_s

    def due(self, listed: Collection[HostEntry], now: float) -> list[HostEntry]:
        """Return the hosts to probe now, and note that they are; forget hosts not ``listed``."""
        at = self._pass(now)
        self._every_s = max(PROBE_S, LOOK_S * math.ceil(len(listed) / _AT_A_LOOK))
        names = {entry.host for entry in listed}
        self._hosts = {host: one for host, one in self._hosts.items() if host in names}
        waited = [(self._waited_s(entry, at), entry) for entry in listed]
        # Half a look early rather than late.
        due = [one for one in waited if one[0] >= self._every_s - LOOK_S / 2]
        due.sort(key=lambda one: -one[0])
        chosen = [entry for _, entry in due[:_AT_A_LOOK]]
        for entry in chosen:
            self.asking(entry, now)
        return chosen

    def asking(self, entry: HostEntry, now: float) -> None:
        """Note that a host is being probed."""
        self._of(entry).asked_at = self._pass(now)

    def answered(self, entry: HostEntry, answers: HostAnswers, now: float) -> None:
        """Note what a host answered."""
        known = self._of(entry)
        known.answered_at, known.answers, known.failure = self._pass(now), answers, ""

    def failed(self, entry: HostEntry, why: str, now: float) -> bool:
        """Note that a probe was not answered; return whether the one before was."""
        self._pass(now)
        known = self._of(entry)
        news, known.failure = not known.failure, why
        return news

    def reached(self, entry: HostEntry) -> bool:
        """Return whether the listener of this start of a host has ever answered."""
        known = self._hosts.get(entry.host)
        return (
            known is not None
            and known.incarnation == entry.incarnation
            and known.answered_at is not None
        )

    def obstacle(self, state: HostState, entry: HostEntry | None, now: float) -> str | None:
        """Return why a host is not ready, in words; None: it is."""
        at = self._pass(now)
        if entry is None:
            return f"it is {state.words}"
        known = self._hosts.get(entry.host)
        if known is None or known.incarnation != entry.incarnation or known.answered_at is None:
            why = known.failure if known and known.incarnation == entry.incarnation else ""
            return f"its listener at {entry.grpc_address} has not answered yet{_because(why)}"
        if state not in LISTED:
            return f"it is {state.words}"
        age_s = at - known.answered_at
        if age_s >= self.recent_s:
            return (
                f"its listener at {entry.grpc_address} has not answered for {age_s:.0f} s"
                f"{_because(known.failure)}"
            )
        assert known.answers is not None
        if not known.answers.liveness:
            return "its loop does not turn: no call is computed"
        if not known.answers.readiness:
            return "it says that it is not ready"
        return None

    def _of(self, entry: HostEntry) -> _Probed:
        known = self._hosts.get(entry.host)
        if known is None or known.incarnation != entry.incarnation:
            known = self._hosts[entry.host] = _Probed(entry.incarnation)
        return known

    def _waited_s(self, entry: HostEntry, at: float) -> float:
        asked_at = self._of(entry).asked_at
        return math.inf if asked_at is None else at - asked_at

    def _pass(self, now: float) -> float:
        """Let time pass until ``now``, and return how long the controller has looked."""
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        self._looked_s += min(max(passed_s, 0.0), 2 * LOOK_S)
        return self._looked_s


def _because(why: str) -> str:
    return f" ({why})" if why else ""
