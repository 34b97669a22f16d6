"""The hosts' Ray actors as the controller knows them: handles, reports, states and errors."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ...cluster.placement import ModelRef, ModelShape
from ...cluster.reports.report import HostState
from ...proto.errors import ClusterError
from ..host.report import HostReport
from ..runtime.ray_border import last_line

log = logging.getLogger(__name__)

_ABSENT = (HostState.NOT_ANSWERING, HostState.RESTARTING, HostState.GONE)
# Time limit for one question to a host that has not started yet; afterwards it is asked again.
ARRIVAL_S = 60.0
_FIRST_S = 0.5
_RETRY_S = 0.2


class HostActors:
    """What is known of each host by its name."""

    def __init__(self, namespace: str) -> None:
        self.reports: dict[str, HostReport] = {}
        self.errors: dict[str, str] = {}
        self._namespace = namespace
        self._states: dict[str, HostState] = {}
        self._handles: dict[str, Any] = {}
        self._incarnations: dict[str, int] = {}  # the last of each host that reported
        # Hosts that have died since their last report. One that restarts is late, too.
        self._dead: set[str] = set()
        self._arriving: dict[str, asyncio.Task[bool]] = {}

    def handle(self, host: str) -> Any:
        """Return the actor's handle. Raises ValueError if there is no such actor."""
        # `Any`, because Ray has no types for the methods of actors.
        if host not in self._handles:
            self._handles[host] = ray.get_actor(host, namespace=self._namespace)
        return self._handles[host]

    async def introduce(
        self, host: str, ref: ModelRef, shape: ModelShape, timeout_s: float
    ) -> None:
        """Tell a host of a model whose experts others will send to it. Raises ClusterError."""
        if host in self.reports and (ref, shape) in self.reports[host].models:
            return
        try:
            asked = self.handle(host).add_models.remote([(ref, shape)])
            await asyncio.wait_for(asked, timeout_s)
        except (RayError, ValueError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            why = f"no answer for {timeout_s:g} s" if late else last_line(error)
            raise ClusterError(f"model {ref.name!r}: {host} does not take it: {why}") from error

    def nodes(self) -> dict[str, str]:
        """Return the node of every host that has reported. From any thread."""
        return {host: report.entry.node for host, report in self.reports.copy().items()}

    def state(self, host: str) -> HostState:
        return self._states.get(host, HostState.STARTING)

    def reported(self, host: str, report: HostReport) -> None:
        before = self._incarnations.get(host)
        if before != report.entry.incarnation or self._states.get(host) in _ABSENT:
            what = "is up"
            if before is not None:
                same = before == report.entry.incarnation
                there = f"with {report.adopted}" if report.adopted else "without"
                new = f"is replaced: it starts again, {there} experts"
                what = "answers again" if same else new
            log.info(
                "host %s %s",
                host,
                what,
                extra={
                    "host": host,
                    "incarnation": report.entry.incarnation,
                    "host_pid": report.pid,
                    "node": report.entry.node,
                },
            )
        self._incarnations[host] = report.entry.incarnation
        self._dead.discard(host)
        self.reports[host] = report
        self._states[host] = HostState.LOADING if report.loading else HostState.UP

    def unreached(self, host: str, report: HostReport) -> None:
        """Take note of a host that reports, but whose listener has never answered: it starts."""
        self.reports[host] = report

    def late(self, host: str) -> None:
        """Take note that a host did not answer in time."""
        if self._states.get(host) is not HostState.NOT_ANSWERING and host not in self._dead:
            log.warning("host %s does not answer", host, extra={"host": host})
        self._states[host] = HostState.NOT_ANSWERING

    def died(self, host: str, *, restarting: bool) -> None:
        state = HostState.RESTARTING if restarting else HostState.GONE
        if host not in self._dead:
            log.warning("host %s has died; it is %s", host, state.value, extra={"host": host})
        self._dead.add(host)
        self._states[host] = state
        self._handles.pop(host, None)
        self.reports.pop(host, None)

    def forget(self, host: str) -> None:
        """Drop a host that was removed from the pool."""
        everything = self._handles, self.reports, self._states, self.errors, self._incarnations
        for known in everything:
            known.pop(host, None)
        self._dead.discard(host)
        arriving = self._arriving.pop(host, None)
        if arriving is not None:
            arriving.cancel()

    async def has_come(self, host: str) -> bool:
        """Return whether a host that was never seen is running now.

        Ticks do not wait for hosts without a machine.
        """
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
            await asyncio.wait_for(self.handle(host).entry.remote(), ARRIVAL_S)
        except (RayError, ValueError, TimeoutError) as error:
            # Nothing has started the host yet, or the host died while starting.
            if isinstance(error, RayActorError):
                told = f"the host died while starting: {last_line(error)}"
                if self.errors.get(host) != told:
                    log.warning("host %s: %s", host, told, extra={"host": host})
                self.errors[host] = told
            self._handles.pop(host, None)
            await asyncio.sleep(_RETRY_S)
            return False
        self.errors.pop(host, None)
        return True
