"""A virtual clock with its queue of events, and processes that can be frozen, woken and killed."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

Act = Callable[[], None]


class TimedEvent(NamedTuple):
    when: float
    order: int  # events at the same time happen in the order in which they were scheduled
    what: str
    act: Act


class Clock:
    """Time jumps from event to event."""

    def __init__(self) -> None:
        self.now = 0.0
        self.happened = 0
        self._order = 0
        self._queue: list[TimedEvent] = []

    def at(self, when: float, what: str, act: Act) -> None:
        self._order += 1
        heapq.heappush(self._queue, TimedEvent(max(when, self.now), self._order, what, act))

    def after(self, delay_s: float, what: str, act: Act) -> None:
        self.at(self.now + delay_s, what, act)

    def next(self) -> TimedEvent:
        """Return the next event, and set the clock to its time; there always is a timer."""
        event = heapq.heappop(self._queue)
        self.now = event.when
        self.happened += 1
        return event


class SimProcess:
    """One start of a process.

    While it is frozen, it keeps what reaches it until it is woken. Once killed, it does nothing.
    What reaches it at the moment in which it is woken comes after what it kept.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self.name = name
        self.clock = clock
        self.alive = True
        self.frozen = False
        self.woke_at = 0.0
        self._kept: deque[tuple[str, Act]] = deque()
        self._timers: dict[str, int] = {}
        self._on_death: dict[int, Act] = {}
        self._watchers = 0

    def reach(self, delay_s: float, what: str, act: Act) -> None:
        """Run ``act`` on this process in ``delay_s`` seconds, or when it is woken after that."""
        self.clock.after(delay_s, what, lambda: self._run(what, act))

    def alarm(self, timer: str, when: float, act: Act) -> None:
        """Set one of this process's timers; this replaces its earlier setting."""
        number = self._timers[timer] = self._timers.get(timer, 0) + 1

        def ring() -> None:
            if self._timers[timer] == number:
                act()

        self.clock.at(when, f"{self.name}: {timer}", lambda: self._run(timer, ring))

    def freeze(self) -> None:
        self.frozen = True

    def wake(self) -> None:
        self.frozen = False
        self.woke_at = self.clock.now
        for what, _ in self._kept:
            self.clock.after(0.0, what, self._catch_up)

    def kill(self) -> None:
        self.alive = False
        self._kept.clear()
        watchers, self._on_death = self._on_death, {}
        for notice in watchers.values():
            notice()

    def on_death(self, notice: Act) -> Callable[[], object]:
        """Call ``notice`` when this process dies; return a function that revokes this."""
        self._watchers += 1
        number = self._watchers
        self._on_death[number] = notice
        return lambda: self._on_death.pop(number, None)

    def _run(self, what: str, act: Act) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._kept.append((what, act))
        elif self._kept:
            self._kept.append((what, act))
            self.clock.after(0.0, what, self._catch_up)
        else:
            act()

    def _catch_up(self) -> None:
        """Run the first of what it kept; a killed process has nothing any more."""
        if self._kept and not self.frozen:
            _, act = self._kept.popleft()
            act()
