"""When the controller asks its hosts for reports: long polls for hosts that do not change.

A host that reported the same twice is asked to answer only when something has changed, or after
`QUIET_WAIT_S`. Until then its last report counts; if the host dies, the open question ends at once.
So an idle pool costs next to nothing, and the controller still learns of changes immediately.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Literal

from ...cluster.control.pool_view import Observation

# A round does not wait longer than this for an answer. A later answer counts when it comes.
LATE_S = 1.0
QUIET_WAIT_S = 6.0

# None: Ray reports the host as dead. "late": the host did not answer in time.
PollResult = Observation | Literal["late"] | None
# (host, how long it may hold back an answer that would say nothing new)
PollHost = Callable[[str, float], Awaitable[PollResult]]


@dataclass(frozen=True, slots=True)
class _Poll:
    asked: asyncio.Task[PollResult]
    wait_s: float
    began: float


class HostPolling:
    """The controller's questions to all hosts of a pool, at most one open question per host."""

    def __init__(
        self, ask: PollHost, heard: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Send no question yet; ``heard`` is called whenever a host has answered."""
        self._ask = ask
        self._heard = heard
        self._clock = clock
        self._open: dict[str, _Poll] = {}
        self._last: dict[str, Observation] = {}
        self._quiet: set[str] = set()
        self._hosts: set[str] = set()
        # Hosts whose answer is overdue.
        self.late: set[str] = set()

    @property
    def quiet(self) -> bool:
        """Whether every host's last two reports were the same."""
        return self._hosts <= self._quiet

    async def round(self, hosts: Collection[str]) -> dict[str, Observation | None]:
        """Return each host's new report, or the last one if it still counts; omit late hosts."""
        self._hosts = set(hosts)
        for host in self._hosts - self._open.keys():
            self._begin(host)
        # Do not wait again for hosts that were late, so that a frozen host delays one round only.
        prompt = [
            look.asked
            for host, look in self._open.items()
            if not look.wait_s and host not in self.late
        ]
        if prompt:
            await asyncio.wait(prompt, timeout=LATE_S)
        found: dict[str, Observation | None] = {}
        for host, look in list(self._open.items()):
            if look.asked.done():
                del self._open[host]
                seen = look.asked.result()
                self._note(host, seen)
                if seen != "late":
                    found[host] = seen
            elif look.wait_s and self._clock() < look.began + look.wait_s + LATE_S:
                found[host] = self._last[host]
            else:
                self._note(host, "late")
        # Ask quiet hosts anew at once, so that a change wakes the controller before its next round.
        for host in self._quiet & self._hosts - self._open.keys():
            self._begin(host)
        return found

    def invalidate(self, host: str) -> None:
        """Discard the host's last report, as an order to it began or ended; wake the controller."""
        self.forget(host)
        self._heard()

    def forget(self, host: str) -> None:
        look = self._open.pop(host, None)
        if look is not None:
            look.asked.cancel()
        self._last.pop(host, None)
        for hosts in (self._quiet, self.late):
            hosts.discard(host)

    def _begin(self, host: str) -> None:
        wait_s = QUIET_WAIT_S if host in self._quiet else 0.0
        asked = asyncio.ensure_future(self._ask(host, wait_s))
        asked.add_done_callback(lambda _: self._heard())
        self._open[host] = _Poll(asked, wait_s, self._clock())

    def _note(self, host: str, seen: PollResult) -> None:
        last = self._last.pop(host, None)
        self._quiet.discard(host)
        if seen == "late":
            self.late.add(host)
            return
        self.late.discard(host)
        if seen is not None:
            self._last[host] = seen
            # `Observation` leaves its `work` out of ==, so it is compared by itself.
            if last is not None and seen == last and seen.work == last.work and not seen.loading:
                self._quiet.add(host)
