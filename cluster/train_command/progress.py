"""The lines that a training run shows while it goes on, each within 80 columns."""

from __future__ import annotations

from collections import deque

from .records import HeldOutRecord, StepRecord

# Steps over which the speed is a mean.
_WINDOW = 10


class Progress:
    """Makes a line of each record of a run of ``steps``."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._width = len(str(steps))
        self._last: deque[StepRecord] = deque(maxlen=_WINDOW)
        # Of the hosts, as the cluster says: 1 is even.
        self.balancedness: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a second, as a mean over the last steps; 0 before the first."""
        seconds = sum(one.seconds for one in self._last)
        return sum(one.tokens for one in self._last) / seconds if seconds else 0.0

    @property
    def left_s(self) -> float:
        """How long the rest will take; 0 if that is unknown."""
        if not self._last:
            return 0.0
        each = sum(one.seconds for one in self._last) / len(self._last)
        return each * (self._steps - self._last[-1].step)

    def step(self, record: StepRecord) -> str:
        if self._last and record.step <= self._last[-1].step:
            self._last.clear()  # a checkpoint was taken over
        self._last.append(record)
        parts = [
            f"step {record.step:>{self._width}}/{self._steps}",
            f"loss {record.loss:.3f}",
            f"{self.tokens_per_s:,.0f} tokens/s",
        ]
        if self.balancedness is not None:
            parts.append(f"balance {self.balancedness:.2f}")
        if record.step < self._steps:
            parts.append(f"{_duration(self.left_s)} left")
        if record.attempts > 1:
            parts.append(f"try {record.attempts}")
        return "  ".join(parts)

    @staticmethod
    def held_out(record: HeldOutRecord) -> str:
        return (
            f"held out after step {record.step}: perplexity {record.perplexity:.3f}, "
            f"loss {record.held_out_loss:.4f}"
        )


def _duration(seconds: float) -> str:
    """Return about how long something takes, in the largest unit that suits."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
