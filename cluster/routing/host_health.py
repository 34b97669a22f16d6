"""One host as one router sees it: its state, its rank, and the calls that occupy its slots."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from ..placement import HostEntry
from .events import Connect, Disconnect, Free, Probe, RouterCommand
from .policy import RouterPolicy

# In `HostHealth.occupied`: the call was not given up.
_WANTED = 0
# Hosts of a higher rank are preferred; this is the rank of a host without any failures.
BEST_RANK = 2


class HostState(Enum):
    # The router is connecting; the host has not sent Welcome yet.
    CONNECTING = "connecting"
    # Takes calls.
    UP = "up"
    # Missed a deadline: gets probes but no calls until it answers something.
    EJECTED = "ejected"
    # No connection; the router tries again after a while.
    DOWN = "down"
    # Left the placement: finishes its calls and gets no new ones.
    LEAVING = "leaving"


@dataclass(slots=True)
class HostHealth:
    """One incarnation of one host on one router's connection."""

    entry: HostEntry
    policy: RouterPolicy
    # Names of the hosts that are not simply up and need a `tick`; one set for all of a router.
    unsettled: set[str] = field(default_factory=set)
    state: HostState = HostState.DOWN
    # Sequence numbers of calls that were sent and not answered. The value of a call that was given
    # up is a probe's number: the host may still write to the call's slot until it answers that.
    occupied: dict[int, int] = field(default_factory=dict)
    busy_until: float = 0.0
    avoid_until: float = 0.0  # other hosts are preferred: hedges overtook its answers
    _busy_s: float = 0.0
    _avoid_s: float = 0.0
    _act_at: float = 0.0  # next probe or attempt to connect, or end of the wait for a Welcome
    _probe_s: float = 0.0
    _probes: int = 0

    def __post_init__(self) -> None:
        self._unsettle()

    def _unsettle(self) -> None:
        self.unsettled.add(self.entry.host)

    def is_settled(self, now: float) -> bool:
        """Return whether nothing is due here before something happens, and no host is better."""
        return self.takes_calls(now) and self.rank(now) == BEST_RANK

    def takes_calls(self, now: float) -> bool:
        return self.state is HostState.UP and now >= self.busy_until

    def rank(self, now: float) -> int:
        """Return the host's rank, 0 to `BEST_RANK`; hosts of a higher rank get calls first.

        Rank 1: hedges overtook its answers lately. Rank 0: a call was given up, and no probe after
        it was answered yet, so that the host may be frozen.
        """
        if self._quarantined:
            return 0
        return BEST_RANK if now >= self.avoid_until else 1

    @property
    def room(self) -> int:
        return self.policy.window - len(self.occupied)

    def sent(self, seq: int) -> None:
        self.occupied[seq] = _WANTED

    def heard(self, seq: int) -> None:
        """Free the slot of a call that was answered or refused."""
        self.occupied.pop(seq, None)
        if self.state is not HostState.UP:
            self.came_up()

    def give_up(self, seq: int, now: float) -> None:
        """Mark a call whose answer the router no longer waits for; the answer may still arrive."""
        if seq in self.occupied:
            if self.state in (HostState.UP, HostState.LEAVING) and not self._quarantined:
                self._probe_s = self.policy.probe_s
                self._act_at = now + self._probe_s
            self.occupied[seq] = self._probes + 1
            self._unsettle()

    def ponged(self, number: int) -> Iterator[RouterCommand]:
        """Free the slots of calls that were given up before this probe was sent.

        A connection keeps its order, so that no answer to them can follow that to the probe.
        """
        self.came_up()
        for seq in [s for s, probe in self.occupied.items() if _WANTED < probe <= number]:
            del self.occupied[seq]
            yield Free(self.entry.host, seq)

    def came_up(self) -> None:
        if self.state is not HostState.LEAVING:
            self.state = HostState.UP

    def leave(self) -> None:
        self.state = HostState.LEAVING
        self._unsettle()

    def went_down(self, now: float) -> None:
        self._unsettle()
        self.occupied.clear()
        if self.state is not HostState.LEAVING:
            self.state = HostState.DOWN
            self._act_at = now + self.policy.reconnect_s

    def eject(self, now: float) -> None:
        if self.state is HostState.UP:
            self.state = HostState.EJECTED
            self._unsettle()
            self._probe_s = self.policy.probe_s
            self._act_at = now

    def in_time(self) -> None:
        """Forget delays of the past: the host answered before a hedge was sent."""
        self._avoid_s = self._busy_s = 0.0

    def lost_to_hedge(self, now: float, age_s: float) -> None:
        """Avoid the host for a while: a hedge overtook its send, which was ``age_s`` old.

        Once may be chance. If it repeats, the pause doubles and is a multiple of ``age_s``, so that
        trying a slow host costs only a fraction of the time.
        """
        least_s = self.policy.avoid_ages * age_s if self._avoid_s else self.policy.avoid_s
        self._avoid_s = min(max(2 * self._avoid_s, least_s), self.policy.avoid_max_s)
        self.avoid_until = now + self._avoid_s
        self._unsettle()

    def was_busy(self, now: float) -> None:
        self._busy_s = min(max(2 * self._busy_s, self.policy.busy_s), self.policy.busy_max_s)
        self.busy_until = now + self._busy_s
        self._unsettle()

    def wake_at(self, now: float, *, work_waits: bool) -> float:
        """Return when this host needs a tick; infinity if nothing is due by itself."""
        if self.state in (HostState.CONNECTING, HostState.EJECTED, HostState.DOWN):
            return self._act_at
        due = self._act_at if self._quarantined else float("inf")
        if work_waits and self.state is HostState.UP and self.busy_until > now:
            due = min(due, self.busy_until)
        return due

    def tick(self, now: float) -> Iterator[RouterCommand]:
        if now < self._act_at:
            return
        if self.state is HostState.DOWN:
            self.state = HostState.CONNECTING
            self._act_at = now + self.policy.connect_s
            yield Connect(self.entry)
        elif self.state is HostState.CONNECTING:
            yield Disconnect(self.entry.host)
            self.went_down(now)
        elif self.state is HostState.EJECTED or self._quarantined:
            self._probes += 1
            yield Probe(self.entry.host, self._probes)
            self._act_at = now + self._probe_s
            self._probe_s = min(2 * self._probe_s, self.policy.probe_max_s)

    @property
    def _quarantined(self) -> bool:
        return any(self.occupied.values())
