"""A request's options for experts: how many per token, and what to do if one is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# How long a batch waits for a missing expert: enough for a host that is busy for a moment only.
SHORT_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingExpert:
    """What happens to a row if an expert is missing.

    ``wait`` until the expert is back, ``fail``, or compute the row without the expert (``drop``) if
    its part of the token's gate weights is at most ``most_dropped``.
    """

    mode: Literal["wait", "fail", "drop"] = "wait"
    wait_s: float | None = None  # None: in mode `wait` the engine's limit, else SHORT_WAIT_S
    most_dropped: float = 1.0  # fraction of a token's gate weights that a layer may leave out

    def patience_s(self, deadline_s: float) -> float:
        """Return how many seconds a row waits for an expert within its batch.

        The whole batch waits with it. Rows of mode ``wait`` may wait longer, but outside the batch.
        """
        wait_s = SHORT_WAIT_S if self.wait_s is None else self.wait_s
        return min(wait_s, deadline_s, SHORT_WAIT_S if self.mode == "wait" else wait_s)


WAIT = MissingExpert()


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """A request's options for the experts of its rows."""

    missing: MissingExpert = WAIT
    experts_per_token: int | None = None  # None: all that the gate chose


DEFAULT_EXPERT_OPTIONS = ExpertOptions()


# The rows of a batch in order, grouped by request: (number of rows, the request's options).
RowGroups = Sequence[tuple[int, ExpertOptions]]
