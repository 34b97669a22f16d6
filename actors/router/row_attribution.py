"""The rows of a trunk's batch: what they want, and which are left without a result.

A trunk's engine knows which request each row belongs to; a router used by itself has no engine,
and then a row without a result is an error of the whole call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ...cluster.placement import ExpertKey
from ...cluster.routing.expert_fallback import RowWishes
from ...cluster.routing.expert_options import RowGroups
from ...proto.errors import BadExpert, ExpertUnavailable, MoesaicError
from .layer_tensors import LayerJob

log = logging.getLogger(__name__)

# (rows of the batch, why they have no result); their values are zero.
Lost = Callable[[list[int], MoesaicError], None]
# Row of the batch -> part of its gate weights that was left out.
Dropped = Callable[[dict[int, float]], None]


class RowOwner(Protocol):
    """An engine: knows whose row is whose while its model's forward runs."""

    def fail_rows(self, rows: Sequence[int], error: MoesaicError) -> None: ...

    def row_groups(self) -> RowGroups | None: ...

    def drop_rows(self, dropped: Mapping[int, float]) -> None: ...


class BatchRows:
    """What a router tells the engine of its trunk, and hears from it."""

    def __init__(self, router: str, has: Callable[[list[ExpertKey]], bool]) -> None:
        """``has``: whether all of some experts are to be had now."""
        self.on_lost: Lost | None = None
        self.on_dropped: Dropped | None = None
        # What the rows of the batch in flight want of the experts; None: nothing in particular.
        self.groups: Callable[[], RowGroups | None] = lambda: None
        self.lost = 0
        # Rows that the layers still to come in this forward pass need not compute.
        self.dead: set[int] = set()
        self._router = router
        self._has = has

    def owned_by(self, owner: RowOwner) -> None:
        self.on_lost = owner.fail_rows
        self.groups = owner.row_groups
        self.on_dropped = owner.drop_rows

    def begin_step(self) -> None:
        """A forward pass starts: rows that were lost in the last one are forgotten."""
        self.dead.clear()

    def wishes(self, tokens: int, deadline_s: float) -> RowWishes | None:
        """None where nobody knows whose rows they are: then all wait until the deadline."""
        return None if self.on_lost is None else RowWishes(self.groups(), tokens, deadline_s)

    def lose(self, rows: list[int], error: MoesaicError) -> None:
        """Raises ``error`` where nobody is there to be told."""
        self.lost += len(rows)
        if self.on_lost is None:
            raise error
        self.dead.update(rows)
        self.on_lost(rows, error)

    def go_without(self, job: LayerJob, wishes: RowWishes, lost_n: np.ndarray) -> None:
        """Every row that lacks experts gets what its request wants for this case."""
        dropped, lost = wishes.judge(lost_n, job.weights_N, job.top_k)
        if dropped and self.on_dropped is not None:
            self.on_dropped(dropped)
        if lost:
            mine_n = lost_n[np.isin(lost_n // job.top_k, lost)]
            keys = job.experts(mine_n)
            error = ExpertUnavailable(
                f"{job.names(mine_n)}: no replica answered for as long as was waited"
            )
            error.is_back = lambda: self._has(keys)
            self.lose(lost, error)

    def report_bad(self, job: LayerJob) -> None:
        """Values that are not finite: told to an engine, passed on to anybody else."""
        rows = sorted({row for rows in job.bad_rows.values() for row in rows})
        names = ", ".join(str(job.key.expert(expert)) for expert in sorted(job.bad_rows))
        error = BadExpert(f"{names}: output is not finite")
        log.error("router %s: %s; rows %s", self._router, error, rows)
        if self.on_lost is not None:
            self.lose(rows, error)
