"""The rows of a trunk's batch: their requests' options, and which rows end without a result.

A trunk's engine knows which request each row belongs to. A router that is used without an engine
cannot tell, so one row without a result fails the whole call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.routing.expert_fallback import BatchExpertOptions
from ...cluster.routing.expert_options import RowGroups
from ...cluster.routing.layer_call import Outcome
from ...cluster.tracing.layers import LayerTrace, StepTrace
from ...proto.errors import BadExpert, ExpertUnavailable, MoesaicError, from_wire
from ..transport.base import call_id
from .layer_tensors import LayerTensors

log = logging.getLogger(__name__)

_NOTHING = nullcontext()

# Called with rows of the batch and why they have no result; their values are zero.
OnLost = Callable[[list[int], MoesaicError], None]
# Called with a map from row of the batch to the share of its gate weights that was left out.
OnDropped = Callable[[dict[int, float]], None]


class RowOwner(Protocol):
    """An engine: it knows which request each row belongs to while its model's forward runs."""

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None: ...

    def row_groups(self) -> RowGroups | None: ...

    def drop_rows(self, dropped: Mapping[int, float]) -> None: ...

    def log_step(self, router: str, step: int) -> StepTrace | None:
        """Log, at the debug level, which requests are in the forward pass that begins now.

        Returns its trace, if one of its requests is sampled.
        """
        ...


class RowAttribution:
    """The exchange between a router and its trunk's engine about the rows of the batch."""

    def __init__(
        self,
        router: str,
        has: Callable[[list[ExpertKey]], bool],
        expecting: Callable[[list[ExpertKey]], AbstractContextManager[None]],
    ) -> None:
        """Set up without an engine.

        ``has`` says whether all of the given experts are available; inside of ``expecting``, the
        router finds out by itself when they are.
        """
        self.on_lost: OnLost | None = None
        self.on_dropped: OnDropped | None = None
        # Returns the expert options of the rows in flight; None: all have the defaults.
        self.groups: Callable[[], RowGroups | None] = lambda: None
        # Called with the router's name and the number of each forward pass that begins.
        self.log_step: Callable[[str, int], StepTrace | None] | None = None
        # Of this forward pass; None: none of its requests is sampled.
        self._trace: StepTrace | None = None
        self.lost = 0
        # Rows that the remaining layers of this forward pass need not compute.
        self.dead: set[int] = set()
        self._router = router
        self._has = has
        self._expecting = expecting

    def owned_by(self, owner: RowOwner) -> None:
        self.on_lost = owner.fail_rows
        self.groups = owner.row_groups
        self.on_dropped = owner.drop_rows
        self.log_step = owner.log_step

    def begin_step(self, step: int) -> None:
        """Start forward pass number ``step``: forget the rows that were lost in the last one."""
        self.dead.clear()
        if self.log_step is not None:
            self._trace = self.log_step(self._router, step)

    def tracing(self, key: LayerKey) -> AbstractContextManager[None]:
        """Return a context in which a layer is computed; it does nothing unless it is traced."""
        return _NOTHING if self._trace is None else self._trace.tracing(*key)

    @property
    def layer_trace(self) -> LayerTrace | None:
        """The trace of the layer that is computed now."""
        return None if self._trace is None else self._trace.layer

    def options(self, tokens: int, deadline_s: float) -> BatchExpertOptions | None:
        """Return the rows' options; None without an engine: all rows wait until the deadline."""
        return (
            None if self.on_lost is None else BatchExpertOptions(self.groups(), tokens, deadline_s)
        )

    def lose(self, rows: list[int], error: MoesaicError) -> None:
        """Tell the engine that ``rows`` failed with ``error``; without an engine, raise it."""
        self.lost += len(rows)
        if self.on_lost is None:
            raise error
        self.dead.update(rows)
        self.on_lost(rows, error)

    def settle(
        self,
        tensors: LayerTensors,
        options: BatchExpertOptions | None,
        outcome: Outcome,
        deadline_s: float,
    ) -> None:
        """Report what is lost, as the rows' options say; without an engine, raise an error."""
        if outcome.ok:
            return
        if outcome.error is not None:
            error = from_wire(outcome.error.code, outcome.error.message)
        elif options is not None:
            self._apply_fallback(tensors, options, outcome.lost)
            return
        else:
            error = ExpertUnavailable(
                f"{tensors.names(outcome.lost)}: no replica answered within {deadline_s:g} s"
            )
        self.lose(tensors.rows_of(outcome.lost), error)

    def _apply_fallback(
        self, tensors: LayerTensors, options: BatchExpertOptions, lost_n: np.ndarray
    ) -> None:
        """Drop or fail each row that lacks experts, as its request's options say."""
        dropped, lost = options.decide(lost_n, tensors.weights_N, tensors.top_k)
        if dropped and self.on_dropped is not None:
            self.on_dropped(dropped)
        if lost:
            mine_n = lost_n[np.isin(lost_n // tensors.top_k, lost)]
            keys = tensors.experts(mine_n)
            error = ExpertUnavailable(
                f"{tensors.names(mine_n)}: no replica answered in the time that the request allows"
            )
            error.is_back = lambda: self._has(keys)
            error.expecting = lambda: self._expecting(keys)
            self.lose(lost, error)

    def report_bad(self, tensors: LayerTensors) -> None:
        """Report rows that are not finite to the engine; without an engine, pass them on."""
        rows = sorted({row for rows in tensors.bad_rows.values() for row in rows})
        names = ", ".join(str(tensors.key.expert(expert)) for expert in sorted(tensors.bad_rows))
        error = BadExpert(f"{names}: the output has NaN or infinite values")
        log.error(
            "router %s: %s; the rows are %s",
            self._router,
            error,
            rows,
            extra={"call_id": call_id(self._router, tensors.step, tensors.key.layer)},
        )
        if self.on_lost is not None:
            self.lose(rows, error)
