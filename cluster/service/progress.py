"""Decide from the outside whether a model makes progress, for readiness checks.

A model is ready unless work is pending and its engine made no step for `STALLED_S`. So an idle or
sleeping model is ready, and so is a full one whose steps go on. If work ended because a trunk was
lost, or while no step was made, the model is in doubt. That counts as pending work until a step or
an idle engine is seen; otherwise a frozen trunk would look ready once its callers had given up. A
probe puts an idle model in doubt, too: it is work that the trunk does by saying that it is idle.
"""

from __future__ import annotations

from dataclasses import dataclass

# Longer than any step of a healthy engine; parked requests wait outside of steps.
STALLED_S = 10.0
# Ask the engine after this time without a token: a long prompt takes many steps before its first.
ASK_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkHeartbeat:
    """What the engine of one trunk reports about itself."""

    trunk: str  # identifies this start of a trunk, also among those that were lost
    steps: int  # since its start
    busy: bool  # it has requests: running, waiting or parked
    beats: bool  # it is healthy, and its loop looked for work lately


class ModelProgress:
    """The progress of one model; times are seconds of any monotonic clock."""

    def __init__(self, *, wake_s: float = 0.0, stalled_s: float = STALLED_S) -> None:
        """Set ``wake_s``, the time that a trunk may take to start; 0 if there always is one."""
        self._wake_s = wake_s
        self._stalled_s = stalled_s
        self._pending = 0
        self._doubted = False
        # When the last progress was seen, and when work began after the last time without any.
        self._moved_at = self._began_at = float("-inf")
        self._steps: dict[str, int] = {}

    # ---- what it is told ------------------------------------------------------------------------

    def began(self, now: float) -> None:
        """Note that a request was sent to a trunk."""
        if not self.in_question:
            self._moved_at = self._began_at = now
            self._steps.clear()
        self._pending += 1

    def probed(self, now: float) -> None:
        """Note that somebody asks whether the model is ready.

        A model that may have no trunk is left alone, since asking its engine would start one.
        """
        if not self.in_question and not self._wake_s:
            self._moved_at = self._began_at = now
            self._steps.clear()
            self._doubted = True

    def moved(self, now: float) -> None:
        """Note that a token or an answer arrived."""
        self._moved_at = now
        self._doubted = False

    def ended(self, now: float, *, lost: bool = False) -> None:
        """Note that a request ended; ``lost`` says that its trunk was lost or failed."""
        self._pending -= 1
        if lost or self._stalled(now):
            self._doubted = True
        if self._wake_s and not self._pending:
            # The model may have no trunk now, and asking its engine would start one.
            self._doubted = False

    def heard(self, heard: TrunkHeartbeat, now: float) -> None:
        before = self._steps.get(heard.trunk)
        self._steps[heard.trunk] = heard.steps
        stepped = before is not None and heard.steps > before
        if heard.beats and (stepped or not heard.busy):
            self.moved(now)

    def waking(self, now: float) -> None:
        """Note that there is no trunk and one is being started."""
        if now - self._began_at < self._wake_s:
            self._moved_at = now

    # ---- what it says ---------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How many requests were begun and have not ended."""
        return self._pending

    @property
    def in_question(self) -> bool:
        """Whether work is pending or was lost, or the trunk of an idle model has yet to answer."""
        return self._pending > 0 or self._doubted

    def is_ready(self, now: float) -> bool:
        return not (self.in_question and self._stalled(now))

    def wants_to_hear(self, now: float) -> bool:
        """Return whether to ask the trunk now for its engine's count of steps."""
        return self.in_question and now - self._moved_at >= ASK_AFTER_S

    def _stalled(self, now: float) -> bool:
        return now - self._moved_at >= self._stalled_s
