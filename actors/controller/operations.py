"""The controller's face for operators: plans, changes and wishes, as plain values."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ...cluster.control.changes import Change
from ...cluster.control.control import Control
from ...cluster.control.operations import (
    check_expert,
    check_host,
    describe,
    drained,
    pinned,
    replicated,
    undrained,
    unmet,
    unpinned,
)
from ...cluster.control.policy import moves_of
from ...cluster.placement import ExpertKey
from ...cluster.planner.plan import Plan, Wishes
from ...cluster.spec.text import bytes_of
from ...proto.errors import ClusterError
from ..runtime.durable_state import keep_wishes

# For how long a wish is planned for anew where the pool changes meanwhile.
PLAN_S = 60.0


class Operations:
    """What `Controller` inherits for the command line and the SDK. Errors are ClusterError."""

    _control: Control
    _namespace: str
    _wake: asyncio.Event  # the controller's loop

    async def plan(self, budget: int | str | None = None) -> dict[str, Any]:
        """What a rebalance would do now; nothing is changed."""
        asked = self._control.plan_for(time.monotonic(), budget=self._moves(budget))
        return self._describe(await asyncio.to_thread(asked.run))

    async def rebalance(self, budget: int | str | None, who: str) -> dict[str, Any]:
        """Carry out the plan that is best now. Gives the change; `change` says how it goes on."""
        asked = self._control.plan_for(time.monotonic(), budget=self._moves(budget))
        found = await asyncio.to_thread(asked.run)
        now = time.monotonic()
        if not self._control.fits(asked, now):
            raise ClusterError("the pool changed while the plan was made; try again")
        self._wake.set()
        return self._control.apply(found, now, who=who, why="asked for").describe(now)

    async def change(self, number: int | None = None) -> dict[str, Any]:
        """One change, or the last one, and how many replicas are still to come."""
        described = self._change(number).describe(time.monotonic())
        return described | {"pending": self._control.pending()}

    async def history(self) -> list[dict[str, Any]]:
        now = time.monotonic()
        return [change.describe(now) for change in self._control.changes.all]

    async def rollback(self, number: int | None = None) -> dict[str, Any]:
        """Back to what stood before a change, or before the last one."""
        now = time.monotonic()
        change = self._change(number)
        self._control.roll_back(change, now)
        self._wake.set()
        return change.describe(now)

    async def replicate(self, key: tuple[str, int, int], count: int, who: str) -> dict[str, Any]:
        expert = self._expert(key)
        hosts = self._control.view.hosts
        return await self._wish(
            lambda wishes: replicated(wishes, expert, count, hosts),
            who,
            f"{count} replicas of {expert}",
            lambda found: unmet(found, self._control.wishes, expert),
        )

    async def pin(self, key: tuple[str, int, int], host: str, who: str) -> dict[str, Any]:
        expert = self._expert(key)
        return await self._wish(
            lambda wishes: pinned(wishes, expert, self._host(host)),
            who,
            f"pin {expert} to {host}",
            lambda found: unmet(found, self._control.wishes, expert),
        )

    async def unpin(self, key: tuple[str, int, int], host: str, who: str) -> dict[str, Any]:
        expert = self._expert(key)
        return await self._wish(
            lambda wishes: unpinned(wishes, expert, self._host(host)),
            who,
            f"unpin {expert} from {host}",
        )

    async def drain(self, host: str, who: str) -> dict[str, Any]:
        view = self._control.view
        hosts = view.hosts.keys() - view.retiring
        return await self._wish(
            lambda wishes: drained(wishes, self._host(host), hosts), who, f"drain {host}"
        )

    async def undrain(self, host: str, who: str) -> dict[str, Any]:
        return await self._wish(
            lambda wishes: undrained(wishes, self._host(host)), who, f"undrain {host}"
        )

    async def draining(self, host: str) -> dict[str, Any]:
        """How many experts a host holds, and whether its drain is done, going on, or without
        room."""
        seen = self._control.view.seen.get(self._host(host))
        experts = sum(1 for _ in seen.experts()) if seen is not None else 0
        lacking = self._control.no_room().get(host, "")
        phase = "no room" if lacking else "draining" if experts else "done"
        if host not in self._control.leaving:
            phase = "not drained"
        return {"host": host, "experts": experts, "phase": phase, "lacking": lacking}

    # ---- parts ----------------------------------------------------------------------------------

    def _describe(self, found: Plan) -> dict[str, Any]:
        return describe(
            found,
            bytes_per_s=self._control.policy.bytes_per_s,
            unprotected_now=len(self._control.unprotected()),
        )

    def _moves(self, budget: int | str | None) -> int | None:
        """Replicas, where bytes may be given."""
        if not isinstance(budget, str):
            return budget
        try:
            return moves_of(bytes_of(budget), list(self._control.models.values()))
        except ValueError as error:
            raise ClusterError(f"budget: {error}") from error

    def _change(self, number: int | None) -> Change:
        change = self._control.changes.find(number)
        if change is None:
            known = [str(change.id) for change in self._control.changes.all]
            raise ClusterError(f"change: {number or 'any'} is none of {', '.join(known) or 'none'}")
        return change

    async def _wish(
        self,
        make: Callable[[Wishes], Wishes],
        who: str,
        why: str,
        lacking: Callable[[Plan], list[str]] = lambda _: [],
    ) -> dict[str, Any]:
        """Keep a wish, plan for it, and give the change that carries it out. ``lacking`` says what
        of it a plan does not grant; it stays, and is granted when there is room."""
        control = self._control
        try:
            wishes = make(control.wishes)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        last = control.changes.find(None)
        if wishes == control.wishes and last is not None and last.why == why:
            return last.describe(time.monotonic())  # asked for again
        keep_wishes(self._namespace, wishes)
        control.wishes = wishes
        deadline = time.monotonic() + PLAN_S
        while (now := time.monotonic()) < deadline:
            asked = control.plan_for_all(now)
            found = await asyncio.to_thread(asked.run)
            now = time.monotonic()
            if control.fits(asked, now):
                change = control.apply(found, now, who=who, why=why)
                change.errors += lacking(found)
                self._wake.set()
                return change.describe(now)
        raise ClusterError(f"{why}: the pool goes on changing; it is kept, and will be planned for")

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
