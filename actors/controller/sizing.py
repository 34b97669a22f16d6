"""The controller's part in the pool's size: it decides, a provisioner starts and ends hosts.

Errors are ClusterError.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from ...cluster.control.control import Control
from ...cluster.planner.plan import PoolHost
from ...cluster.reports.scaling import ScalingReport, ScalingStatus
from ...cluster.scaling.fleet import Fleet
from ...cluster.scaling.scale_events import ScaleEvent
from ...cluster.spec.deployment import Deployment
from ...proto.errors import ClusterError
from ..store.durable_state import store_asleep, store_constraints, store_fleet

# The provisioner asks every few seconds; a pause longer than this is shown as a problem.
_LATE_S = 20.0
# How long an answer that changes nothing is held back, and how long it may take in all.
ASK_WAIT_S = 10.0
ASK_TIMEOUT_S = 13.0


class Sizing:
    """The pool's size, as operators, the autoscaler and the provisioner deal with it."""

    def __init__(
        self,
        control: Control,
        fleet: Fleet,
        namespace: str,
        wake: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with the size that was stored; ``wake`` lets the controller's loop tick soon."""
        self._control = control
        self._fleet = fleet
        self._namespace = namespace
        self._wake = wake
        self._clock = clock
        self._resized = asyncio.Event()
        self._asked = self._clock()
        self._kept_version = -1
        self._kept_asleep = control.idle_models.asleep

    async def desired(self, known: int | None, wait_s: float) -> tuple[int, dict[str, int]]:
        """Return a version number and the group of every host there should be.

        While the version is ``known``, wait up to ``wait_s`` for another one.
        """
        self._asked = self._clock()
        if known == self._fleet.version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._resized.wait(), wait_s)
        return self._fleet.version, self._fleet.desired()

    def desired_for_thread(
        self, loop: asyncio.AbstractEventLoop, known: int | None
    ) -> tuple[int, dict[str, int]]:
        """Call `desired` of ``loop`` from another thread. Raises TimeoutError."""
        asked = asyncio.run_coroutine_threadsafe(self.desired(known, ASK_WAIT_S), loop)
        try:
            return asked.result(ASK_TIMEOUT_S)
        finally:
            asked.cancel()

    async def scale(self, count: int, group: int, who: str) -> ScalingReport:
        """Set a group's size to ``count`` hosts; `scaling` tells of the progress."""
        now = self._clock()
        try:
            scaling = self._fleet.scale(self._control, group, count, who=who, now=now)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        self._keep_fleet()
        self._wake()
        return await self.scaling(scaling.id)

    async def scaling(self, number: int) -> ScalingReport:
        """Return one change of the pool's size, and how many experts its leaving hosts hold."""
        scaling = self._fleet.scalings.find(number)
        if scaling is None:
            raise ClusterError(
                f"scaling: {number} is unknown to this controller, which may have restarted; "
                "`moesaic status` shows the hosts"
            )
        return self._fleet.scaling_report(scaling, self._control, self._clock())

    @property
    def used_groups(self) -> set[int]:
        """The numbers of the host groups that have hosts."""
        return self._fleet.used_groups

    def hosts_after(self, deployment: Deployment) -> list[PoolHost]:
        """Return the hosts that stay and come if the pool's size follows another spec."""
        groups = {number: group.fleet for number, group in deployment.groups.items()}
        return self._fleet.hosts_after(groups, deployment.order)

    def follow(self, deployment: Deployment, who: str) -> None:
        """Let the pool's size follow another spec."""
        scale = deployment.spec.autoscale
        self._fleet.autoscaler.follow(scale.policy)
        self._fleet.pending_s = scale.pending_s
        groups = {number: group.fleet for number, group in deployment.groups.items()}
        self._fleet.follow(self._control, groups, deployment.order, who=who, now=self._clock())
        self._keep_fleet()
        self._wake()

    def keep_constraints(self) -> None:
        """Store the constraints for a restarted controller."""
        store_constraints(self._namespace, self._control.constraints)

    def tick(self, now: float) -> list[str]:
        """Update the pool's size after a tick of the controller; return the removed hosts."""
        before = self._fleet.desired().keys()
        self._fleet.tick(self._control, now)
        self._keep_fleet()
        self._keep_asleep()
        removed = list(before - self._fleet.desired().keys())
        if removed:
            self.keep_constraints()
        return removed

    def status(self, now: float) -> ScalingStatus:
        """Return the pool's size for `status`, with the problem if there is one."""
        age_s = now - self._asked
        late = age_s > _LATE_S and self._fleet.desired().keys() - self._control.view.observations
        problem = None
        if late:
            problem = (
                f"the controller has started and ended no hosts for {age_s:.0f} s: Ray's GCS may "
                "be down; `moesaic logs controller` has more"
            )
        return self._fleet.report(self._control, now, owner_age_s=age_s, problem=problem)

    @property
    def scalings(self) -> list[ScaleEvent]:
        """The last changes of the pool's size, the newest at the end."""
        return self._fleet.scalings.all

    def waiting(self, host: str, now: float) -> str | None:
        """Return what a host that has not started yet waits for."""
        return self._fleet.waiting(host, now)

    # ---- parts ----------------------------------------------------------------------------------

    def _keep_fleet(self) -> None:
        if self._fleet.version != self._kept_version:
            store_fleet(self._namespace, self._fleet.snapshot())
            self._kept_version = self._fleet.version
            self._resized.set()
            self._resized = asyncio.Event()

    def _keep_asleep(self) -> None:
        asleep = self._control.idle_models.asleep
        if asleep != self._kept_asleep:
            store_asleep(self._namespace, asleep)
            self._kept_asleep = asleep
