"""The controller's methods for operators: plans, changes and constraints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from ...cluster.control.changes import Change, Marks
from ...cluster.control.control import Control
from ...cluster.control.policy import moves_of
from ...cluster.expert_keys import ExpertKey
from ...cluster.planner.constraints import (
    check_expert,
    check_host,
    plan_report,
    unmet_constraints,
    with_drain,
    with_min_replicas,
    with_pin,
    without_drain,
    without_pin,
)
from ...cluster.planner.plan import OperatorConstraints, Plan
from ...cluster.reports.placing import ChangeReport, DrainPhase, DrainReport, PlanReport
from ...cluster.spec.text import bytes_of
from ...proto.errors import ClusterError
from ..store.durable_state import store_constraints, store_history

log = logging.getLogger(__name__)

# How long to retry the plan for a constraint if the pool changes while the plan is made.
PLAN_S = 60.0


class Operations:
    """Plans, changes and constraints for the command line and the SDK. Errors are ClusterError."""

    def __init__(
        self,
        control: Control,
        namespace: str,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up the methods of one pool; ``wake`` lets the controller's loop tick soon."""
        self._control = control
        self._namespace = namespace
        self._wake = wake
        self._clock = clock
        self._kept_marks = control.changes.marks()
        self._storing: asyncio.Task[None] | None = None

    async def plan(self, budget: int | str | None = None) -> PlanReport:
        """Return what a rebalance would do now, without changing anything."""
        asked = self._control.plan_for(self._clock(), budget=self._moves(budget))
        return plan_report(
            await asyncio.to_thread(asked.run),
            bytes_per_s=self._control.policy.bytes_per_s,
            unprotected_now=len(self._control.unprotected()),
            upkeep=asked.upkeep,
        )

    async def rebalance(self, budget: int | str | None, who: str) -> ChangeReport:
        """Make a plan and carry it out; return the change. `change` tells of its progress."""
        asked = self._control.plan_for(self._clock(), budget=self._moves(budget))
        found = await asyncio.to_thread(asked.run)
        now = self._clock()
        if not self._control.fits(asked, now):
            raise ClusterError("the pool changed while the plan was made; try again")
        self._wake()
        return self._report(self._control.apply(found, now, who=who, why="asked for"), now)

    async def change(self, number: int | None = None) -> ChangeReport:
        """Return one change (None: the last one), and how many replicas are not loaded yet."""
        told = self._told(number)
        return self._report(self._change(number), self._clock()) if told is None else told

    async def history(self) -> list[ChangeReport]:
        now = self._clock()
        pending = self._control.pending()
        return self._control.changes.reports(now, pending_moves=pending)

    def keep_history(self) -> None:
        """Store the history for a restarted controller, if it has changed."""
        changes = self._control.changes
        stored = self._storing is None or self._storing.done()
        if stored and (marks := changes.marks()) != self._kept_marks:
            # In a thread: the store does not answer while Ray's GCS is down.
            kept = changes.snapshot(self._clock())
            self._storing = asyncio.create_task(self._store_history(kept, marks))

    async def _store_history(self, kept: list[dict[str, Any]], marks: Marks) -> None:
        try:
            await asyncio.to_thread(store_history, self._namespace, kept)
            self._kept_marks = marks
        except (RayError, ConnectionError, RuntimeError):
            # The next tick tries again.
            log.exception("the history of changes cannot be stored")

    async def rollback(self, number: int | None = None) -> ChangeReport:
        """Restore the placement from before a change (None: before the last one)."""
        now = self._clock()
        if (told := self._told(number)) is not None:
            raise ClusterError(
                f"change: {told.id} was made before the controller was restarted, and only its "
                "report is left; `moesaic rebalance` makes a new plan"
            )
        change = self._change(number)
        self._control.roll_back(change, now)
        self._wake()
        return self._report(change, now)

    async def replicate(self, key: tuple[str, int, int], count: int, who: str) -> ChangeReport:
        expert = self._expert(key)
        hosts = self._control.view.hosts
        return await self._constrain(
            lambda constraints: with_min_replicas(constraints, expert, count, hosts),
            who,
            f"{count} replicas of {expert}",
            lambda found: unmet_constraints(found, self._control.constraints, expert),
        )

    async def pin(self, key: tuple[str, int, int], host: str, who: str) -> ChangeReport:
        expert = self._expert(key)
        return await self._constrain(
            lambda constraints: with_pin(constraints, expert, self._host(host)),
            who,
            f"pin {expert} to {host}",
            lambda found: unmet_constraints(found, self._control.constraints, expert),
        )

    async def unpin(self, key: tuple[str, int, int], host: str, who: str) -> ChangeReport:
        expert = self._expert(key)
        return await self._constrain(
            lambda constraints: without_pin(constraints, expert, self._host(host)),
            who,
            f"unpin {expert} from {host}",
        )

    async def drain(self, host: str, who: str) -> ChangeReport:
        control, view = self._control, self._control.view
        hosts = view.hosts.keys() - view.retiring
        if lack := control.members.training_shortage(control.training, [self._host(host)]):
            raise ClusterError(f"host: {host} cannot be drained: {lack}")
        return await self._constrain(
            lambda constraints: with_drain(constraints, self._host(host), hosts),
            who,
            f"drain {host}",
        )

    async def undrain(self, host: str, who: str) -> ChangeReport:
        return await self._constrain(
            lambda constraints: without_drain(constraints, self._host(host)), who, f"undrain {host}"
        )

    async def draining(self, host: str) -> DrainReport:
        """Return how many replicas a host still holds, and the phase of its drain."""
        seen = self._control.view.observations.get(self._host(host))
        remaining = sum(1 for _ in seen.experts()) if seen is not None else 0
        obstacle = self._control.drain_obstacles().get(host)
        phase = DrainPhase.DRAINING if remaining or obstacle else DrainPhase.DONE
        if host in self._control.drain_blockers():
            phase = DrainPhase.NO_ROOM
        if host not in self._control.leaving:
            phase = DrainPhase.NOT_DRAINED
        return DrainReport(host=host, phase=phase, remaining_replicas=remaining, obstacle=obstacle)

    # ---- parts ----------------------------------------------------------------------------------

    def _report(self, change: Change, now: float) -> ChangeReport:
        return change.report(now, pending_moves=self._control.pending())

    def _moves(self, budget: int | str | None) -> int | None:
        """Return a budget as a number of replicas; a text such as "8 GiB" counts bytes."""
        if not isinstance(budget, str):
            return budget
        try:
            return moves_of(bytes_of(budget), list(self._control.models.values()))
        except ValueError as error:
            raise ClusterError(f"budget: {error}") from error

    def _told(self, number: int | None) -> ChangeReport | None:
        """Return the report of a change of an earlier controller; None: it is none of those."""
        changes = self._control.changes
        if changes.find(number) is not None:
            return None
        now = self._clock()
        found = [one.report(now) for one in changes.earlier if number in (None, one.told.id)]
        return found[-1] if found else None

    def _change(self, number: int | None) -> Change:
        change = self._control.changes.find(number)
        if change is None:
            known = [str(one.id) for one in self._control.changes.reports(0.0, pending_moves=0)]
            if number is None:
                raise ClusterError("change: no change has been made yet")
            raise ClusterError(
                f"change: {number} is unknown; the changes are {', '.join(known) or 'none'}"
            )
        return change

    async def _constrain(
        self,
        make: Callable[[OperatorConstraints], OperatorConstraints],
        who: str,
        why: str,
        lacking: Callable[[Plan], list[str]] = lambda _: [],
    ) -> ChangeReport:
        """Store a constraint, plan for it, and return the change that carries it out.

        ``lacking`` lists the parts of the constraint that a plan cannot fulfil. They stay stored,
        and are fulfilled when there is room.
        """
        control = self._control
        try:
            constraints = make(control.constraints)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        last = control.changes.find(None)
        if constraints == control.constraints and last is not None and last.why == why:
            return self._report(last, self._clock())  # the same request again
        store_constraints(self._namespace, constraints)
        control.set_constraints(constraints)
        deadline = self._clock() + PLAN_S
        while (now := self._clock()) < deadline:
            asked = control.plan_for_all(now)
            found = await asyncio.to_thread(asked.run)
            now = self._clock()
            if control.fits(asked, now):
                change = control.apply(found, now, who=who, why=why)
                change.errors += lacking(found)
                self._wake()
                return self._report(change, now)
        raise ClusterError(
            f"{why}: the pool keeps changing; the constraint is stored, and the controller plans "
            "for it later"
        )

    def _expert(self, key: tuple[str, int, int]) -> ExpertKey:
        expert = ExpertKey(*key)
        try:
            check_expert(self._control.models, expert)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        return expert

    def _host(self, host: str) -> str:
        try:
            check_host(self._control.view.hosts, host)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        return host
