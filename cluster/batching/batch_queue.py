"""The router service's state machine: calls of clients in, merged calls of one layer out.

Whatever waits for the same layer when the router is free becomes one call of it; nothing waits for
more to arrive. Clients take turns: the one whose turn it is names the layer, and all that wait for
it share the rows of the merged call evenly (max-min fairness), so that a large call goes in pieces
and never stands before small ones. When more is held than may be, the client that holds most loses
its newest call (as in longest queue drop, Suter et al. 1998), so that one that floods refuses
itself.

No clock, no sockets, no threads, no tensors: `actors/router_service/service.py` brings those.

Shape suffixes: n = some rows of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from ..placement import LayerKey

# What is said to whoever was refused: not before, and not after.
_LEAST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 5.0
# Weight of the last merged call in their average time.
_LAST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePolicy:
    max_batch_rows: int = 1024  # of one merged call
    max_calls: int = 256  # held at a time: arriving, waiting, computed, leaving
    max_bytes: int = 256 << 20  # of their tensors, and of their answers
    away_s: float = 0.1  # before rows whose experts nobody has are tried again


class Phase(Enum):
    # Its tensors are on their way.
    ARRIVING = "arriving"
    # Some of its rows wait for their turn.
    WAITING = "waiting"
    # Some of its rows are being computed.
    COMPUTING = "computing"
    # It was answered; its answer is on its way.
    LEAVING = "leaving"


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of one client; ``size_bytes`` are those of its tensors and of its answer."""

    number: int
    client: str
    key: LayerKey
    rows: int
    size_bytes: int
    deadline: float
    phase: Phase = Phase.ARRIVING
    not_before: float = 0.0
    lacks: str = ""  # which expert nobody had when it was last tried
    was_cut: bool = False
    todo_n: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def can_go(self, now: float) -> bool:
        return self.phase is Phase.WAITING and now >= self.not_before


class End(NamedTuple):
    """A call has its outcome: all its rows, or the error of this code and message."""

    number: int
    code: str = ""
    message: str = ""
    retry_after_s: float | None = None


class Cut(NamedTuple):
    """The time of a call is up, and only the other side could end it: its connection is cut."""

    number: int


class Piece(NamedTuple):
    """Rows of a call that go into a merged one."""

    number: int
    rows_n: np.ndarray


class Batch(NamedTuple):
    """One merged call."""

    key: LayerKey
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class MergeStats:
    calls: int = 0  # that were answered
    rows: int = 0  # computed
    batches: int = 0
    merged: int = 0  # batches with rows of several calls
    refused: int = 0
    expired: int = 0
    parked: int = 0  # times that rows had to wait for an expert


