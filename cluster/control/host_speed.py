"""Detect hosts that are slow (stragglers) or silent, and correct the speed they are planned with.

Hosts report what their devices have done. A host's pace, in assignments per second of work, is
taken over its last few computations, so that a slowdown shows within seconds, even if routers send
few calls to the host by then. Small calls take more time per assignment than large ones, so the
paces of healthy hosts differ too. They are therefore compared over the same seconds, and only a
host that is much slower than the others counts as slow. A host that does not answer is planned with
next to no speed, so that its traffic goes to other replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..planner.plan import PoolHost

# A host whose pace falls below _SLOW of the others' median counts as slow, until it exceeds _WELL
# of it. The factor stated for it changes only if it is off by more than _WRONG, so that small
# variations cause no new plans.
_SLOW, _WELL, _WRONG = 1 / 3, 1 / 2, 1.5
# A pace needs at least so many batches and seconds of work; older work than _LONGEST_S is ignored.
_LEAST_BATCHES, _LEAST_BUSY_S, _LONGEST_S = 2, 0.5, 60.0
# The speed factor of a silent host: its share becomes nearly zero where another replica exists.
SILENT = 1e-6


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a host's device since the host started."""

    batches: int
    assignments: int
    busy_s: float
    backward_s: float = 0.0  # of backward calls, with what is added up after their answers
    owner_s: float = 0.0  # of summing up and applying gradients of what it owns


@dataclass(frozen=True, slots=True)
class _Mark:
    """The work of one incarnation of a host, as reported at one moment."""

    at: float
    incarnation: int
    work: Work


class HostSpeeds:
    """The pace of each host over its last computations, in assignments per second of work."""

    def __init__(self) -> None:
        self._marks: dict[str, deque[_Mark]] = {}
        self._slow: dict[str, float] = {}

    def note(self, host: str, incarnation: int, work: Work, now: float) -> None:
        """Take note of a host's report."""
        marks = self._marks.setdefault(host, deque())
        if marks and marks[-1].incarnation != incarnation:
            marks.clear()
            self._slow.pop(host, None)
        if not marks or marks[-1].work.batches != work.batches:
            marks.append(_Mark(now, incarnation, work))
        while len(marks) > 1 and now - marks[0].at > _LONGEST_S:
            marks.popleft()

    def forget(self, host: str) -> None:
        self._marks.pop(host, None)
        self._slow.pop(host, None)

    def speed_factors(
        self, speeds: Mapping[str, float], silent: Collection[str]
    ) -> dict[str, float]:
        """Return the speed factor, below 1, of each slow or silent host; others are left out.

        ``speeds``: the nominal speed of each host.
        """
        latest = {host: found for host in speeds if (found := self._latest(host)) is not None}
        paces = {host: pace / speeds[host] for host, (_, pace) in latest.items()}
        usual = median(paces.values()) if len(paces) > 1 else 0.0
        for host in speeds:
            part = 1.0
            if host in paces and paces[host] < _WELL * usual:
                part = self._part(host, latest[host][0], speeds)
            stated = self._slow.get(host, 1.0)
            if part > _WELL or (host not in self._slow and part >= _SLOW):
                self._slow.pop(host, None)
            elif not stated / _WRONG <= part <= stated * _WRONG:
                self._slow[host] = part
        found = {host: part for host, part in self._slow.items() if host in speeds}
        # If no host answers, this process was probably too slow to ask.
        if not speeds.keys() <= set(silent):
            found |= {host: SILENT for host in silent if host in speeds}
        return found

    def _latest(self, host: str) -> tuple[float, float] | None:
        """Return (start, pace) of the shortest sufficient run of last computations, or None."""
        marks = self._marks.get(host) or deque()
        for mark in reversed(marks):
            done = _since(mark, marks[-1])
            if done.batches >= _LEAST_BATCHES and done.busy_s >= _LEAST_BUSY_S:
                return mark.at, done.assignments / done.busy_s
        return None

    def _part(self, host: str, since: float, speeds: Mapping[str, float]) -> float:
        """Return a host's pace / the median of all hosts' over the same seconds, at equal speed."""
        paces, until = {}, self._marks[host][-1].at
        for other, speed in speeds.items():
            marks = [mark for mark in self._marks.get(other, ()) if mark.at <= until]
            if marks:
                first = next((m for m in reversed(marks) if m.at <= since), marks[0])
                done = _since(first, marks[-1])
                if done.busy_s > 0:
                    paces[other] = done.assignments / done.busy_s / speed
        return paces[host] / median(paces.values()) if len(paces) > 1 else 1.0


def _since(first: _Mark, last: _Mark) -> Work:
    """Return the work between two reports."""
    was, now = first.work, last.work
    return Work(
        now.batches - was.batches, now.assignments - was.assignments, now.busy_s - was.busy_s
    )


def with_speed_factors(hosts: Sequence[PoolHost], parts: Mapping[str, float]) -> list[PoolHost]:
    """Return the hosts with their speeds multiplied by the speed factors ``speed_factors``."""
    return [replace(host, speed=host.speed * parts.get(host.name, 1.0)) for host in hosts]
