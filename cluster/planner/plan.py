"""The planner's inputs (hosts, policy, operators' constraints) and its result, the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..expert_keys import ExpertKey, LayerKey
from ..placement import LayerPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHost:
    """A host that may hold replicas."""

    name: str
    slots: int | None = None  # None: as many replicas as fit into its memory
    memory_bytes: int | None = None  # None: only its slots bound it
    device_bytes: int | None = None  # what its device has for experts; None: unknown
    speed: float = 1.0  # load that it computes per second; may be relative to the other hosts
    domain: str = ""  # its failure domain; empty: it fails alone

    @property
    def room_bytes(self) -> int | None:
        """Memory that its replicas may take; None: only its slots bound it."""
        limits = [one for one in (self.memory_bytes, self.device_bytes) if one is not None]
        return min(limits, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerPolicy:
    """What a placement must achieve, and what a change may cost."""

    redundancy: int = 0  # so many failure domains can be lost without losing an expert
    rebalance_below: float = 0.95  # a layer with this balancedness or more keeps its replicas
    target: float = 0.98  # a layer with less is improved up to this balancedness
    budget: int | None = None  # replicas that one plan may load for balance; None: any number
    horizon_s: float = 60.0  # how long the load is assumed to last; moves must pay within it
    loading_bytes_per_s: float = 200e6  # how fast a host loads experts
    # A layer uses one more host only if each of its hosts has more than this fraction of the mean
    # load per host of the busiest layer, because every host costs each call a message. 0: every
    # layer uses all hosts.
    consolidate_below: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.consolidate_below <= 1:
            raise ValueError(
                f"consolidate_below: {self.consolidate_below}, but must be from 0 to 1"
            )
        if not 0 < self.rebalance_below <= self.target <= 1:
            raise ValueError(
                f"rebalance_below, target: {self.rebalance_below}, {self.target}; "
                "0 < rebalance_below <= target <= 1 must hold"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConstraints:
    """What operators asked for."""

    min_replicas: Mapping[ExpertKey, int] = field(
        default_factory=dict
    )  # minimum number of replicas
    pins: Mapping[ExpertKey, frozenset[str]] = field(
        default_factory=dict
    )  # hosts that must hold it
    leaving: frozenset[str] = frozenset()  # hosts that must become empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One replica to load, and the replicas that are dropped to make room for it."""

    key: ExpertKey
    host: str
    kind: str  # place, restore, drain, protect, constraint, spare, balance
    reason: str
    expert_bytes: int
    replaces: tuple[ExpertKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A new placement of every layer, and what changes from the current one."""

    layers: Mapping[LayerKey, LayerPlacement]
    moves: tuple[Move, ...]
    drops: tuple[tuple[ExpertKey, str], ...]  # (expert, host) on hosts that remain
    before: Mapping[LayerKey, float]  # balancedness of the load under the current shares
    after: Mapping[LayerKey, float]  # balancedness of the same load under the planned shares
    unplaced: tuple[ExpertKey, ...]  # experts for which no host has room
    unprotected: tuple[ExpertKey, ...]  # experts in fewer failure domains than the policy demands
    lacking_bytes: int  # memory for one more replica of each of these

    @property
    def move_bytes(self) -> int:
        return sum(move.expert_bytes for move in self.moves)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetGroup:
    """A group of identical hosts, as the spec declares it."""

    count: int  # hosts at the start
    min_count: int
    max_count: int
    cost_per_hour: float = 1.0
    slots: int | None = None
    memory_bytes: int | None = None
    speed: float = 1.0
    domain: str = ""
    fixed: bool = False  # a Ray placement group: its number of hosts cannot change
    needs: str = ""  # what a host needs of its machine, as text

    def pool_host(self, name: str) -> PoolHost:
        return PoolHost(
            name=name,
            slots=self.slots,
            memory_bytes=self.memory_bytes,
            speed=self.speed,
            domain=self.domain,
        )
