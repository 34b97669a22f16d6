"""The state machine of a node's memory keeper: whose memory is kept, and until when.

Hosts hand their keeper the descriptors of the memory in which their experts lie. When a host dies,
its successor gets them back. What no successor asks for in time is freed.

Descriptors are numbers here, and connections are anything; `actors/host/memory_keeper.py` is the
shell around it, and the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Tell a host what its predecessor has left: (model, descriptor of its memory)."""

    connection: Hashable
    kept: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Close a descriptor, which frees its memory unless a process still maps it."""

    descriptor: int


KeeperCommand = Answer | Close


@dataclass(slots=True)
class _Host:
    connection: Hashable | None  # of the process that uses the memory now
    keep_s: float
    waiting: list[tuple[Hashable, float]] = field(default_factory=list)  # successors; their keep_s
    kept: dict[str, int] = field(default_factory=dict)  # {model: descriptor}
    until: float = 0.0  # while there is no connection: when its memory is freed


class MemoryKeeping:
    """The memory of the hosts of one node."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}
        self._names: dict[Hashable, str] = {}

    @property
    def is_over(self) -> bool:
        """Whether no host is connected and nothing is kept."""
        return not self._names and not self._hosts

    @property
    def wake_at(self) -> float | None:
        """When `advance` has something to do next; None: not until something happens."""
        return min((h.until for h in self._hosts.values() if h.connection is None), default=None)

    def hello(self, connection: Hashable, host: str, keep_s: float) -> list[KeeperCommand]:
        """Take note of a host that has started; its memory outlives it by ``keep_s`` seconds.

        While its predecessor is connected it gets no answer: two processes must not write to one
        memory.
        """
        if connection in self._names:
            return []  # it has said so before
        self._names[connection] = host
        known = self._hosts.setdefault(host, _Host(None, keep_s))
        known.waiting.append((connection, keep_s))
        return self._take_over(known)

    def keep(self, connection: Hashable, model: str, descriptor: int) -> list[KeeperCommand]:
        """Keep a model's memory, in place of what was kept of this model before."""
        known = self._hosts.get(self._names.get(connection, ""))
        if known is None or known.connection != connection:
            return [Close(descriptor=descriptor)]
        before = known.kept.get(model)
        known.kept[model] = descriptor
        return [] if before is None else [Close(descriptor=before)]

    def forget(self, connection: Hashable, model: str) -> list[KeeperCommand]:
        """Free a model's memory, which its host does not use any more."""
        known = self._hosts.get(self._names.get(connection, ""))
        if known is None or known.connection != connection or model not in known.kept:
            return []
        return [Close(descriptor=known.kept.pop(model))]

    def leave(self, connection: Hashable, now: float) -> list[KeeperCommand]:
        """Free the memory of a host that ends for good."""
        known = self._hosts.get(self._names.get(connection, ""))
        found: list[KeeperCommand] = []
        if known is not None and known.connection == connection:
            found = [Close(descriptor=one) for one in known.kept.values()]
            known.kept.clear()
        return found + self.lost(connection, now)

    def lost(self, connection: Hashable, now: float) -> list[KeeperCommand]:
        """Take note that a host's process has ended."""
        host = self._names.pop(connection, None)
        if host is None:
            return []
        known = self._hosts[host]
        known.waiting = [one for one in known.waiting if one[0] != connection]
        if known.connection == connection:
            known.connection, known.until = None, now + known.keep_s
        found = self._take_over(known)
        if known.connection is None and not known.kept:
            del self._hosts[host]
        return found

    def advance(self, now: float) -> list[KeeperCommand]:
        """Free the memory of hosts that have been away for too long."""
        late = [h for h, one in self._hosts.items() if one.connection is None and now >= one.until]
        return [
            Close(descriptor=descriptor)
            for host in late
            for descriptor in self._hosts.pop(host).kept.values()
        ]

    def _take_over(self, known: _Host) -> list[KeeperCommand]:
        if known.connection is not None or not known.waiting:
            return []
        known.connection, known.keep_s = known.waiting.pop(0)
        return [Answer(connection=known.connection, kept=tuple(known.kept.items()))]
