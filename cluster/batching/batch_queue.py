"""The router service's state machine: it merges calls of many clients into one call per layer.

When the router is free, rows that wait for the same layer become one call; no row waits for others
to arrive. Clients take turns to choose the layer. All clients that wait for this layer share the
rows of the merged call evenly (max-min fairness), so that a large call is split and does not block
small ones. When the service holds too much, the client that holds most loses its newest call, so
that a client that floods the service is refused itself (longest queue drop, Suter et al. 1998).

The clock is an argument. Sockets, threads and tensors are in `actors/router_service/service.py`.

Shape suffixes: n = some rows of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np

from ..expert_keys import LayerKey

# Limits of the time after which a refused client is told to try again.
_LEAST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 5.0
# Weight of the last merged call in the moving average of their times.
_LAST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePolicy:
    max_batch_rows: int = 1024  # of one merged call
    max_calls: int = 256  # held at a time, in any phase
    max_bytes: int = 256 << 20  # of their tensors and of their answers
    away_s: float = 0.1  # before rows whose expert no host could compute are tried again


class ChangePhase(Enum):
    # Its tensors are being received.
    ARRIVING = "arriving"
    # Some of its rows wait to be computed.
    WAITING = "waiting"
    # Some of its rows are being computed.
    COMPUTING = "computing"
    # Its answer is being sent.
    LEAVING = "leaving"


@dataclass(slots=True, kw_only=True)
class ClientCall:
    """One call of one client; ``size_bytes`` counts its tensors and its answer."""

    number: int
    client: str
    key: LayerKey
    rows: int
    size_bytes: int
    deadline: float
    phase: ChangePhase = ChangePhase.ARRIVING
    not_before: float = 0.0
    lacks: str = ""  # which expert no host could compute when it was last tried
    was_cut: bool = False
    todo_n: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def can_go(self, now: float) -> bool:
        return self.phase is ChangePhase.WAITING and now >= self.not_before


class CallResult(NamedTuple):
    """The outcome of a call: all its rows, or an error with this code and message."""

    number: int
    code: str = ""
    message: str = ""
    retry_after_s: float | None = None


class Abort(NamedTuple):
    """Cut the connection of a call that missed its deadline while its client was to act."""

    number: int


class BatchSlice(NamedTuple):
    """Rows of a call that become part of a merged call."""

    number: int
    rows_n: np.ndarray


class Batch(NamedTuple):
    """One merged call."""

    key: LayerKey
    pieces: tuple[BatchSlice, ...]


@dataclass(slots=True)
class MergeStats:
    calls: int = 0  # calls that were answered
    rows: int = 0  # rows that were computed
    batches: int = 0
    merged: int = 0  # batches with rows of several calls
    refused: int = 0
    expired: int = 0
    parked: int = 0  # how often rows had to wait for an expert


class BatchQueue:
    """All calls that a router service holds; each ends once, with a `CallResult` or by leaving."""

    def __init__(self, policy: MergePolicy) -> None:
        self.policy = policy
        self.stats = MergeStats()
        # The first client has the next turn; each has its calls in the order of arrival.
        self._clients: dict[str, dict[int, ClientCall]] = {}
        self._calls: dict[int, ClientCall] = {}
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

    def arrive(self, call: ClientCall, now: float) -> list[CallResult]:
        """Add an announced call; return calls that are refused for it, perhaps itself."""
        self._calls[call.number] = call
        self._clients.setdefault(call.client, {})[call.number] = call
        self._bytes += call.size_bytes
        ends = []
        while len(self._calls) > self.policy.max_calls or self._bytes > self.policy.max_bytes:
            ends.append(self._refuse(call, now))
        return ends

    def ready(self, number: int) -> None:
        """Let a call wait for its turn: all its tensors have arrived."""
        call = self._calls.get(number)
        if call is not None and call.phase is ChangePhase.ARRIVING:
            call.phase = ChangePhase.WAITING
            call.todo_n = np.arange(call.rows)

    def leave(self, number: int) -> None:
        """Forget a call; calling this twice has no further effect."""
        call = self._calls.pop(number, None)
        if call is None:
            return
        self._bytes -= call.size_bytes
        mine = self._clients[call.client]
        del mine[number]
        if not mine:
            del self._clients[call.client]

    def _refuse(self, newcomer: ClientCall, now: float) -> CallResult:
        too_many = len(self._calls) > self.policy.max_calls

        def weight(client: str) -> tuple[int, bool]:
            calls = self._clients[client].values()
            # The larger is refused; among equals the newcomer's client.
            held = len(calls) if too_many else sum(call.size_bytes for call in calls)
            return held, client == newcomer.client

        heaviest = max(self._clients, key=weight)
        # A call of which a part was computed is kept, and so is one whose client is still sending
        # and would not read the refusal.
        droppable = [
            call
            for call in self._clients[heaviest].values()
            if call is newcomer
            or (call.phase is ChangePhase.WAITING and call.todo_n.size == call.rows)
        ]
        victim = droppable[-1] if droppable else newcomer
        self.stats.refused += 1
        pause_s = self._pause_s()
        what = f"{self.policy.max_calls} calls" if too_many else f"{self.policy.max_bytes:,} bytes"
        self.leave(victim.number)
        return CallResult(
            victim.number,
            "Busy",
            f"queue full ({what}); this client holds the largest share; try again in {pause_s:g} s",
            pause_s,
        )

    def _pause_s(self) -> float:
        """Estimate how long computing all waiting rows takes."""
        rows = sum(call.todo_n.size for call in self._calls.values())
        pause_s = self._batch_s * rows / self.policy.max_batch_rows
        return round(min(max(pause_s, _LEAST_PAUSE_S), _LONGEST_PAUSE_S), 3)

    # ---- merged calls ---------------------------------------------------------------------------

    def take(self, now: float) -> tuple[list[CallResult | Abort], Batch | None]:
        """Return the calls that expired, and the next batch for a router that is free now."""
        over = list(self._expire(now))
        calls = (call for mine in self._clients.values() for call in mine.values())
        first = next((call for call in calls if call.can_go(now)), None)
        if first is None:
            return over, None
        client = first.client
        others = [name for name in self._clients if name != client]
        # This client goes to the end of the turns.
        self._clients[client] = self._clients.pop(client)
        offers = []
        for name in (client, *others):
            mine = self._clients[name].values()
            fitting = [call for call in mine if call.key == first.key and call.can_go(now)]
            if fitting:
                offers.append(fitting)
        self._began = now
        return over, Batch(first.key, tuple(self._pieces(offers)))

    def _pieces(self, offers: list[list[ClientCall]]) -> Iterator[BatchSlice]:
        most = self.policy.max_batch_rows
        offers = offers[:most]  # so that each client gets a row at least
        wants = [sum(call.todo_n.size for call in calls) for calls in offers]
        for calls, share in zip(offers, fair_shares(wants, most), strict=True):
            left = share
            for call in calls:
                if not left:
                    break
                rows_n, call.todo_n = call.todo_n[:left], call.todo_n[left:]
                left -= rows_n.size
                call.phase = ChangePhase.COMPUTING
                yield BatchSlice(call.number, rows_n)

    def computed(
        self, piece: BatchSlice, lacking_n: np.ndarray, lacks: str, now: float
    ) -> list[CallResult]:
        """Note that ``piece`` was computed, except rows ``lacking_n`` that miss an expert.

        ``lacks`` names the expert. These rows are tried again as long as the deadline allows.
        """
        call = self._calls.get(piece.number)
        if call is None:
            return []
        self.stats.rows += piece.rows_n.size - lacking_n.size
        call.phase = ChangePhase.WAITING
        call.todo_n = np.sort(np.concatenate([call.todo_n, lacking_n]))
        call.lacks = lacks
        if lacking_n.size:
            call.not_before = now + self.policy.away_s
            self.stats.parked += 1
            # The next try needs time for its answer as well.
            if call.not_before + self.policy.away_s >= call.deadline:
                return [self._end(call, "ExpertUnavailable", lacks)]
        elif not call.todo_n.size:
            call.phase = ChangePhase.LEAVING
            self.stats.calls += 1
            return [CallResult(call.number)]
        return []

    def failed(self, piece: BatchSlice, code: str, message: str) -> list[CallResult]:
        call = self._calls.get(piece.number)
        return [] if call is None else [self._end(call, code, message)]

    def batch_over(self, batch: Batch, now: float) -> None:
        """Note the end of a batch; call this after `computed` and `failed` of its pieces."""
        took_s = now - self._began
        self._batch_s = (
            took_s if not self._batch_s else self._batch_s + _LAST * (took_s - self._batch_s)
        )
        self.stats.batches += 1
        self.stats.merged += len(batch.pieces) > 1

    # ---- time -----------------------------------------------------------------------------------

    def wake_at(self, now: float) -> float:
        """Return when `take` has something to do without an event; infinity if never."""
        due = [float("inf")]
        for call in self._calls.values():
            if not call.was_cut:
                due.append(call.deadline)
            if call.phase is ChangePhase.WAITING and call.not_before > now:
                due.append(call.not_before)
        return min(due)

    def _expire(self, now: float) -> Iterator[CallResult | Abort]:
        for call in [call for call in self._calls.values() if now >= call.deadline]:
            if call.phase is ChangePhase.LEAVING or call.phase is ChangePhase.ARRIVING:
                if not call.was_cut:
                    call.was_cut = True
                    self.stats.expired += 1
                    yield Abort(call.number)
                continue
            self.stats.expired += 1
            if call.lacks:
                yield self._end(call, "ExpertUnavailable", call.lacks)
            else:
                yield self._end(call, "Expired", "the call's deadline passed before its turn")

    def _end(self, call: ClientCall, code: str, message: str) -> CallResult:
        self.leave(call.number)
        return CallResult(call.number, code, message)


def fair_shares(wants: Sequence[int], most: int) -> list[int]:
    """Divide ``most`` by max-min fairness: raising a share would lower one that is not larger.

    No share is above its want. If ``most`` >= the number of ``wants``, each share is at least 1.
    """
    # In ascending order of wants, each gets what it wants, or an even part of the rest if that is
    # less; what small wants leave over goes to the larger ones.
    shares = [0] * len(wants)
    left = most
    by_want = sorted(range(len(wants)), key=wants.__getitem__)
    for done, at in enumerate(by_want):
        shares[at] = min(wants[at], left // (len(wants) - done))
        left -= shares[at]
    return shares
