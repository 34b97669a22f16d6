"""Events and commands of the router's state machine; `actors/router/router.py` carries them out.

`Send`, `Replied` and `Accept`, which a call has for each of its hosts, are not frozen dataclasses,
because creating a frozen one takes three times as long. Treat them as immutable.

Shape suffixes: t = rows of one send, k = assignments of a row that go to this host; the assignments
of a send are an array of shape (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..placement import HostEntry, PlacementId

# ---- events: what happened --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostUp:
    """A host accepted a new connection: it sent Welcome."""

    host: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class HostDown:
    """A connection ended or could not be made; calls on it get no answer."""

    host: str


@dataclass(slots=True)
class Replied:
    """A host answered a call; the shell keeps the values until it is told to accept them.

    ``versions`` are those of the weights that it used: of most experts, and (expert, version) of
    the others. None: the transport does not say.
    """

    host: str
    seq: int
    versions: tuple[int, tuple[tuple[int, int], ...]] | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A host refused a call before computing it; ``code`` is a class name in proto/errors.py."""

    host: str
    seq: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Ponged:
    """A host answered the probe of this number; no answer to an earlier call can follow."""

    host: str
    number: int


RouterEvent = HostUp | HostDown | Replied | Refused | Ponged

# ---- commands: what to do ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    entry: HostEntry


@dataclass(frozen=True, slots=True)
class Disconnect:
    host: str


@dataclass(slots=True, eq=False)
class Send:
    """One call to one host; ``assignment_tk`` has numbers t * K + k, or -1 as padding.

    ``assignments`` has the same numbers without padding, ascending.
    """

    call: int  # the number of the layer's call that it is a part of
    placement_id: PlacementId  # of the placement that chose the host
    host: str
    incarnation: int
    seq: int
    timeout_s: float
    attempt: int  # failed sends of its layer call before it; one more in a hedge
    version: int  # of the experts' weights
    other_versions: tuple[tuple[int, int], ...]  # (expert, version) where it is another one
    token_t: np.ndarray
    assignment_tk: np.ndarray
    ids_tk: np.ndarray
    assignments: np.ndarray
    part: int = 0  # of its layer call; it is the same when the same rows are sent again


@dataclass(slots=True, eq=False)
class Accept:
    """Add the answer to this send to the result; every assignment is accepted exactly once."""

    send: Send


@dataclass(frozen=True, slots=True)
class Cancel:
    host: str
    seq: int


@dataclass(frozen=True, slots=True)
class Probe:
    host: str
    number: int


@dataclass(frozen=True, slots=True)
class Free:
    """Reuse the slot of this call: no answer to it can arrive any more."""

    host: str
    seq: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """Ask for a newer placement: a host no longer holds what this one says."""


RouterCommand = Connect | Disconnect | Send | Accept | Cancel | Probe | Free | Refresh
