"""Health of the controller, as figures and as warnings.

The figures are metrics and part of `status`; each warning names something that makes no progress,
or a model whose routing has collapsed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..expert_keys import LayerKey
from ..load.routing_watch import AGREEING, AGREEING_SERVED, RoutingWatch
from ..load.tracker import grown
from ..reports.report import Balancedness, balancedness_of
from .change_impact import balancedness_under
from .control import Control

# A controller ticks several times a second, and waits 2 s for a host that does not answer.
TICK_STALLED_S = 5.0
# The planner needs about this long for the largest shift of the load in a large pool.
PLANNER_SLOW_S = 30.0
PLANNER_FAILURES = 2  # in a row
# Replicas arrive in small batches at a bounded rate. The slowest rate that makes sense brings one
# sooner than this.
MOVES_STALLED_S = 30.0
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """The controller's figures; ages are in seconds, and None if the event has not happened yet."""

    tick_age_s: float
    plan_age_s: float | None  # since the planner was last asked
    planning_s: float  # how long it has been at work on the current plan; 0 if there is none
    plan_failures: int  # in a row
    move_age_s: float | None  # since a planned replica last arrived
    moves_pending: int
    missing_experts: int
    unprotected_experts: int
    balancedness_mean: float | None  # over all layers with load, under the published shares
    balancedness_worst: float | None
    term: int
    epoch: int
    failing: bool  # whether the last tick or the last plan ended with an error
    hosts: dict[str, int]  # state -> how many
    collapses: tuple[str, ...] = ()  # of models whose routing has collapsed, in words

    def warnings(self) -> list[str]:
        """Return a text for each thing that makes no progress, or goes wrong unseen."""
        found = []
        if self.tick_age_s > TICK_STALLED_S:
            found.append(f"the controller has not run for {self.tick_age_s:.0f} s")
        if self.planning_s > PLANNER_SLOW_S:
            found.append(f"the planner has been running for {self.planning_s:.0f} s")
        if self.plan_failures >= PLANNER_FAILURES:
            found.append(f"the planner has failed {self.plan_failures} times in a row")
        if self.moves_pending and (self.move_age_s or 0.0) > MOVES_STALLED_S:
            found.append(
                f"{self.moves_pending} planned replicas are missing, and none has arrived for "
                f"{self.move_age_s:.0f} s"
            )
        return found + list(self.collapses)


@dataclass(slots=True)
class PlanCounts:
    """How often the planner was asked since the controller's start, and for how long."""

    ended: int = 0  # with a plan or without one
    failed: int = 0
    took_s: float = 0.0


class Watchdog:
    """Observes a `Control` from outside."""

    def __init__(self, control: Control, now: float) -> None:
        self._control = control
        self._ticked_at = now
        self._failing = False
        self._planning_since: float | None = None
        self._plan_failures = 0
        self.plans = PlanCounts()
        # When a planned replica last arrived, or when some were planned after there were none.
        self._moved_at: float | None = None
        self._looked_at: float | None = None
        self._seen_state: object = None
        self._pending = self._missing = 0
        self.unprotected: Counter[str] = Counter()  # experts of each model
        self.balancedness: dict[str, Balancedness] = {}  # of each model
        self.overall_balancedness: Balancedness | None = None
        self.layer_balancedness: dict[LayerKey, float] = {}  # of each layer with load
        self.routing = RoutingWatch()
        self._seen_totals: dict[LayerKey, np.ndarray] = {}  # (E,) each

    # ---- input ----------------------------------------------------------------------------------

    def ticked(self, now: float, *, failed: bool) -> None:
        """Take note of a tick of the controller."""
        self._ticked_at, self._failing = now, failed

    def plan_began(self, now: float) -> None:
        self._planning_since = now

    def plan_ended(self, now: float, *, failed: bool) -> None:
        self.plans.ended += 1
        self.plans.failed += failed
        self.plans.took_s += 0.0 if self._planning_since is None else now - self._planning_since
        self._planning_since = None
        self._plan_failures = self._plan_failures + 1 if failed else 0

    # ---- output ---------------------------------------------------------------------------------

    def vitals(self, states: Iterable[str], now: float) -> Vitals:
        """Return the figures; ``states`` are those of the hosts."""
        self._look(now)
        control, since = self._control, self._planning_since
        overall = self.overall_balancedness
        return Vitals(
            tick_age_s=now - self._ticked_at,
            plan_age_s=_age(control.planned_at, now),
            planning_s=0.0 if since is None else now - since,
            plan_failures=self._plan_failures,
            move_age_s=_age(self._moved_at, now),
            moves_pending=self._pending,
            missing_experts=self._missing,
            unprotected_experts=self.unprotected.total(),
            balancedness_mean=None if overall is None else overall.mean,
            balancedness_worst=None if overall is None else overall.worst,
            term=control.placement_id.term,
            epoch=control.placement_id.epoch,
            failing=self._failing or self._plan_failures > 0,
            hosts=dict(sorted(Counter(states).items())),
            collapses=tuple(self._collapses()),
        )

    def _look(self, now: float) -> None:
        """Count experts if anything has changed, and compute the balance once a second.

        In a large pool both take milliseconds.
        """
        control = self._control
        if control.state != self._seen_state:
            self._seen_state = control.state
            before, self._pending = self._pending, control.pending()
            if self._pending < before or (self._pending and not before):
                self._moved_at = now
            self._missing = len(control.missing())
            self.unprotected = Counter(key.model for key in control.unprotected())
        self._watch_routing()
        if self._looked_at is None or now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._balance(now)

    def _watch_routing(self) -> None:
        """Judge the routing by what routers have reported since the last time."""
        control, trained = self._control, self._trained()
        for key, totals_E in control.loads.totals.items():
            before_E = self._seen_totals.get(key)
            shape = control.models.get(key.model)
            if totals_E is before_E or shape is None:
                continue
            self.routing.add(
                key,
                grown(before_E, totals_E),
                experts_per_token=shape.experts_per_token,
                agreeing=AGREEING if key.model == trained else AGREEING_SERVED,
            )
        self._seen_totals = dict(control.loads.totals)
        self.routing.keep(self._seen_totals.keys())

    def _collapses(self) -> Iterator[str]:
        trained = self._trained()
        for model in self._control.models:
            text = self.routing.warning(model, trained=model == trained)
            if text is not None:
                yield text

    def _trained(self) -> str | None:
        """Return the model that is trained now, if one is."""
        run = self._control.training.alive
        return None if run is None else run.model

    def _balance(self, now: float) -> None:
        placement, loads = self._control.placement, self._control.loads
        layers = {} if placement is None else placement.layers
        rates = {key: rate for key in layers if (rate := loads.rate(key)) is not None}
        fan_out = self._control.policy.balance.consolidate_below
        found = balancedness_under(layers, rates, self._control.staying(now), fan_out)
        by_model: dict[str, list[float]] = {}
        for key, value in found.items():
            by_model.setdefault(key.model, []).append(value)
        figures = {model: balancedness_of(values) for model, values in by_model.items()}
        self.balancedness = {model: one for model, one in figures.items() if one is not None}
        self.overall_balancedness = balancedness_of(list(found.values()))
        self.layer_balancedness = found


def _age(moment: float | None, now: float) -> float | None:
    return None if moment is None else now - moment
