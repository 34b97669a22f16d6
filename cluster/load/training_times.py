"""How long hosts have worked for training runs, beside what routers report of forward calls."""

from __future__ import annotations

from typing import NamedTuple


class _Seen(NamedTuple):
    incarnation: int
    backward_s: float
    owner_s: float


class TrainingTimes:
    """Sums since the controller has begun to listen, over all incarnations of a host."""

    def __init__(self) -> None:
        self.backward_s: dict[str, float] = {}  # by host
        self.owner_s: dict[str, float] = {}
        self._seen: dict[str, _Seen] = {}

    def note(self, host: str, incarnation: int, backward_s: float, owner_s: float) -> None:
        """Take note of what a host reports since its start."""
        before, now = self._seen.get(host), _Seen(incarnation, backward_s, owner_s)
        self._seen[host] = now
        if before is None:
            # The first report is the baseline: the work in it is not current load.
            before = now
        elif before.incarnation != incarnation:
            before = _Seen(incarnation, 0.0, 0.0)
        for sums, new, old in (
            (self.backward_s, now.backward_s, before.backward_s),
            (self.owner_s, now.owner_s, before.owner_s),
        ):
            sums[host] = sums.get(host, 0.0) + max(0.0, new - old)

    def forget(self, host: str) -> None:
        """Forget a host that has left; its sums stay, as those of routers do."""
        self._seen.pop(host, None)

    def of(self, host: str) -> float:
        """Return how many seconds a host has worked for training runs."""
        return self.backward_s.get(host, 0.0) + self.owner_s.get(host, 0.0)
