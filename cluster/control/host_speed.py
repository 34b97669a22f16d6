"""Hosts that are slower than they should be, or silent: what the planner is told of their speed.

Hosts report what their devices have done. The pace of a host is that of its last computations, as
few as will do, so that one that becomes slow is known within seconds, however few calls routers
still send to it. Small calls take more time for each choice than large ones, so paces of healthy
hosts differ too, and are compared over the same seconds: only a host that is far behind the others
counts as slow. One that does not answer counts as having next to no speed: its traffic goes to the
other replicas in the shares that suit them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from ..planner.plan import PoolHost

# Below this part of the others' pace a host is slow, above the other it no longer is; what was
# said stands until it is wrong by so much.
_SLOW, _WELL, _WRONG = 1 / 3, 1 / 2, 1.5
# Without so much work nothing is said, and what is older does not count.
_LEAST_BATCHES, _LEAST_BUSY_S, _LONGEST_S = 2, 0.5, 60.0
# The part of its speed that a silent host is planned with: its shares come to nothing where another
# replica stands.
SILENT = 1e-6


@dataclass(frozen=True, slots=True)
class Work:
    """What a host's device has done since it started."""

    batches: int
    choices: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class _Mark:
    at: float
    incarnation: int
    work: Work


class Paces:
    """Choices per second of work of each host, over its last computations."""

    def __init__(self) -> None:
        self._marks: dict[str, deque[_Mark]] = {}
        self._slow: dict[str, float] = {}

    def note(self, host: str, incarnation: int, work: Work, now: float) -> None:
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

    def parts(self, speeds: Mapping[str, float], silent: Collection[str]) -> dict[str, float]:
        """The part of its speed that each slow or silent host has; others are not named."""
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
        # If nobody answers, it is probably we who were late.
        if not speeds.keys() <= set(silent):
            found |= {host: SILENT for host in silent if host in speeds}
        return found

    def _latest(self, host: str) -> tuple[float, float] | None:
        """(since when, pace) of as few of the last computations as will do."""
        marks = self._marks.get(host) or deque()
        for mark in reversed(marks):
            done = _since(mark, marks[-1])
            if done.batches >= _LEAST_BATCHES and done.busy_s >= _LEAST_BUSY_S:
                return mark.at, done.choices / done.busy_s
        return None

    def _part(self, host: str, since: float, speeds: Mapping[str, float]) -> float:
        """A host's pace as a part of the others', over the same seconds."""
        paces, until = {}, self._marks[host][-1].at
        for other, speed in speeds.items():
            marks = [mark for mark in self._marks.get(other, ()) if mark.at <= until]
            if marks:
                first = next((m for m in reversed(marks) if m.at <= since), marks[0])
                done = _since(first, marks[-1])
                if done.busy_s > 0:
                    paces[other] = done.choices / done.busy_s / speed
        return paces[host] / median(paces.values()) if len(paces) > 1 else 1.0


def _since(first: _Mark, last: _Mark) -> Work:
    was, now = first.work, last.work
    return Work(now.batches - was.batches, now.choices - was.choices, now.busy_s - was.busy_s)


def slowed(hosts: Sequence[PoolHost], parts: Mapping[str, float]) -> list[PoolHost]:
    """The hosts with the speeds that they really have."""
    return [replace(host, speed=host.speed * parts.get(host.name, 1.0)) for host in hosts]
