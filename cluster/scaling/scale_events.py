"""The history of the pool's size: who changed it and why, which hosts it concerned, its outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..reports.scaling import ScalingPhase, ScalingReport

_KEPT = 50


_UNDER_WAY = (ScalingPhase.STARTING, ScalingPhase.DRAINING)


@dataclass(slots=True, kw_only=True)
class ScaleEvent:
    """One change of the number of hosts of a group."""

    id: int
    group: int
    who: str
    why: str
    before: int
    count: int
    began: float
    coming: list[str] = field(default_factory=list)
    leaving: list[str] = field(default_factory=list)
    phase: ScalingPhase = ScalingPhase.STARTING
    ended: float | None = None
    waits_for: list[str] = field(default_factory=list)  # hosts that have yet to come or leave

    def report(
        self, now: float, *, remaining_replicas: int, obstacles: Mapping[str, str]
    ) -> ScalingReport:
        """Return the report; ``obstacles`` says what awaited hosts wait for."""
        return ScalingReport(
            id=self.id,
            group=self.group,
            initiator=self.who,
            reason=self.why,
            hosts_before=self.before,
            target_hosts=self.count,
            arriving_hosts=list(self.coming),
            leaving_hosts=list(self.leaving),
            awaited_hosts=list(self.waits_for),
            phase=self.phase,
            age_s=round(now - self.began, 1),
            duration_s=None if self.ended is None else round(self.ended - self.began, 1),
            remaining_replicas=remaining_replicas,
            obstacles=dict(obstacles),
        )


class ScaleHistory:
    """The last changes, the newest at the end."""

    def __init__(self) -> None:
        self.all: list[ScaleEvent] = []
        self._next = 1

    def begin(
        self,
        group: int,
        before: int,
        count: int,
        *,
        who: str,
        why: str,
        coming: Sequence[str] = (),
        leaving: Sequence[str] = (),
        now: float,
    ) -> ScaleEvent:
        for one in self._open():
            if one.group == group:
                one.phase, one.ended = ScalingPhase.SUPERSEDED, now
        scaling = ScaleEvent(
            id=self._next,
            group=group,
            who=who,
            why=why,
            before=before,
            count=count,
            began=now,
            coming=list(coming),
            leaving=list(leaving),
        )
        self._next += 1
        self.all = [*self.all, scaling][-_KEPT:]
        return scaling

    def same(self, group: int, count: int, who: str, now: float) -> ScaleEvent:
        """Return the running change to this number, or a new one that is already done."""
        for one in self._open():
            if (one.group, one.count) == (group, count):
                return one
        done = self.begin(
            group, count, count, who=who, why="requested; already at this size", now=now
        )
        done.phase, done.ended = ScalingPhase.DONE, now
        return done

    def find(self, number: int) -> ScaleEvent | None:
        return next((one for one in self.all if one.id == number), None)

    def advance(
        self,
        *,
        up: Collection[str],
        there: Collection[str],
        late: Collection[str],
        full: Collection[str] = (),
        now: float,
    ) -> None:
        """Update all changes that are under way.

        ``up`` and ``there`` name hosts that are up and that still exist. ``late`` hosts wait for a
        machine; for experts of ``full`` hosts there is no room elsewhere.
        """
        for one in self._open():
            coming = [name for name in one.coming if name not in up]
            leaving = [name for name in one.leaving if name in there]
            one.waits_for = coming + leaving
            waiting = all(name in late for name in coming) and all(name in full for name in leaving)
            if (coming or leaving) and waiting:
                one.phase, one.ended = ScalingPhase.NO_ROOM, now
            elif coming:
                one.phase = ScalingPhase.STARTING
            elif leaving:
                one.phase = ScalingPhase.DRAINING
            else:
                one.phase, one.ended = ScalingPhase.DONE, now

    def _open(self) -> list[ScaleEvent]:
        return [one for one in self.all if one.phase in _UNDER_WAY]
