"""How a host answers for itself: whether it has started, whether it lives, whether it is ready.

A host is ready when it has started, its loop turns, a controller lists it, and a member of the
cluster got an answer from its listener. The last two stay true once they are, until the host
leaves: while the controller is away, the last placement stays in use, and the host serves. Whether
others still reach it, only they can say (`cluster/host/probes.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from ..host_answers import HostAnswers

# A loop that has not turned for longer does not live. A batch keeps the loop from turning, but
# routers send its calls to other hosts long before (`timeouts.attempt_s`: 2 s).
TURNS_S = 10.0


class HostQuestions:
    """What one start of a host answers; any thread may call any method."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin as a host that still starts."""
        self._clock = clock
        self._turned_at: Callable[[], float] | None = None
        self._listed = False
        self._probed = False

    def started(self, turned_at: Callable[[], float]) -> None:
        """Note that the loop runs; ``turned_at`` returns when it turned last."""
        self._turned_at = turned_at

    def listed(self) -> None:
        """Note that a controller has taken the host's report."""
        self._listed = True

    def probed(self) -> None:
        """Note that a member of the cluster has reached the host's listener."""
        self._probed = True

    def left(self) -> None:
        """Note that the host leaves the pool."""
        self._listed = False

    def answers(self) -> HostAnswers:
        startup = self._turned_at is not None
        # A process that still starts has no loop that could hang.
        turns = self._turned_at is None or self._clock() - self._turned_at() < TURNS_S
        return HostAnswers(startup, turns, startup and turns and self._listed and self._probed)
