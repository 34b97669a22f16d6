"""How the learning rate changes from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A rise from 0 over the first steps, and then a fall to a part of the whole at the end.

    ``linear`` and ``cosine`` are the curves of transformers' `get_linear_schedule_with_warmup` and
    `get_cosine_schedule_with_warmup`, but for where they end.
    """

    kind: Kind
    steps: int  # of the whole run
    warmup_steps: int = 0
    last_part: float = 0.0  # of the learning rate, when all steps are done

    def factor(self, step: int) -> float:
        """Return by what the learning rate of step ``step`` is multiplied; the first one is 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        over = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        over = min(over, 1.0)
        fall = 1.0 - over if self.kind == "linear" else (1.0 + math.cos(math.pi * over)) / 2
        return self.last_part + (1.0 - self.last_part) * fall
