"""What a request asks of its experts: how many per token, and what to do without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# How long a batch waits for an expert: long enough for a host that is only busy for a moment.
SHORT_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingExpert:
    """``wait`` until the expert is back, ``fail``, or go on without it (``drop``) where its part
    of the token's gate weights is small enough."""

    mode: Literal["wait", "fail", "drop"] = "wait"
    wait_s: float | None = None  # None: the engine's time to wait, SHORT_WAIT_S otherwise
    most_dropped: float = 1.0  # part of a token's gate weights that may be left out of a layer

    def patience_s(self, deadline_s: float) -> float:
        """Seconds that a row waits in its batch, which waits with it: one that may wait longer
        (``wait``) does so outside."""
        wait_s = SHORT_WAIT_S if self.wait_s is None else self.wait_s
        return min(wait_s, deadline_s, SHORT_WAIT_S if self.mode == "wait" else wait_s)


WAIT = MissingExpert()


@dataclass(frozen=True, slots=True)
class RowWish:
    """What a request wants of the experts of its rows."""

    missing: MissingExpert = WAIT
    experts_per_token: int | None = None  # None: as many as the gate chose


NO_WISH = RowWish()


# Rows of a batch, request by request: (how many, what their request wants).
RowGroups = Sequence[tuple[int, RowWish]]
