"""The part `balance` of the spec: when the controller moves experts."""

from __future__ import annotations

from pydantic import Field, model_validator

from ..control.policy import ControlPolicy
from ..planner.plan import PlannerPolicy
from .parts import Part, PartOrBytes, Seconds
from .text import bytes_of


class BalanceSpec(Part):
    """How the controller follows the load: when it moves experts between hosts, and how much.

    The balancedness of a layer is the average load of its hosts, divided by the load of the busiest
    one, each relative to the host's speed. 1 is even.
    """

    auto: bool = True
    """Whether the controller moves experts by itself when the load changes. `false`: only when an
    operator runs `moesaic rebalance`."""

    redundancy: int = Field(default=0, ge=0, le=64)
    """Number of failure domains (hosts, or host groups that share a `failure_domain`) that can be
    lost at once without losing an expert. Default 0: an expert may be on a single host."""

    rebalance_below: float = Field(default=0.95, gt=0, le=1)
    """Balancedness below which the controller moves a layer's replicas. The balancedness of a layer
    is the average load of a host divided by the load of the busiest host, each for its speed; 1 is
    even."""

    target: float = Field(default=0.98, gt=0, le=1)
    """Balancedness (1 is even) up to which the controller improves a layer whose balancedness is
    less than `rebalance_below`."""

    budget: PartOrBytes = 0.05
    """How many replicas the controller may load in one change for balance: a fraction of all
    replicas, or bytes such as `4GB`."""

    consolidate_below: float = Field(default=0.05, ge=0, le=1)
    """Load of one layer on one host up to which the layer gets no further host, because each host
    that a layer uses costs a message. It is a fraction of this unit: the busiest layer's load
    divided by the number of all hosts. 0: all layers use all hosts."""

    every_s: Seconds = 10.0
    """Seconds between two checks of the controller whether the load is even."""

    horizon_s: Seconds = 60.0
    """Seconds that the present load is assumed to last. The controller moves a replica only if the
    move saves hosts more time in these seconds than loading the replica takes."""

    host_timeout_s: Seconds = 30.0
    """Seconds that a host may be unreachable before the controller loads the host's experts on
    other hosts."""

    lease_s: Seconds = 10.0
    """Seconds for which the controller waits for a silent router. After that, the controller lets
    hosts evict replicas that the router may still use."""

    loading_mb_per_s: float = Field(default=200.0, gt=0, le=1e9, allow_inf_nan=False)
    """Mean rate at which one host loads experts while it serves, in megabytes per second. A lower
    rate disturbs requests less."""

    @model_validator(mode="after")
    def _ordered(self) -> BalanceSpec:
        if self.rebalance_below > self.target:
            raise ValueError("rebalance_below <= target must hold")
        return self

    @property
    def policy(self) -> ControlPolicy:
        return ControlPolicy(
            balance=PlannerPolicy(
                redundancy=self.redundancy,
                rebalance_below=self.rebalance_below,
                target=self.target,
                horizon_s=self.horizon_s,
                consolidate_below=self.consolidate_below,
            ),
            auto=self.auto,
            every_s=self.every_s,
            budget=self.budget if isinstance(self.budget, float) else 1.0,
            budget_bytes=bytes_of(self.budget) if isinstance(self.budget, str) else None,
            host_timeout_s=self.host_timeout_s,
            lease_s=self.lease_s,
            bytes_per_s=self.loading_mb_per_s * 1e6,
        )
