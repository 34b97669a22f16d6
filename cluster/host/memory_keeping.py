"""The state machine of a node's memory keeper: whose memory is kept, and until when.

Hosts hand their keeper the descriptors of the memory in which their experts lie. When a host dies,
its successor gets them back. What no successor asks for in time is freed. A model on a device has
one descriptor more for each chunk of the device's memory; chunks come and go.

Descriptors are numbers here, and connections are anything; `actors/host/memory/memory_keeper.py` is
the shell around it, and the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple


class KeptChunk(NamedTuple):
    """A chunk of a device's memory; one that has the same number later has another serial."""

    number: int
    serial: int
    descriptor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptModel:
    """What is kept of one model."""

    model: str
    descriptor: int  # of its memory
    chunks: tuple[KeptChunk, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Tell a host what its predecessor has left."""

    connection: Hashable
    kept: tuple[KeptModel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Close a descriptor, which frees its memory unless a process still maps it."""

    descriptor: int


KeeperCommand = Answer | Close


@dataclass(slots=True)
class _Memory:
    descriptor: int
    chunks: dict[int, KeptChunk] = field(default_factory=dict)  # by their numbers

    def close(self) -> list[KeeperCommand]:
        chunks = (Close(descriptor=chunk.descriptor) for chunk in self.chunks.values())
        return [Close(descriptor=self.descriptor), *chunks]


@dataclass(slots=True)
class _Host:
    connection: Hashable | None  # of the process that uses the memory now
    keep_s: float
    waiting: list[tuple[Hashable, float]] = field(default_factory=list)  # successors; their keep_s
    kept: dict[str, _Memory] = field(default_factory=dict)  # by models
    until: float = 0.0  # while there is no connection: when its memory is freed

    def close(self) -> list[KeeperCommand]:
        found = [command for memory in self.kept.values() for command in memory.close()]
        self.kept.clear()
        return found


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
        """Keep a model's memory, in place of all that was kept of this model before."""
        known = self._owned(connection)
        if known is None:
            return [Close(descriptor=descriptor)]
        before = known.kept.get(model)
        known.kept[model] = _Memory(descriptor)
        return [] if before is None else before.close()

    def keep_chunk(self, connection: Hashable, model: str, chunk: KeptChunk) -> list[KeeperCommand]:
        """Keep a chunk of a device's memory, in place of the one that had its number before."""
        memory = self._memory(connection, model)
        if memory is None:
            return [Close(descriptor=chunk.descriptor)]
        before = memory.chunks.get(chunk.number)
        memory.chunks[chunk.number] = chunk
        return [] if before is None else [Close(descriptor=before.descriptor)]

    def forget_chunk(
        self, connection: Hashable, model: str, number: int, serial: int
    ) -> list[KeeperCommand]:
        """Free a chunk, unless other memory has its number by now."""
        memory = self._memory(connection, model)
        chunk = None if memory is None else memory.chunks.get(number)
        if memory is None or chunk is None or chunk.serial != serial:
            return []
        del memory.chunks[number]
        return [Close(descriptor=chunk.descriptor)]

    def forget(self, connection: Hashable, model: str) -> list[KeeperCommand]:
        """Free a model's memory, which its host does not use any more."""
        known = self._owned(connection)
        memory = None if known is None else known.kept.pop(model, None)
        return [] if memory is None else memory.close()

    def leave(self, connection: Hashable, now: float) -> list[KeeperCommand]:
        """Free the memory of a host that ends for good."""
        known = self._owned(connection)
        found = [] if known is None else known.close()
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
        return [command for host in late for command in self._hosts.pop(host).close()]

    def _owned(self, connection: Hashable) -> _Host | None:
        """Return the host whose memory this connection's process uses."""
        known = self._hosts.get(self._names.get(connection, ""))
        return None if known is None or known.connection != connection else known

    def _memory(self, connection: Hashable, model: str) -> _Memory | None:
        known = self._owned(connection)
        return None if known is None else known.kept.get(model)

    def _take_over(self, known: _Host) -> list[KeeperCommand]:
        if known.connection is not None or not known.waiting:
            return []
        known.connection, known.keep_s = known.waiting.pop(0)
        kept = tuple(
            KeptModel(
                model=model, descriptor=memory.descriptor, chunks=tuple(memory.chunks.values())
            )
            for model, memory in known.kept.items()
        )
        return [Answer(connection=known.connection, kept=kept)]
