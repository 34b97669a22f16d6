"""What happened to hosts and models, for the page's timeline.

It compares what is seen with what was seen before. Changes of placements and scalings have records
of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..reports.report import HostState

_KEPT = 200
_LOST = (HostState.NOT_ANSWERING, HostState.RESTARTING, HostState.GONE)

Level = Literal["good", "plain", "bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenHost:
    """A host at one moment."""

    state: HostState
    incarnation: int | None  # None: it has not reported, or has died
    draining: bool = False


class Timeline:
    """The last events, the newest at the end."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._hosts: dict[str, SeenHost] | None = None
        self._incarnations: dict[str, int] = {}
        self._asleep: frozenset[str] = frozenset()
        self._run: str | None = None
        self._error = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """Each event's Unix time ``at``, ``what``, ``level``, and the ``host`` if it is of one."""
        return list(self._events)

    def note(
        self,
        unix_s: float,
        hosts: Mapping[str, SeenHost],
        *,
        asleep: Collection[str] = (),
        run: str | None = None,
        error: str = "",
    ) -> None:
        """Take in what is seen now; ``run`` names the training run, ``error`` is the loop's."""
        before, first = self._hosts or {}, self._hosts is None
        for host in sorted(hosts.keys() | before.keys()):
            self._note_host(unix_s, host, before.get(host), hosts.get(host), quiet=first)
        self._hosts = dict(hosts)
        self._note_models(unix_s, frozenset(asleep), quiet=first)
        if run != self._run:
            if self._run is not None:
                self._add(unix_s, f"{self._run} has ended")
            if run is not None:
                self._add(unix_s, f"{run} trains", "good")
            self._run = run
        if error and error != self._error:
            self._add(unix_s, f"the controller failed: {error}", "bad")
        self._error = error

    def _note_host(
        self,
        unix_s: float,
        host: str,
        before: SeenHost | None,
        now: SeenHost | None,
        *,
        quiet: bool,
    ) -> None:
        known = self._incarnations.get(host)
        if now is None:
            self._incarnations.pop(host, None)
            self._add(unix_s, "has left the pool", "plain", host)
            return
        new = now.incarnation is not None and known is not None and now.incarnation != known
        if now.incarnation is not None:
            self._incarnations[host] = now.incarnation
        if quiet:
            return
        was_lost = before is not None and before.state in _LOST
        if now.state in _LOST and (before is None or before.state is not now.state):
            self._add(unix_s, f"is {now.state.words}", "bad", host)
        elif new:
            self._add(unix_s, "is replaced by a new process", "good", host)
        elif now.state not in _LOST and was_lost:
            self._add(unix_s, "answers again", "good", host)
        elif known is None and now.incarnation is not None:
            self._add(unix_s, "has joined", "good", host)
        if now.draining != (before is not None and before.draining):
            self._add(
                unix_s, "is being drained" if now.draining else "is used again", "plain", host
            )

    def _note_models(self, unix_s: float, asleep: frozenset[str], *, quiet: bool) -> None:
        if not quiet:
            for model in sorted(asleep - self._asleep):
                self._add(unix_s, f"model {model} falls asleep")
            for model in sorted(self._asleep - asleep):
                self._add(unix_s, f"model {model} wakes up", "good")
        self._asleep = asleep

    def _add(
        self, unix_s: float, what: str, level: Level = "plain", host: str | None = None
    ) -> None:
        event: dict[str, Any] = {"at": round(unix_s, 1), "what": what, "level": level}
        self._events.append(event if host is None else event | {"host": host})
