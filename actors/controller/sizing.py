"""The controller's part in the pool's size: it decides, the owner starts and ends hosts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ...cluster.control.control import Control
from ...cluster.scaling.fleet import Fleet
from ...proto.errors import ClusterError
from ..runtime.durable_state import keep_asleep, keep_fleet, keep_wishes
from ..runtime.ray_border import last_line

# Time limit for one question to a host that has not started yet; afterwards it is asked again.
ARRIVAL_S = 60.0
_FIRST_S = 0.5
_RETRY_S = 0.2
# The owner asks every few seconds; a pause longer than this is shown as a problem.
_OWNER_LATE_S = 20.0


class Sizing:
    """The methods of `Controller` that concern the pool's size. Errors are ClusterError."""

    _control: Control
    _fleet: Fleet
    _namespace: str
    _handles: dict[str, Any]
    _errors: dict[str, str]
    _arriving: dict[str, asyncio.Task[bool]]
    _kept_version: int
    _kept_asleep: frozenset[str]
    _owner_asked: float
    _resized: asyncio.Event
    _wake: asyncio.Event

    async def desired(self, known: int | None, wait_s: float) -> tuple[int, dict[str, int]]:
        """Return a version number and the group of every host that the owner should run.

        While the version is ``known``, wait up to ``wait_s`` for another one.
        """
        self._owner_asked = time.monotonic()
        if known == self._fleet.version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resized.wait(), wait_s)
        return self._fleet.version, self._fleet.desired()

    async def scale(self, count: int, group: int, who: str) -> dict[str, Any]:
        """Set a group's size to ``count`` hosts; `scaling` tells of the progress."""
        now = time.monotonic()
        try:
            scaling = self._fleet.scale(self._control, group, count, who=who, now=now)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        self._keep_fleet()
        self._wake.set()
        return await self.scaling(scaling.id)

    async def scaling(self, number: int) -> dict[str, Any]:
        """Return one change of the pool's size, and how many experts its leaving hosts hold."""
        scaling = self._fleet.scalings.find(number)
        if scaling is None:
            raise ClusterError(
                f"scaling: {number} is unknown to this controller, which may have restarted; "
                "`moesaic status` shows the hosts"
            )
        now = time.monotonic()
        seen = [self._control.view.seen.get(host) for host in scaling.leaving]
        left = sum(1 for one in seen if one is not None for _ in one.experts())
        waiting = {name: self._fleet.waiting(name, now) for name in scaling.waits_for}
        return scaling.describe(now) | {
            "experts_left": left,
            "waiting": {name: words for name, words in waiting.items() if words}
            | {name: w for name, w in self._control.no_room().items() if name in waiting},
            "owner_age_s": round(now - self._owner_asked, 1),
        }

    # ---- parts ----------------------------------------------------------------------------------

    def _size(self, now: float) -> list[str]:
        """Update the pool's size after a tick; return the hosts that were removed."""
        before = self._fleet.desired().keys()
        self._fleet.tick(self._control, now)
        self._keep_fleet()
        self._keep_asleep()
        removed = list(before - self._fleet.desired().keys())
        if removed:
            keep_wishes(self._namespace, self._control.wishes)
        for host in removed:
            arriving = self._arriving.pop(host, None)
            if arriving is not None:
                arriving.cancel()
        return removed

    def _keep_fleet(self) -> None:
        if self._fleet.version != self._kept_version:
            keep_fleet(self._namespace, self._fleet.keep())
            self._kept_version = self._fleet.version
            self._resized.set()
            self._resized = asyncio.Event()

    def _keep_asleep(self) -> None:
        asleep = frozenset(self._control.sleep.asleep)
        if asleep != self._kept_asleep:
            keep_asleep(self._namespace, asleep)
            self._kept_asleep = asleep

    async def _has_come(self, host: str) -> bool:
        """Return whether a host is running; ticks do not wait for hosts without a machine."""
        if not self._control.view.never_seen(host):
            return True
        asked = self._arriving.get(host)
        if asked is None:
            asked = asyncio.get_running_loop().create_task(self._arrive(host))
            self._arriving[host] = asked
            # After a restart of the controller, this lets all running hosts answer within the
            # same tick.
            await asyncio.wait({asked}, timeout=_FIRST_S)
        if not asked.done():
            return False
        del self._arriving[host]
        return asked.result()

    async def _arrive(self, host: str) -> bool:
        try:
            await asyncio.wait_for(self._handle(host).entry.remote(), ARRIVAL_S)
        except (RayError, ValueError, TimeoutError) as error:
            # The owner has not started the host yet, or the host died while starting.
            if isinstance(error, RayActorError):
                self._errors[host] = f"the host died while starting: {last_line(error)}"
            self._handles.pop(host, None)
            await asyncio.sleep(_RETRY_S)
            return False
        self._errors.pop(host, None)
        return True

    def _handle(self, host: str) -> Any:
        # `Any`, because Ray has no types for the methods of actors.
        if host not in self._handles:
            self._handles[host] = ray.get_actor(host, namespace=self._namespace)
        return self._handles[host]

    def _size_status(self, now: float) -> dict[str, Any]:
        age_s = now - self._owner_asked
        late = age_s > _OWNER_LATE_S and self._fleet.desired().keys() - self._control.view.seen
        problem = f"the cluster's owner has not asked for hosts for {age_s:.0f} s" if late else ""
        return self._fleet.describe(now) | {"problem": problem}
