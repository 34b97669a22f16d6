"""When the controller acts, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..placement import ModelShape
from ..planner.plan import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """When the controller acts, and how fast. Seconds and bytes."""

    balance: Policy = field(default_factory=Policy)
    auto: bool = True  # whether it balances by itself
    every_s: float = 10.0
    budget: float = 0.05  # part of all replicas that one balancing may load
    budget_bytes: int | None = None  # that it may load; counts in the place of the part
    gone_s: float = 30.0  # a host that is away for so long is planned around
    lease_s: float = 10.0  # a router that is silent for so long holds nothing up
    bytes_per_s: float = 200e6  # that one host loads in the background
    batch_bytes: int = 64 << 20
    retry_s: float = 5.0  # behind a load that failed

    def moves(self, replicas: int, models: Sequence[ModelShape]) -> int:
        """How many of ``replicas`` one balancing may load."""
        if self.budget_bytes is not None:
            return moves_of(self.budget_bytes, models)
        return max(1, int(self.budget * replicas))


def moves_of(budget_bytes: int, models: Sequence[ModelShape]) -> int:
    """How many replicas so many bytes are for sure: experts count as the largest ones. One may
    always be loaded, or nothing would ever be."""
    largest = max((shape.expert_bytes for shape in models), default=0)
    return max(1, budget_bytes // max(1, largest))


# Behind a shift of the traffic: of this the rates are to know.
_LOOK_S = 1.0
# How many times `every_s` the balancer keeps still behind a rollback or a move that failed.
_REST = 10


class Rhythm:
    """Every so often, soon behind a shift of the traffic, and not for long behind a failure."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._looked_at: float | None = None
        self._rests_until = 0.0

    def rest(self, now: float) -> None:
        self._rests_until = now + _REST * self._every_s

    def looked(self, now: float) -> None:
        self._looked_at = now

    def is_due(self, now: float, shifted_at: float | None) -> bool:
        """``shifted_at``: when the traffic last became another."""
        if now < self._rests_until:
            return False
        if self._looked_at is None or now >= self._looked_at + self._every_s:
            return True
        return shifted_at is not None and self._looked_at < shifted_at + _LOOK_S <= now
