"""A clock that a test sets."""

from __future__ import annotations


class FakeClock:
    """Takes the place of `time.monotonic`; ``step_s`` passes each time that somebody looks."""

    def __init__(self, now: float = 100.0, *, step_s: float = 0.0) -> None:
        self.now = now
        self.step_s = step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now
