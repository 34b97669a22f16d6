"""What happened in a simulated world that its invariants judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..placement import ExpertKey, LayerKey, Number, Placement

if TYPE_CHECKING:
    from .controller import SimController
    from .host import SimHost
    from .network import Connection
    from .router import SimCall, SimRouter


@dataclass(frozen=True, slots=True)
class Accepted:
    """A router took the answer to a send into its result, out of this slot."""

    router: SimRouter
    call: SimCall
    choices: np.ndarray
    seq: int
    read: object  # what stood in the slot


@dataclass(frozen=True, slots=True)
class Ended:
    router: SimRouter
    call: SimCall
    lost: np.ndarray
    error: str


@dataclass(frozen=True, slots=True)
class Sent:
    """A call went into a slot."""

    router: SimRouter
    connection: Connection
    seq: int
    slot: int
    number: Number
    still_owed: tuple[int, ...]  # calls in the same slot that the host may still answer


@dataclass(frozen=True, slots=True)
class Computed:
    host: SimHost
    key: LayerKey
    experts: tuple[int, ...]
    lacking: tuple[int, ...]  # of these, the ones whose weights are not there


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
    """A host began what a controller ordered."""

    host: SimHost
    term: int
    order: str


@dataclass(frozen=True, slots=True)
class Released:
    """A host has forgotten experts."""

    host: SimHost
    keys: tuple[ExpertKey, ...]
    by: int  # the controller's term
    seen: float  # when the controller asked for the reports that it decided by


@dataclass(frozen=True, slots=True)
class HostStarted:
    """The owner asked Ray for a host; ``there`` are now all that it asked for and did not end."""

    name: str
    there: int


@dataclass(frozen=True, slots=True)
class HostEnded:
    """The owner ended a host that held ``weights``."""

    host: SimHost
    weights: frozenset[ExpertKey]


@dataclass(frozen=True, slots=True)
class Sized:
    """A controller keeps another fleet."""

    controller: SimController


@dataclass(frozen=True, slots=True)
class Claimed:
    controller: SimController
    term: int


@dataclass(frozen=True, slots=True)
class Published:
    controller: SimController
    placement: Placement


@dataclass(frozen=True, slots=True)
class Followed:
    """A router took a placement."""

    router: SimRouter
    number: Number


Fact = (
    Accepted
    | Ended
    | Sent
    | Computed
    | Wrote
    | Obeyed
    | Released
    | HostStarted
    | HostEnded
    | Sized
    | Claimed
    | Published
    | Followed
)
