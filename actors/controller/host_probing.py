"""The controller's probes of its hosts' listeners: see `cluster/host/probes.py`."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable

import ray

from ...cluster.host.probes import PROBE_TIMEOUT_S, HostProbes
from ...cluster.host_answers import HostAnswers
from ...cluster.placement import HostEntry
from ..runtime.ray_border import last_line
from ..store.cluster_secret import secret_of
from ..transport.grpc.health import probe
from .host_actors import HostActors

log = logging.getLogger(__name__)

# Ray takes a while to carry a host's own answer.
_CARRY_S = 1.0

# Probes one host; an error of any kind means that it does not answer.
ProbeHost = Callable[[HostEntry], Awaitable[HostAnswers]]


class HostProbing:
    """At most one open probe for each host; none holds up the controller's ticks."""

    def __init__(
        self,
        hosts: HostActors,
        ask: ProbeHost,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Probe nothing yet; `look` begins what is due."""
        self._hosts = hosts
        self._ask = ask
        self._clock = clock
        self._probes = HostProbes()
        self._open: dict[tuple[str, int], asyncio.Task[None]] = {}

    def look(self) -> None:
        """Begin the probes that are due; call it once a second."""
        listed = [report.entry for report in self._hosts.reports.values()]
        for entry in self._probes.due(listed, self._clock()):
            self._begin(entry)

    async def reached(self, entry: HostEntry) -> bool:
        """Return whether a host's listener has ever answered; probe it now if not."""
        if not self._probes.reached(entry):
            self._probes.asking(entry, self._clock())
            await asyncio.wait({self._begin(entry)})
        return self._probes.reached(entry)

    def obstacle(self, host: str) -> str | None:
        """Return why a host is not ready, in words; None: it is."""
        report = self._hosts.reports.get(host)
        entry = None if report is None else report.entry
        return self._probes.obstacle(self._hosts.state(host), entry, self._clock())

    def _begin(self, entry: HostEntry) -> asyncio.Task[None]:
        which = entry.host, entry.incarnation
        asked = self._open.get(which)
        if asked is None:
            asked = self._open[which] = asyncio.ensure_future(self._probe(entry))
            asked.add_done_callback(lambda _: self._open.pop(which, None))
        return asked

    async def _probe(self, entry: HostEntry) -> None:
        try:
            answers = await asyncio.wait_for(self._ask(entry), PROBE_TIMEOUT_S + _CARRY_S)
        except Exception as error:
            # Whatever it is, the host has not answered; the next look asks again.
            why = last_line(error)
            if self._probes.failed(entry, why, self._clock()):
                log.warning(
                    "host %s: its listener does not answer a probe: %s",
                    entry.host,
                    why,
                    extra={"host": entry.host},
                )
        else:
            self._probes.answered(entry, answers, self._clock())


def prober(hosts: HostActors, namespace: str) -> ProbeHost:
    """Return what probes a host of this cluster from this process."""
    secret, here = secret_of(namespace), ray.get_runtime_context().get_node_id()

    async def ask(entry: HostEntry) -> HostAnswers:
        if entry.node != here and _is_loopback(entry.grpc_address):
            # Only its own machine reaches this listener, so the host calls it itself.
            return await hosts.handle(entry.host).probe.remote()
        proof = secret.proof("health", entry.target)
        return await asyncio.wrap_future(probe(entry.grpc_address, proof, PROBE_TIMEOUT_S))

    return ask


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback
    except ValueError:
        return False
