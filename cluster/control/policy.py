"""The controller's policy: when it acts, and how fast."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from ..placement import ModelShape
from ..planner.plan import PlannerPolicy
from ..planner.upkeep import ReplicaUpkeep
from ..training.runs import TrainingRuns
from ..training.step_bytes import GRPC_BYTES_PER_S, SHARED_BYTES_PER_S, replica_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """When the controller acts, and how fast; in seconds and bytes."""

    balance: PlannerPolicy = field(default_factory=PlannerPolicy)
    auto: bool = True  # whether it balances by itself
    every_s: float = 10.0  # how often it checks the balance
    budget: float = 0.05  # fraction of all replicas that one rebalance may load
    budget_bytes: int | None = None  # bytes that one rebalance may load; replaces `budget`
    host_timeout_s: float = 30.0  # a host that is away for longer gets no experts in plans
    lease_s: float = 10.0  # a router that is silent for longer no longer delays evictions
    bytes_per_s: float = 200e6  # mean rate at which one host loads in the background
    batch_bytes: int = 64 << 20  # bytes of one background load
    retry_s: float = 5.0  # pause of a host after a load that failed

    def moves(self, replicas: int, models: Sequence[ModelShape]) -> int:
        """Return how many replicas one rebalance may load, of ``replicas`` in all."""
        if self.budget_bytes is not None:
            return moves_of(self.budget_bytes, models)
        return max(1, int(self.budget * replicas))


def moves_of(budget_bytes: int, models: Sequence[ModelShape]) -> int:
    """Return how many replicas surely fit into a budget of bytes, at least 1.

    Each counts with the bytes of the largest expert. With 0 nothing would ever be balanced.
    """
    largest = max((shape.expert_bytes for shape in models), default=0)
    return max(1, budget_bytes // max(1, largest))


def training_upkeep(training: TrainingRuns, nodes: Collection[str]) -> ReplicaUpkeep | None:
    """Return what replicas of the model that is trained cost; None if no run has done a step.

    ``nodes`` are the machines of the hosts.
    """
    run, told = training.alive, training.told
    if run is None or told.parts is None or not told.step_s:
        return None
    elsewhere_bytes, at_owner_bytes = replica_bytes(
        gradient=told.parts.largest.gradient,
        weights=told.parts.largest.version,
        redundancy=told.parts.redundancy,
    )
    return ReplicaUpkeep(
        model=run.model,
        owners=told.parts.owners,
        elsewhere_bytes=elsewhere_bytes,
        at_owner_bytes=at_owner_bytes,
        bytes_per_s=SHARED_BYTES_PER_S if len(nodes) == 1 else GRPC_BYTES_PER_S,
        step_s=told.step_s,
    )


# The planner's horizon for filling a new host: the host will stay, so all its loads pay.
_FOR_GOOD_S = 1e9


def filling(policy: PlannerPolicy, fill: int, *, hosts: int, replicas: int) -> PlannerPolicy:
    """Return the policy of a plan that gives ``fill`` empty hosts their part of the replicas."""
    # One idle host among many lowers the balancedness by only 1 / hosts, which the usual aim
    # tolerates. A quarter of that makes the planner fill it.
    even = max(policy.target, 1 - 0.25 / hosts)
    return replace(
        policy,
        budget=math.ceil(replicas / hosts) * fill,
        rebalance_below=even,
        target=even,
        horizon_s=_FOR_GOOD_S,
    )


# The balancer looks this long after a shift of the traffic, so that the rates reflect it.
_LOOK_S = 1.0
# How many times `every_s` the balancer pauses after a rollback or a move that failed.
_REST = 10


class RebalanceTimer:
    """When the balancer looks: periodically, soon after a shift, late after a failure."""

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._looked_at: float | None = None
        self._rests_until = 0.0

    def pause(self, now: float) -> None:
        """Pause the balancer."""
        self._rests_until = now + _REST * self.every_s

    def note_check(self, now: float) -> None:
        """Take note that the balancer has looked."""
        self._looked_at = now

    def is_due(self, now: float, shifted_at: float | None) -> bool:
        """Return whether the balancer should look now; ``shifted_at``: the last traffic shift."""
        if now < self._rests_until:
            return False
        if self._looked_at is None or now >= self._looked_at + self.every_s:
            return True
        return shifted_at is not None and self._looked_at < shifted_at + _LOOK_S <= now
