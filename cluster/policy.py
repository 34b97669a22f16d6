"""When the controller acts, and how fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPolicy:
    """When the controller acts, and how fast. Seconds and bytes."""

    balance: Policy = field(default_factory=Policy)
    auto: bool = True  # whether it balances by itself
    every_s: float = 10.0
    budget: float = 0.05  # part of all replicas that one balancing may load
    gone_s: float = 30.0  # a host that is away for so long is planned around
    lease_s: float = 10.0  # a router that is silent for so long holds nothing up
    bytes_per_s: float = 200e6  # that one host loads in the background
    batch_bytes: int = 64 << 20
    retry_s: float = 5.0  # behind a load that failed