class Merger:
    """All calls that a router service holds. Each ends once: by `End`, or because it left."""

    def __init__(self, policy: MergePolicy) -> None:
        self.policy = policy
        self.stats = MergeStats()
        # The first client has the next turn; calls of each in the order of their arrival.
        self._clients: dict[str, dict[int, Call]] = {}
        self._calls: dict[int, Call] = {}
        self._bytes = 0
        self._batch_s = 0.0
        self._began = 0.0

    @property
    def held_calls(self) -> int:
        return len(self._calls)

    @property
    def held_bytes(self) -> int:
        return self._bytes

    # ---- calls come and go ----------------------------------------------------------------------

    def arrive(self, call: Call, now: float) -> list[End]:
        """A call is announced. Somebody's newest call may be refused for it: its own, say."""
        self._calls[call.number] = call
        self._clients.setdefault(call.client, {})[call.number] = call
        self._bytes += call.size_bytes
        ends = []
        while len(self._calls) > self.policy.max_calls or self._bytes > self.policy.max_bytes:
            ends.append(self._refuse(call, now))
        return ends

    def ready(self, number: int) -> None:
        """All its tensors are here."""
        call = self._calls.get(number)
        if call is not None and call.phase is Phase.ARRIVING:
            call.phase = Phase.WAITING
            call.todo_n = np.arange(call.rows)

    def leave(self, number: int) -> None:
        """Nothing of it is wanted or held any more. Leaving twice is leaving once."""
        call = self._calls.pop(number, None)
        if call is None:
            return
        self._bytes -= call.size_bytes
        mine = self._clients[call.client]
        del mine[number]
        if not mine:
            del self._clients[call.client]

    def _refuse(self, newcomer: Call, now: float) -> End:
        too_many = len(self._calls) > self.policy.max_calls

        def weight(client: str) -> tuple[int, bool]:
            calls = self._clients[client].values()
            held = len(calls) if too_many else sum(call.size_bytes for call in calls)
            return held, client == newcomer.client

        heaviest = max(self._clients, key=weight)
        # What has been computed in part, or is not yet here to be told, is not given up.
        droppable = [
            call
            for call in self._clients[heaviest].values()
            if call is newcomer or (call.phase is Phase.WAITING and call.todo_n.size == call.rows)
        ]
        victim = droppable[-1] if droppable else newcomer
        self.stats.refused += 1
        pause_s = self._pause_s()
        what = f"{self.policy.max_calls} calls" if too_many else f"{self.policy.max_bytes:,} bytes"
        self.leave(victim.number)
        return End(
            victim.number,
            "Busy",
            f"the router service holds {what}, and of these this client most; try again in "
            f"{pause_s:g} s",
            pause_s,
        )

    def _pause_s(self) -> float:
        """How long what waits takes to be computed, about."""
        rows = sum(call.todo_n.size for call in self._calls.values())
        pause_s = self._batch_s * rows / self.policy.max_batch_rows
        return round(min(max(pause_s, _LEAST_PAUSE_S), _LONGEST_PAUSE_S), 3)

    # ---- merged calls ---------------------------------------------------------------------------

    def take(self, now: float) -> tuple[list[End | Cut], Batch | None]:
        """The router is free: what is too late ends, and what is to be computed next."""
        over = list(self._expire(now))
        calls = (call for mine in self._clients.values() for call in mine.values())
        first = next((call for call in calls if call.can_go(now)), None)
        if first is None:
            return over, None
        client = first.client
        others = [name for name in self._clients if name != client]
        # The others come first the next time.
        self._clients[client] = self._clients.pop(client)
        offers = []
        for name in (client, *others):
            mine = self._clients[name].values()
            fitting = [call for call in mine if call.key == first.key and call.can_go(now)]
            if fitting:
                offers.append(fitting)
        self._began = now
        return over, Batch(first.key, tuple(self._pieces(offers)))

    def _pieces(self, offers: list[list[Call]]) -> Iterator[Piece]:
        most = self.policy.max_batch_rows
        offers = offers[:most]
        wants = [sum(call.todo_n.size for call in calls) for calls in offers]
        for calls, share in zip(offers, fair_shares(wants, most), strict=True):
            left = share
            for call in calls:
                if not left:
                    break
                rows_n, call.todo_n = call.todo_n[:left], call.todo_n[left:]
                left -= rows_n.size
                call.phase = Phase.COMPUTING
                yield Piece(call.number, rows_n)

    def computed(self, piece: Piece, lacking_n: np.ndarray, lacks: str, now: float) -> list[End]:
        """The rows of ``piece`` are there, but for those that lack an expert: ``lacks`` says which.
        They are tried again until there is no time for it."""
        call = self._calls.get(piece.number)
        if call is None:
            return []
        self.stats.rows += piece.rows_n.size - lacking_n.size
        call.phase = Phase.WAITING
        call.todo_n = np.sort(np.concatenate([call.todo_n, lacking_n]))
        call.lacks = lacks
        if lacking_n.size:
            call.not_before = now + self.policy.away_s
            self.stats.parked += 1
            # So that the answer is there in time, too.
            if call.not_before + self.policy.away_s >= call.deadline:
                return [self._end(call, "ExpertUnavailable", lacks)]
        elif not call.todo_n.size:
            call.phase = Phase.LEAVING
            self.stats.calls += 1
            return [End(call.number)]
        return []

    def failed(self, piece: Piece, code: str, message: str) -> list[End]:
        call = self._calls.get(piece.number)
        return [] if call is None else [self._end(call, code, message)]

    def batch_over(self, batch: Batch, now: float) -> None:
        """Behind what became of its pieces."""
        took_s = now - self._began
        self._batch_s = (
            took_s if not self._batch_s else self._batch_s + _LAST * (took_s - self._batch_s)
        )
        self.stats.batches += 1
        self.stats.merged += len(batch.pieces) > 1

    # ---- time -----------------------------------------------------------------------------------

    def wake_at(self, now: float) -> float:
        """When `take` has something to do by itself; infinity: never."""
        due = [float("inf")]
        for call in self._calls.values():
            if not call.was_cut:
                due.append(call.deadline)
            if call.phase is Phase.WAITING and call.not_before > now:
                due.append(call.not_before)
        return min(due)

    def _expire(self, now: float) -> Iterator[End | Cut]:
        for call in [call for call in self._calls.values() if now >= call.deadline]:
            if call.phase is Phase.LEAVING or call.phase is Phase.ARRIVING:
                if not call.was_cut:
                    call.was_cut = True
                    self.stats.expired += 1
                    yield Cut(call.number)
                continue
            self.stats.expired += 1
            if call.lacks:
                yield self._end(call, "ExpertUnavailable", call.lacks)
            else:
                yield self._end(call, "Expired", "the call's time was over before its turn came")

    def _end(self, call: Call, code: str, message: str) -> End:
        self.leave(call.number)
        return End(call.number, code, message)


def fair_shares(wants: Sequence[int], most: int) -> list[int]:
    """``most`` shared out so that nobody gets more than it wants, and nobody could get more without
    somebody who has no more than it getting less. With ``most`` >= the number of ``wants`` each
    gets at least 1."""
    shares = [0] * len(wants)
    left = most
    by_want = sorted(range(len(wants)), key=wants.__getitem__)
    for done, at in enumerate(by_want):
        shares[at] = min(wants[at], left // (len(wants) - done))
        left -= shares[at]
    return shares
