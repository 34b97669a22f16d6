"""Drain a cluster at its end: how long it waits for running work, and what it tells meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WorkKind = Literal["answer", "call"]
# Wait this much longer than `drain_s`, after which the ingress and the router service end their
# remaining work by themselves.
GRACE_S = 5.0
# Time for Serve's proxy to send the end of an answer that has left the ingress.
FLUSH_S = 1.0
# A part that is silent for longer is not waited for.
SILENT_S = 10.0
_NEWS_S = 1.0


@dataclass(slots=True)
class _Part:
    kind: WorkKind
    running: int
    heard_at: float


class Draining:
    """The parts that the cluster waits for; times are seconds of any monotonic clock."""

    def __init__(self, drain_s: float, now: float) -> None:
        self._drain_s = drain_s
        self._began_at = now
        self._parts: dict[str, _Part] = {}
        self._ended_at: float | None = None  # when a part last had nothing running any more
        self._told: list[str] = []
        self._told_at = float("-inf")

    def expect(self, part: str, kind: WorkKind, now: float) -> None:
        """Wait for this part from now on: it was told to refuse new work."""
        self._parts[part] = _Part(kind, 0, now)
        self._began_at = now

    def heard(self, part: str, running: int, now: float) -> None:
        """Note how many answers or calls this part still runs."""
        one = self._parts[part]
        if one.running and not running:
            self._ended_at = now
        one.running, one.heard_at = running, now

    @property
    def parts(self) -> list[str]:
        """The parts that the cluster waits for."""
        return list(self._parts)

    def waits(self, now: float) -> bool:
        """Return whether the cluster still waits for running work."""
        for part, one in list(self._parts.items()):
            if now - one.heard_at > SILENT_S:
                del self._parts[part]  # it is frozen or gone, and its work is lost
        if now - self._began_at > self._drain_s + GRACE_S:
            return False
        if any(one.running for one in self._parts.values()):
            return True
        return self._ended_at is not None and now - self._ended_at < FLUSH_S

    def news(self, now: float) -> str | None:
        """Return a line for people if it has changed, at most once a second; else None."""
        counts: dict[WorkKind, int] = {"answer": self._count("answer"), "call": self._count("call")}
        words = [_counted(count, kind) for kind, count in counts.items() if count]
        if words == self._told or (words and now - self._told_at < _NEWS_S):
            return None
        self._told, self._told_at = words, now
        if not words:
            return "ending: nothing is running any more"
        left_s = max(0.0, self._began_at + self._drain_s - now)
        are = "is" if sum(counts.values()) == 1 else "are"
        return f"ending: {' and '.join(words)} {are} still running, at most {left_s:.0f} s"

    def _count(self, kind: WorkKind) -> int:
        return sum(one.running for one in self._parts.values() if one.kind == kind)


def _counted(count: int, kind: WorkKind) -> str:
    return f"{count} {kind}{'' if count == 1 else 's'}"
