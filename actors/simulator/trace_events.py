"""Events of a simulated world that the invariants check (`invariants.py`).

Shape suffixes: T = tokens, H = hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...cluster.expert_keys import ExpertVersion
from ...cluster.placement import Placement, PlacementId

if TYPE_CHECKING:
    from .controller import SimController
    from .host import SimHost
    from .network import Connection
    from .router import SimCall, SimRouter


@dataclass(frozen=True, slots=True)
class Ended:
    """A router's call ended, with this result (T, H)."""

    router: SimRouter
    call: SimCall
    result_TH: np.ndarray


@dataclass(frozen=True, slots=True)
class Sent:
    """A router put a call into a slot and sent it."""

    router: SimRouter
    connection: Connection
    seq: int
    slot: int
    placement_id: PlacementId
    still_owed: tuple[int, ...]  # calls in the same slot that the host may still answer
    weights: tuple[ExpertVersion, ...]  # that the call names


@dataclass(frozen=True, slots=True)
class Computed:
    """A host began to compute experts of a layer."""

    host: SimHost
    lacking: tuple[ExpertVersion, ...]  # those whose weights the host does not have


@dataclass(frozen=True, slots=True)
class Wrote:
    """A host wrote the answer to ``seq`` into a slot that the router uses for ``used_for``."""

    host: SimHost
    connection: Connection
    seq: int
    slot: int
    used_for: int | None  # None: the router does not use the slot, or has left


@dataclass(frozen=True, slots=True)
class Obeyed:
    """A host accepted an order of a controller."""

    host: SimHost
    term: int
    order: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """A host has got the weights of an expert."""

    host: SimHost
    weights: ExpertVersion


@dataclass(frozen=True, slots=True)
class Released:
    """A host has evicted experts."""

    host: SimHost
    weights: tuple[ExpertVersion, ...]
    by: int  # the controller's term
    seen: float  # when the controller asked for the reports on which it decided


@dataclass(frozen=True, slots=True)
class HostStarted:
    """The owner asked Ray for a host; ``there``: hosts that it asked for and has not ended."""

    name: str
    there: int


@dataclass(frozen=True, slots=True)
class HostEnded:
    """The owner ended a host that held ``weights``."""

    host: SimHost
    weights: frozenset[ExpertVersion]


@dataclass(frozen=True, slots=True)
class Sized:
    """A controller saved a changed fleet."""

    controller: SimController


@dataclass(frozen=True, slots=True)
class Claimed:
    """A controller claimed a term."""

    controller: SimController
    term: int


@dataclass(frozen=True, slots=True)
class Published:
    """A controller published a placement."""

    controller: SimController
    placement: Placement


@dataclass(frozen=True, slots=True)
class Followed:
    """A router adopted a placement."""

    router: SimRouter
    placement_id: PlacementId


Fact = (
    Ended
    | Sent
    | Computed
    | Wrote
    | Obeyed
    | Loaded
    | Released
    | HostStarted
    | HostEnded
    | Sized
    | Claimed
    | Published
    | Followed
)
