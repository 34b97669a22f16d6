"""How a cluster ends: how long it waits for what runs, and what it says meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["answer", "call"]
# Behind `drain_s`, when the ingress and the router service end the rest themselves.
GRACE_S = 5.0
# So long Serve's proxy has for the end of an answer that has left the ingress.
FLUSH_S = 1.0
# A part that does not answer for so long is not waited for.
SILENT_S = 10.0
_NEWS_S = 1.0


@dataclass(slots=True)
class _Part:
    kind: Kind
    running: int
    heard_at: float


class Draining:
    """Which parts are waited for. Moments are seconds of any steady clock."""

    def __init__(self, drain_s: float, now: float) -> None:
        self._drain_s = drain_s
        self._began_at = now
        self._parts: dict[str, _Part] = {}
        self._ended_at: float | None = None  # what ran last
        self._told: list[str] = []
        self._told_at = float("-inf")

    def expect(self, part: str, kind: Kind, now: float) -> None:
        """This part was told to refuse what is new."""
        self._parts[part] = _Part(kind, 0, now)
        self._began_at = now

    def heard(self, part: str, running: int, now: float) -> None:
        """So many answers or calls run there."""
        one = self._parts[part]
        if one.running and not running:
            self._ended_at = now
        one.running, one.heard_at = running, now

    @property
    def parts(self) -> list[str]:
        """Those that are waited for."""
        return list(self._parts)

    def waits(self, now: float) -> bool:
        """Whether the cluster goes on for what runs."""
        for part, one in list(self._parts.items()):
            if now - one.heard_at > SILENT_S:
                del self._parts[part]  # it is frozen or gone, and what ran there
        if now - self._began_at > self._drain_s + GRACE_S:
            return False
        if any(one.running for one in self._parts.values()):
            return True
        return self._ended_at is not None and now - self._ended_at < FLUSH_S

    def news(self, now: float) -> str | None:
        """A line for people, where it is another one than before; at most one a second."""
        counts: dict[Kind, int] = {"answer": self._count("answer"), "call": self._count("call")}
        words = [_counted(count, kind) for kind, count in counts.items() if count]
        if words == self._told or (words and now - self._told_at < _NEWS_S):
            return None
        self._told, self._told_at = words, now
        if not words:
            return "ending: nothing is running any more"
        left_s = max(0.0, self._began_at + self._drain_s - now)
        are = "is" if sum(counts.values()) == 1 else "are"
        return f"ending: {' and '.join(words)} {are} still running, at most {left_s:.0f} s"

    def _count(self, kind: Kind) -> int:
        return sum(one.running for one in self._parts.values() if one.kind == kind)


def _counted(count: int, kind: Kind) -> str:
    return f"{count} {kind}{'' if count == 1 else 's'}"
