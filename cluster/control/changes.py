"""The history of changes: who changed the placement, why, and its predicted and measured effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..expert_keys import LayerKey
from ..placement import LayerPlacement
from ..planner.plan import Plan
from ..reports.placing import ChangePhase, ChangeReport, MeasuredEffect
from ..reports.report import balancedness_of

_KEPT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeImpact:
    """The effect of a change, measured over the ``seconds`` after its end."""

    seconds: float
    before: Mapping[LayerKey, float]  # balancedness of that load under the shares before the change
    after: Mapping[LayerKey, float]  # balancedness of the same load under the new shares
    assignments_per_s_before: Mapping[
        str, float
    ]  # assignments/s that each host answered before the change
    assignments_per_s_after: Mapping[str, float]  # the same after it


@dataclass(slots=True, kw_only=True)
class Change:
    """One plan that has been or is being carried out."""

    id: int
    who: str
    why: str
    began: float
    plan: Plan
    layers_before: Mapping[LayerKey, LayerPlacement]
    phase: ChangePhase = ChangePhase.LOADING
    ended: float | None = None
    errors: list[str] = field(default_factory=list)
    impact: ChangeImpact | None = None  # None: not measured yet, or superseded too soon, or no load

    def report(self, now: float, *, pending_moves: int) -> ChangeReport:
        """Return the report; ``pending_moves``: replicas of the target still to be loaded."""
        return ChangeReport(
            id=self.id,
            initiator=self.who,
            reason=self.why,
            phase=self.phase,
            age_s=round(now - self.began, 1),
            duration_s=None if self.ended is None else round(self.ended - self.began, 1),
            total_moves=len(self.plan.moves),
            pending_moves=pending_moves if self.phase is ChangePhase.LOADING else 0,
            weight_bytes=self.plan.move_bytes,
            balancedness_before=balancedness_of(list(self.plan.before.values())),
            balancedness_predicted=balancedness_of(list(self.plan.after.values())),
            errors=list(self.errors),
            measured=self._measured(),
        )

    def _measured(self) -> MeasuredEffect | None:
        if self.impact is None:
            return None
        before = balancedness_of(list(self.impact.before.values()))
        after = balancedness_of(list(self.impact.after.values()))
        assert before is not None and after is not None, "there is no effect without load"
        return MeasuredEffect(
            window_s=round(self.impact.seconds, 1),
            balancedness_unchanged=before,
            balancedness_changed=after,
            host_assignments_per_s_before=dict(self.impact.assignments_per_s_before),
            host_assignments_per_s_after=dict(self.impact.assignments_per_s_after),
        )


@dataclass(frozen=True, slots=True)
class EarlierChange:
    """A change of an earlier controller, of which only the report is left."""

    began: float
    told: ChangeReport

    def report(self, now: float) -> ChangeReport:
        return self.told.model_copy(update={"age_s": round(now - self.began, 1)})


# (number, phase, whether its effect is measured) of each change.
Marks = list[tuple[int, ChangePhase, bool]]


class ChangeHistory:
    """The most recent changes, the newest last."""

    def __init__(self) -> None:
        self.all: list[Change] = []
        self.earlier: list[EarlierChange] = []
        self._next = 1

    def snapshot(self, now: float) -> list[dict[str, Any]]:
        """Return what a later controller must know of the changes, as JSON values."""
        return [one.model_dump(mode="json") for one in self.reports(now, pending_moves=0)]

    def restore(self, kept: Sequence[Mapping[str, Any]], now: float, *, passed_s: float) -> None:
        """Take over what `snapshot` of an earlier controller returned ``passed_s`` ago.

        A change that was loading has ended with that controller: the next plan supersedes it.
        """
        for values in kept:
            told = ChangeReport.model_validate(values)
            began = now - passed_s - told.age_s
            if told.under_way:
                told = told.model_copy(update={"phase": ChangePhase.SUPERSEDED})
            self.earlier.append(EarlierChange(began, told))
            self._next = max(self._next, told.id + 1)

    def marks(self) -> Marks:
        """Return what changes when `snapshot` is worth storing again."""
        return [(one.id, one.phase, one.impact is not None) for one in self.all]

    def reports(self, now: float, *, pending_moves: int) -> list[ChangeReport]:
        """Return the reports of the most recent changes, those of earlier controllers too."""
        earlier = [one.report(now) for one in self.earlier]
        own = [one.report(now, pending_moves=pending_moves) for one in self.all]
        return [*earlier, *own][-_KEPT:]

    def begin(
        self,
        plan: Plan,
        layers_before: Mapping[LayerKey, LayerPlacement],
        now: float,
        *,
        who: str,
        why: str,
    ) -> Change:
        """Record a new change; one that is still loading is superseded."""
        self._end(ChangePhase.SUPERSEDED, now)
        change = Change(
            id=self._next, who=who, why=why, began=now, plan=plan, layers_before=layers_before
        )
        self._next += 1
        self.all = [*self.all, change][-_KEPT:]
        return change

    def done(self, now: float) -> None:
        """End the current change: everything that could be loaded is there."""
        errors = bool(self.all) and bool(self.all[-1].errors)
        self._end(ChangePhase.FAILED if errors else ChangePhase.DONE, now)

    def failed(self, error: str, now: float) -> None:
        """Record that part of the current change could not be carried out."""
        if self.all and self.all[-1].phase is ChangePhase.LOADING:
            self.all[-1].errors.append(error)

    def rolled_back(self, change: Change, now: float) -> None:
        self._end(ChangePhase.SUPERSEDED, now)
        change.phase, change.ended = ChangePhase.ROLLED_BACK, now

    def find(self, number: int | None) -> Change | None:
        """Return the change with this id, or the last one for None; None if there is none."""
        found = [change for change in self.all if number in (None, change.id)]
        return found[-1] if found else None

    def _end(self, phase: ChangePhase, now: float) -> None:
        if self.all and self.all[-1].phase is ChangePhase.LOADING:
            self.all[-1].phase, self.all[-1].ended = phase, now
