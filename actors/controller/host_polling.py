"""When the controller looks at its hosts: often at those that change, seldom at those that do not.

A host that said the same twice is asked to answer only when something has changed, or after
`QUIET_WAIT_S`. Until then its last words stand, and a host that dies ends the question at once. So
a pool that nothing happens to costs next to nothing, and changes are still heard of immediately.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Literal

from ...cluster.control.pool_view import Observation

# An answer that is later than this is not waited for; it counts when it comes.
LATE_S = 1.0
QUIET_WAIT_S = 6.0

# None: Ray says that the host is gone. "late": it did not answer.
Seen = Observation | Literal["late"] | None
# (host, for how long it may keep an answer that would say nothing new)
Ask = Callable[[str, float], Awaitable[Seen]]


@dataclass(frozen=True, slots=True)
class _Look:
    asked: asyncio.Task[Seen]
    wait_s: float
    began: float


class Looks:
    """The questions to all hosts of a pool; one at a time is open to each."""

    def __init__(
        self, ask: Ask, heard: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``heard`` is called when a host has answered."""
        self._ask = ask
        self._heard = heard
        self._clock = clock
        self._open: dict[str, _Look] = {}
        self._last: dict[str, Observation] = {}
        self._quiet: set[str] = set()
        self._hosts: set[str] = set()
        # Hosts whose answer is overdue.
        self.late: set[str] = set()

    @property
    def quiet(self) -> bool:
        """Whether every host has said the same twice."""
        return self._hosts <= self._quiet

    async def round(self, hosts: Collection[str]) -> dict[str, Observation | None]:
        """What each host says, or has said last where that stands; without those that are late."""
        self._hosts = set(hosts)
        for host in self._hosts - self._open.keys():
            self._begin(host)
        # Those that were late before are not waited for, so that the others are seen to meanwhile.
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
        # So that a change of theirs is heard of before the next round.
        for host in self._quiet & self._hosts - self._open.keys():
            self._begin(host)
        return found

    def anew(self, host: str) -> None:
        """An order to the host began or ended: what it said before does not count any more."""
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
        self._open[host] = _Look(asked, wait_s, self._clock())

    def _note(self, host: str, seen: Seen) -> None:
        last = self._last.pop(host, None)
        self._quiet.discard(host)
        if seen == "late":
            self.late.add(host)
            return
        self.late.discard(host)
        if seen is not None:
            self._last[host] = seen
            # What a host has computed is not compared with the rest.
            if last is not None and seen == last and seen.work == last.work and not seen.loading:
                self._quiet.add(host)
