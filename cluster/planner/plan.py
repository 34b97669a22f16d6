"""What the planner is told, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..placement import ExpertKey, LayerKey, LayerPlacement


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHost:
    """A host that may hold replicas."""

    name: str
    slots: int | None = None  # None: as many as fit into its memory
    memory_bytes: int | None = None  # None: as many as it has slots
    speed: float = 1.0  # load per second that it computes; relative to the others will do
    domain: str = ""  # what fails together; the host alone when empty


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a placement is to achieve and what a change may cost."""

    redundancy: int = 0  # failure domains whose loss leaves every expert alive
    enough: float = 0.95  # a layer balanced so well is left alone,
    target: float = 0.98  # one that is not is improved up to here
    budget: int | None = None  # replicas that one plan may load for balance; None: any number
    horizon_s: float = 60.0  # for how long a load is trusted to last
    load_bytes_per_s: float = 200e6  # how fast hosts load
    # A layer takes a further host for more load only than this part of what the layer with the most
    # load of all has on each host: every host costs each of its calls a message. 0: none is spared.
    fan_out: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.fan_out <= 1:
            raise ValueError(f"fan_out: {self.fan_out}; 0 <= fan_out <= 1")
        if not 0 < self.enough <= self.target <= 1:
            raise ValueError(
                f"enough, target: {self.enough}, {self.target}; 0 < enough <= target <= 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What operators asked for."""

    least: Mapping[ExpertKey, int] = field(default_factory=dict)  # replicas at least
    pins: Mapping[ExpertKey, frozenset[str]] = field(default_factory=dict)  # hosts that hold it
    leaving: frozenset[str] = frozenset()  # hosts that are to hold nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One replica to be loaded, and what leaves its host for it."""

    key: ExpertKey
    host: str
    kind: str  # place, restore, drain, protect, wish, spare, balance
    reason: str
    expert_bytes: int
    replaces: tuple[ExpertKey, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    layers: Mapping[LayerKey, LayerPlacement]
    moves: tuple[Move, ...]
    drops: tuple[tuple[ExpertKey, str], ...]  # replicas that leave, beside those of hosts that left
    before: Mapping[LayerKey, float]  # balancedness of the load under the shares that stood
    after: Mapping[LayerKey, float]
    unplaced: tuple[ExpertKey, ...]  # no room anywhere
    unprotected: tuple[ExpertKey, ...]
    lacking_bytes: int  # memory that protecting them would take

    @property
    def move_bytes(self) -> int:
        return sum(move.expert_bytes for move in self.moves)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetGroup:
    """Like hosts, as the spec has them."""

    count: int  # at the start
    min_count: int
    max_count: int
    cost_per_hour: float = 1.0
    slots: int | None = None
    memory_bytes: int | None = None
    speed: float = 1.0
    domain: str = ""
    fixed: bool = False  # a placement group: its number of hosts cannot change
    needs: str = ""  # what a host takes of its machine, in words

    def pool_host(self, name: str) -> PoolHost:
        return PoolHost(
            name=name,
            slots=self.slots,
            memory_bytes=self.memory_bytes,
            speed=self.speed,
            domain=self.domain,
        )
