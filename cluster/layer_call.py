"""One layer's call in progress, as the router's state machine sees it, and how it ended.

Shape suffixes: N = T * K choices flattened, n = some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .events import Refused, Send
from .grouping import rows_of
from .placement import LayerKey


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended. ``lost`` are the choices (numbers in N) that nobody computed in time."""

    lost: np.ndarray
    error: Refused | None = None  # a refusal that no other host would answer differently

    @property
    def ok(self) -> bool:
        return self.error is None and self.lost.size == 0


@dataclass(slots=True)
class LayerCall:
    """One layer's call in progress."""

    key: LayerKey
    top_k: int
    max_rows: int
    deadline: float
    rotation: int
    ids_N: np.ndarray
    waiting_N: np.ndarray  # choices that no send carries, ascending
    live: dict[int, tuple[Send, float]] = field(default_factory=dict)  # seq -> (send, expires)
    # Given up after a deadline; a late answer still counts if nobody else has its choices.
    given_up: dict[int, Send] = field(default_factory=dict)
    avoid: set[tuple[str, int]] = field(default_factory=set)  # (host, expert) refused
    # Hosts that lack one of several experts: asked for each by itself, to learn which.
    apart: set[str] = field(default_factory=set)
    # Refused for a reason that holds for every host.
    failed: list[tuple[Send, Refused]] = field(default_factory=list)
    misses: int = 0

    def ended(self) -> Outcome:
        """What became of it, once nothing is under way any more."""
        lost = [self.waiting_N, *(send.choices for send, _ in self.failed)]
        error = self.failed[0][1] if self.failed else None
        return Outcome(np.sort(np.concatenate(lost)), error)

    def pieces(self, host: str, mine: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The choices ``mine`` as the rows of one send to ``host`` or of several."""
        if host not in self.apart:
            return rows_of(mine, self.top_k, self.max_rows)
        ids_n = self.ids_N[mine]
        groups = [mine[ids_n == expert] for expert in np.unique(ids_n)]
        return [piece for one in groups for piece in rows_of(one, self.top_k, self.max_rows)]
