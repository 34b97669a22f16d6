"""The history of changes: who changed the placement, why, and its predicted and measured effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..placement import LayerKey, LayerPlacement
from ..planner.plan import Plan

_KEPT = 100


class Phase(Enum):
    """The phase of a change."""

    LOADING = "loading"  # hosts are loading the planned replicas
    DONE = "done"  # all planned replicas are there
    FAILED = "failed"  # some replicas could not be loaded; the others are there
    SUPERSEDED = "superseded"  # a later change began before this one was done
    ROLLED_BACK = "rolled back"  # an operator returned to the placement from before


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """The effect of a change, measured over the ``seconds`` after its end."""

    seconds: float
    before: Mapping[LayerKey, float]  # balancedness of that load under the shares before the change
    after: Mapping[LayerKey, float]  # balancedness of the same load under the new shares
    choices_before: Mapping[str, float]  # assignments/s that each host answered before the change
    choices_after: Mapping[str, float]  # the same after it


@dataclass(slots=True, kw_only=True)
class Change:
    """One plan that has been or is being carried out."""

    id: int
    who: str
    why: str
    began: float
    plan: Plan
    layers_before: Mapping[LayerKey, LayerPlacement]
    phase: Phase = Phase.LOADING
    ended: float | None = None
    errors: list[str] = field(default_factory=list)
    effect: Effect | None = None  # None: not measured yet, or superseded too soon, or no load

    def describe(self, now: float) -> dict[str, Any]:
        """Plain values for people and JSON."""
        before, after = list(self.plan.before.values()), list(self.plan.after.values())
        return {
            "id": self.id,
            "who": self.who,
            "why": self.why,
            "phase": self.phase.value,
            "age_s": round(now - self.began, 1),
            "took_s": None if self.ended is None else round(self.ended - self.began, 1),
            "moves": len(self.plan.moves),
            "bytes": self.plan.move_bytes,
            "balancedness_before": _mean(before),
            "balancedness_predicted": _mean(after),
            "errors": self.errors,
            "measured": self._measured(),
        }

    def _measured(self) -> dict[str, Any] | None:
        if self.effect is None:
            return None
        before, after = list(self.effect.before.values()), list(self.effect.after.values())
        return {
            "seconds": round(self.effect.seconds, 1),
            "balancedness_unchanged": _mean(before),
            "balancedness": _mean(after),
            "balancedness_worst": round(min(after), 4),
            "host_choices_per_s_before": dict(self.effect.choices_before),
            "host_choices_per_s": dict(self.effect.choices_after),
        }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


class Changes:
    """The most recent changes, the newest last."""

    def __init__(self) -> None:
        self.all: list[Change] = []
        self._next = 1

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
        self._end(Phase.SUPERSEDED, now)
        change = Change(
            id=self._next, who=who, why=why, began=now, plan=plan, layers_before=layers_before
        )
        self._next += 1
        self.all = [*self.all, change][-_KEPT:]
        return change

    def done(self, now: float) -> None:
        """End the current change: everything that could be loaded is there."""
        errors = bool(self.all) and bool(self.all[-1].errors)
        self._end(Phase.FAILED if errors else Phase.DONE, now)

    def failed(self, error: str, now: float) -> None:
        """Record that part of the current change could not be carried out."""
        if self.all and self.all[-1].phase is Phase.LOADING:
            self.all[-1].errors.append(error)

    def rolled_back(self, change: Change, now: float) -> None:
        self._end(Phase.SUPERSEDED, now)
        change.phase, change.ended = Phase.ROLLED_BACK, now

    def find(self, number: int | None) -> Change | None:
        """Return the change with this id, or the last one for None; None if there is none."""
        found = [change for change in self.all if number in (None, change.id)]
        return found[-1] if found else None

    def _end(self, phase: Phase, now: float) -> None:
        if self.all and self.all[-1].phase is Phase.LOADING:
            self.all[-1].phase, self.all[-1].ended = phase, now
