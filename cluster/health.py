"""One host as one router sees it: connected, suspected, gone, and what still occupies its slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from .events import Command, Connect, Disconnect, Probe
from .placement import HostEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPolicy:
    """Deadlines and limits of a router; times in seconds."""

    deadline_s: float = 60.0  # one layer's call, waiting for a restart included
    attempt_s: float = 2.0  # first try of one send; doubles with every miss of the same call
    window: int = 8  # calls on one connection, quarantined ones included
    split_rows: int = 16  # an expert with fewer tokens is not split over its replicas
    probe_s: float = 0.05  # first interval between probes of an ejected host; doubles
    probe_max_s: float = 2.0
    connect_s: float = 2.0  # from Connect to Welcome
    reconnect_s: float = 0.2  # between attempts to connect
    busy_s: float = 0.005  # before a host that was busy is asked again


class HostState(Enum):
    # Asked to connect; no Welcome yet.
    CONNECTING = "connecting"
    # Takes calls.
    UP = "up"
    # Missed a deadline: gets probes, no calls, until it answers anything at all.
    EJECTED = "ejected"
    # No connection; tried again after a while.
    DOWN = "down"
    # Left the placement: finishes what it has, gets nothing new.
    LEAVING = "leaving"


@dataclass(slots=True)
class HostHealth:
    """The life of one incarnation of one host on one router's connection."""

    entry: HostEntry
    policy: RouterPolicy
    state: HostState = HostState.DOWN
    # Sequence numbers that were sent and neither answered nor ended with the connection. A call
    # given up stays here: its slot may still be written to.
    occupied: set[int] = field(default_factory=set)
    busy_until: float = 0.0
    _act_at: float = 0.0  # next probe, attempt to connect, or end of the wait for a Welcome
    _probe_s: float = 0.0

    def takes_calls(self, now: float) -> bool:
        return self.state is HostState.UP and now >= self.busy_until

    @property
    def room(self) -> int:
        return self.policy.window - len(self.occupied)

    def came_up(self) -> None:
        if self.state is not HostState.LEAVING:
            self.state = HostState.UP

    def went_down(self, now: float) -> None:
        self.occupied.clear()
        if self.state is not HostState.LEAVING:
            self.state = HostState.DOWN
            self._act_at = now + self.policy.reconnect_s

    def eject(self, now: float) -> None:
        if self.state is HostState.UP:
            self.state = HostState.EJECTED
            self._probe_s = self.policy.probe_s
            self._act_at = now

    def wake_at(self, now: float, *, work_waits: bool) -> float:
        """When this host needs a tick: infinity if nothing is due by itself."""
        if self.state in (HostState.CONNECTING, HostState.EJECTED, HostState.DOWN):
            return self._act_at
        if work_waits and self.state is HostState.UP and self.busy_until > now:
            return self.busy_until
        return float("inf")

    def tick(self, now: float) -> Iterator[Command]:
        if self.state is HostState.LEAVING or now < self._act_at:
            return
        if self.state is HostState.DOWN:
            self.state = HostState.CONNECTING
            self._act_at = now + self.policy.connect_s
            yield Connect(self.entry)
        elif self.state is HostState.CONNECTING:
            yield Disconnect(self.entry.host)
            self.went_down(now)
        elif self.state is HostState.EJECTED:
            yield Probe(self.entry.host)
            self._act_at = now + self._probe_s
            self._probe_s = min(2 * self._probe_s, self.policy.probe_max_s)
