"""What a router's state machine hears and says; `actors/router/router.py` is its shell.

Shape suffixes: t = rows of one send, k = choices of a row that go to this host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..placement import HostEntry

# ---- events: what happened --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostUp:
    """A host said Welcome on a new connection."""

    host: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class HostDown:
    """A connection ended, or could not be made; whatever was on it gets no answer."""

    host: str


@dataclass(frozen=True, slots=True)
class Replied:
    """A host answered a call; the values stay with the shell until it is told to accept them."""

    host: str
    seq: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A host declined a call before computing it; ``code`` is a name of proto/errors.py."""

    host: str
    seq: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Ponged:
    """A host answered the probe of this number, and with it all that it was sent before."""

    host: str
    number: int


Event = HostUp | HostDown | Replied | Refused | Ponged

# ---- commands: what to do ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    entry: HostEntry


@dataclass(frozen=True, slots=True)
class Disconnect:
    host: str


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """One call to one host. ``choice_tk`` numbers the choices t * K + k, -1 where there is none."""

    host: str
    incarnation: int
    seq: int
    timeout_s: float
    attempt: int  # how many sends of its call came to nothing before; a hedge is one more
    token_t: np.ndarray
    choice_tk: np.ndarray
    ids_tk: np.ndarray

    @property
    def choices(self) -> np.ndarray:
        return self.choice_tk[self.choice_tk >= 0]


@dataclass(frozen=True, slots=True, eq=False)
class Accept:
    """The answer to this send belongs to the result; every choice is accepted exactly once."""

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
    """Nothing will be heard of this call any more: its slot can be used again."""

    host: str
    seq: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """A host no longer holds what the placement says: ask for a newer one."""


Command = Connect | Disconnect | Send | Accept | Cancel | Probe | Free | Refresh
