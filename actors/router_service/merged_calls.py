"""The calls that a router service holds, and the one thread that merges and computes them.

It is a thin shell around `cluster/batching/batch_queue.py`. gRPC's threads bring calls and wait for
their outcome; the thread here owns the router.

Shape suffixes: T = tokens of a call, H = hidden size, K = assignments of a token, B = rows of a
merged call, n = some rows of one call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import torch
from torch import Tensor

from ...cluster.batching.batch_queue import (
    Abort,
    Batch,
    BatchQueue,
    BatchSlice,
    CallResult,
    ClientCall,
    MergePolicy,
)
from ...cluster.expert_keys import LayerKey
from ...cluster.reports.status import RouterServiceProcess
from ...cluster.routing.expert_options import ExpertOptions, MissingExpert, RowGroups
from ...cluster.tracing.layers import StepTrace
from ...proto.errors import (
    Busy,
    Ending,
    ExpertUnavailable,
    Expired,
    HostLost,
    InternalError,
    MoesaicError,
    describe_error,
    from_wire,
)
from ..engine.step_log import log_step
from ..router.router import Router
from ..tracing.client_calls import trace_client_call

log = logging.getLogger(__name__)

# Limits the damage if a wake-up is ever missed.
_LONGEST_WAIT_S = 5.0
# How long a merged call waits for an expert without an available replica; enough for a host that is
# busy for a moment. After it, the rows of that expert wait in the queue (`MergePolicy.away_s`), so
# that they do not hold up other calls.
_SHORT_WAIT = ExpertOptions(MissingExpert(mode="fail", wait_s=0.02))


@dataclass(slots=True, eq=False)
class Ticket:
    """One call and, once ``over`` is set, its outcome."""

    number: int
    cut: Callable[[], object]  # ends the client's connection with this call
    over: threading.Event = field(default_factory=threading.Event)
    error: MoesaicError | None = None
    lacks: str = ""  # the error about the expert that was unavailable at the last attempt
    x_TH: Tensor = field(default_factory=lambda: torch.empty(0))
    ids_TK: Tensor = field(default_factory=lambda: torch.empty(0))
    weights_TK: Tensor = field(default_factory=lambda: torch.empty(0))
    out_TH: Tensor = field(default_factory=lambda: torch.empty(0))

    def end(self, error: MoesaicError | None) -> None:
        self.error = error
        self.over.set()


class MergedCalls:
    """Computes the calls of clients. `close` does not close the router, which its owner does."""

    def __init__(
        self,
        router: Router,
        policy: MergePolicy,
        *,
        on_defect: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread; ``on_defect`` is called if a defect ends it."""
        self._router = router
        self._on_defect = on_defect
        self._clock = clock
        self._queue = BatchQueue(policy)
        self._numbers = count(1)
        self._tickets: dict[int, Ticket] = {}
        self._lost: list[tuple[Sequence[int], MoesaicError]] = []
        self._batch_rows = 0
        self._pieces: Sequence[BatchSlice] = ()  # of the running merged call
        self._closed = False
        # Set while draining: it ends the remaining calls in time, whatever the thread computes.
        self._late: threading.Timer | None = None
        self._defect: Exception | None = None
        # Guards the merger and the tickets, and wakes the thread.
        self._changed = threading.Condition()
        router.batch.owned_by(self)
        self._thread = threading.Thread(target=self._run, name="merged-calls", daemon=True)
        self._thread.start()

    def drain(self, drain_s: float) -> None:
        """Refuse new calls; end held ones with Ending if they take longer than ``drain_s``.

        A second call changes nothing.
        """
        late = Ending("the service is ending, and the call took longer than the time left")
        with self._changed:
            if self._late is None:
                self._late = threading.Timer(drain_s, self._end_all, [late])
                self._late.daemon = True
                self._late.start()

    @property
    def running(self) -> int:
        """The number of calls that are held."""
        return len(self._tickets)

    def close(self) -> None:
        """Wait for the running computation, then end all held calls with HostLost."""
        with self._changed:
            self._closed = True
            if self._late is not None:
                self._late.cancel()
            self._changed.notify()
        self._thread.join(self._router.policy.deadline_s)
        self._end_all(HostLost("the router service was closed"))

    def report(self) -> RouterServiceProcess:
        """Return counts for `status`. Raises InternalError if a defect has ended the thread."""
        if self._defect is not None:
            raise InternalError(f"the router service computes nothing any more: {self._defect!r}")
        with self._changed:
            stats = self._queue.stats
            return RouterServiceProcess(
                pid=os.getpid(),
                calls=stats.calls,
                rows=stats.rows,
                batches=stats.batches,
                merged_batches=stats.merged,
                refused_calls=stats.refused,
                expired_calls=stats.expired,
                expert_waits=stats.parked,
                held_calls=self._queue.held_calls,
                held_bytes=self._queue.held_bytes,
            )

    # ---- gRPC's threads -------------------------------------------------------------------------

    @contextmanager
    def call(
        self,
        client: str,
        key: LayerKey,
        *,
        rows: int,
        size_bytes: int,
        timeout_s: float,
        cut: Callable[[], object],
        traceparent: Sequence[str] = (),
    ) -> Iterator[Ticket]:
        """Hold one call until the block ends. Raises Busy if there is no room for it.

        ``size_bytes`` counts its tensors and its answer. ``traceparent`` has the client's values.
        """
        now = self._clock()
        with self._changed:
            ticket = Ticket(next(self._numbers), cut)
            asked = ClientCall(
                number=ticket.number,
                client=client,
                key=key,
                rows=rows,
                size_bytes=size_bytes,
                deadline=now + timeout_s,
            )
            self._tickets[ticket.number] = ticket
            if self._closed or self._defect is not None:
                ticket.end(HostLost("the router service is closed"))
            elif self._late is not None:
                ticket.end(Ending())
            else:
                self._tell(self._queue.arrive(asked, now))
                self._changed.notify()  # its deadline may be the earliest now
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "%s has come from %s",
                _name(ticket.number),
                client,
                extra={
                    "request_id": _name(ticket.number),
                    "model": key.model,
                    "layer": key.layer,
                    "rows": rows,
                },
            )
        try:
            with trace_client_call(_name(ticket.number), traceparent, key, rows):
                if ticket.error is not None:
                    raise ticket.error
                yield ticket
        finally:
            with self._changed:
                del self._tickets[ticket.number]
                self._queue.leave(ticket.number)

    def compute(self, ticket: Ticket, timeout_s: float) -> Tensor:
        """Wait for the answer (T, H) in x's dtype; the tensors are in ``ticket``.

        Raises Expired and what the router raises.
        """
        ticket.out_TH = torch.empty_like(ticket.x_TH)
        with self._changed:
            self._queue.ready(ticket.number)
            self._changed.notify()
        if not ticket.over.wait(timeout_s):
            if ticket.lacks:
                raise ExpertUnavailable(ticket.lacks)
            raise Expired("the call's deadline passed before it was computed")
        if ticket.error is not None:
            raise ticket.error
        return ticket.out_TH

    # ---- called by the router, as `RowOwner` ----------------------------------------------------

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None:
        self._lost.append((rows, error))

    def row_groups(self) -> RowGroups:
        return [(self._batch_rows, _SHORT_WAIT)]

    def log_step(self, router: str, step: int) -> StepTrace | None:
        return log_step(
            router, step, lambda: [_name(piece.number) for piece in self._pieces], "clients' calls"
        )

    def drop_rows(self, dropped: Mapping[int, float]) -> None:
        raise AssertionError(f"calls of the router service drop no experts: {dropped}")

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                taken = self._next()
                if taken is None:
                    return
                self._compute(*taken)
        except Exception as defect:
            # After any error the thread ends: its calls fail now, and Ray starts another service.
            self._defect = defect
            log.exception("the router service computes nothing any more")
            self._end_all(InternalError(f"a defect: {defect!r}"))
            self._on_defect()

    def _next(self) -> tuple[Batch, list[Ticket]] | None:
        """Wait for the next merged call; return None once this object is closed."""
        with self._changed:
            while not self._closed:
                now = self._clock()
                over, batch = self._queue.take(now)
                self._tell(over)
                if batch is not None:
                    return batch, [self._tickets[piece.number] for piece in batch.pieces]
                due_s = self._queue.wake_at(now) - now
                self._changed.wait(min(max(due_s, 0.0), _LONGEST_WAIT_S))
            return None

    def _compute(self, batch: Batch, tickets: list[Ticket]) -> None:
        self._lost.clear()
        self._pieces = batch.pieces
        self._batch_rows = sum(piece.rows_n.size for piece in batch.pieces)
        failure: MoesaicError | None = None
        y_BH: Tensor | None = None
        try:
            self._router.begin_step()
            y_BH = self._router.forward(batch.key, *_merge(batch.pieces, tickets))
        except MoesaicError as error:
            failure = error
        except Exception as error:
            # Whatever went wrong, only these calls fail; the service keeps running.
            log.exception(
                "a merged call of %s failed",
                batch.key,
                extra={"requests": [_name(piece.number) for piece in batch.pieces]},
            )
            failure = InternalError(describe_error(error))
        finally:
            self._router.end_step()
        ends: list[CallResult] = []
        now = self._clock()
        start = 0
        with self._changed:
            for piece, ticket in zip(batch.pieces, tickets, strict=True):
                rows = piece.rows_n.size
                if y_BH is None:
                    assert failure is not None
                    ends += self._queue.failed(piece, failure.code, str(failure))
                else:
                    ticket.out_TH[torch.from_numpy(piece.rows_n)] = y_BH[start : start + rows]
                    ends += self._outcome(piece, ticket, start, now)
                start += rows
            self._queue.batch_over(batch, now)
            self._tell(ends)

    def _outcome(
        self, piece: BatchSlice, ticket: Ticket, start: int, now: float
    ) -> list[CallResult]:
        """Report the outcome of a piece, whose rows begin at ``start`` in the merged call."""
        lacking = np.zeros(piece.rows_n.size, dtype=bool)
        lacks = ""
        for rows, error in self._lost:
            mine = [row - start for row in rows if 0 <= row - start < piece.rows_n.size]
            if mine and not isinstance(error, ExpertUnavailable):
                return self._queue.failed(piece, error.code, str(error))
            if mine:
                lacking[mine] = True
                lacks = str(error)
        ticket.lacks = lacks
        return self._queue.computed(piece, piece.rows_n[lacking], lacks, now)

    def _tell(self, over: Iterable[CallResult | Abort]) -> None:
        """End or cut the calls that the merger names; the caller holds the lock."""
        for event in over:
            ticket = self._tickets.get(event.number)
            if ticket is None:
                continue
            if isinstance(event, Abort):
                ticket.cut()
                continue
            error = from_wire(event.code, event.message) if event.code else None
            if isinstance(error, Busy):
                error.retry_after_s = event.retry_after_s
            ticket.end(error)

    def _end_all(self, error: MoesaicError) -> None:
        with self._changed:
            for ticket in self._tickets.values():
                if not ticket.over.is_set():
                    ticket.end(error)


def _name(number: int) -> str:
    """Return how the log names a client's call."""
    return f"call-{number}"


def _merge(
    pieces: Sequence[BatchSlice], tickets: Sequence[Ticket]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge pieces to x_BH, ids_BK and weights_BK; pad calls with fewer assignments."""
    rows = [torch.from_numpy(piece.rows_n) for piece in pieces]
    if len(pieces) == 1 and rows[0].numel() == tickets[0].x_TH.shape[0]:
        (alone,) = tickets
        return alone.x_TH, alone.ids_TK, alone.weights_TK
    x_BH = torch.cat([t.x_TH[n] for t, n in zip(tickets, rows, strict=True)])
    most = max(ticket.ids_TK.shape[1] for ticket in tickets)
    ids_BK = torch.full((x_BH.shape[0], most), -1, dtype=torch.int32)
    weights_BK = torch.zeros(ids_BK.shape)
    start = 0
    for ticket, row_n in zip(tickets, rows, strict=True):
        here = slice(start, start + row_n.numel()), slice(ticket.ids_TK.shape[1])
        ids_BK[here], weights_BK[here] = ticket.ids_TK[row_n], ticket.weights_TK[row_n]
        start += row_n.numel()
    return x_BH, ids_BK, weights_BK
