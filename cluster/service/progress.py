"""Whether a model makes progress, as those see it who wait for its answers.

A model is ready unless work is pending and no step was made for `STALLED_S`. So one that is idle or
asleep is ready, and so is one that is full as long as its steps go on. Work that ended because its
trunk was lost, or while no step was made, leaves the model in doubt: until somebody sees a step or
an engine with room, that counts as pending work. Otherwise a frozen trunk would seem well whenever
its callers had given up.
"""

from __future__ import annotations

from dataclasses import dataclass

# Longer than any step of a healthy engine; requests are parked outside of the steps.
STALLED_S = 10.0
# Without a token for so long the engine is asked: a long prompt takes many steps before its first.
ASK_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What the engine of one trunk says of itself."""

    trunk: str  # tells a model's trunks apart, those that were lost too
    steps: int  # since it began
    busy: bool  # requests run or wait, parked ones too
    beats: bool  # it is healthy, and its loop looked for work not long ago


class Progress:
    """Of one model. Moments are seconds of any steady clock."""

    def __init__(self, *, wake_s: float = 0.0, stalled_s: float = STALLED_S) -> None:
        """``wake_s``: how long a trunk may take to start where the model may be without one."""
        self._wake_s = wake_s
        self._stalled_s = stalled_s
        self._pending = 0
        self._doubted = False
        # Since when nothing moved, and since when there has been work without a pause.
        self._moved_at = self._began_at = float("-inf")
        self._steps: dict[str, int] = {}

    # ---- what it is told ------------------------------------------------------------------------

    def began(self, now: float) -> None:
        """A request is on its way to a trunk."""
        if not self.in_question:
            self._moved_at = self._began_at = now
            self._steps.clear()
        self._pending += 1

    def moved(self, now: float) -> None:
        """A token, or an answer, came."""
        self._moved_at = now
        self._doubted = False

    def ended(self, now: float, *, lost: bool = False) -> None:
        """A request is over, whatever became of it; ``lost``: its trunk was lost, or failed."""
        self._pending -= 1
        if lost or self._stalled(now):
            self._doubted = True
        if self._wake_s and not self._pending:
            # The model may have been scaled to zero, and a question would start its trunk again.
            self._doubted = False

    def heard(self, heard: Heard, now: float) -> None:
        before = self._steps.get(heard.trunk)
        self._steps[heard.trunk] = heard.steps
        stepped = before is not None and heard.steps > before
        if heard.beats and (stepped or not heard.busy):
            self.moved(now)

    def waking(self, now: float) -> None:
        """There is no trunk, and one is being started."""
        if now - self._began_at < self._wake_s:
            self._moved_at = now

    # ---- what it says ---------------------------------------------------------------------------

    @property
    def in_question(self) -> bool:
        """Work is pending, or was lost."""
        return self._pending > 0 or self._doubted

    def is_ready(self, now: float) -> bool:
        return not (self.in_question and self._stalled(now))

    def wants_to_hear(self, now: float) -> bool:
        """Whether the engine is to be asked now."""
        return self.in_question and now - self._moved_at >= ASK_AFTER_S

    def _stalled(self, now: float) -> bool:
        return now - self._moved_at >= self._stalled_s
