"""What routers and hosts send one another, as far as decisions need it.

Shape suffixes: n = choices of one call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..placement import LayerKey, Number


@dataclass(frozen=True, slots=True)
class Hello:
    pass


@dataclass(frozen=True, slots=True)
class Welcome:
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallFrame:
    seq: int
    slot: int
    key: LayerKey
    number: Number
    incarnation: int
    timeout_s: float
    rows: int
    attempt: int
    ids_n: np.ndarray
    sound: bool = True  # whether the checksum of its tensors is right

    def __str__(self) -> str:
        return f"Call {self.seq} of layer {self.key.layer} of {self.key.model}, slot {self.slot}"


@dataclass(frozen=True, slots=True)
class Cancel:
    seq: int


@dataclass(frozen=True, slots=True)
class Ping:
    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class Reply:
    seq: int
    queued_us: int
    busy_us: int
    batch_us: int
    sound: bool = True

    def __str__(self) -> str:
        return f"Reply {self.seq}"


@dataclass(frozen=True, slots=True)
class Refusal:
    seq: int
    code: str
    message: str

    def __str__(self) -> str:
        return f"Refusal {self.seq} {self.code}"


Frame = Hello | Welcome | CallFrame | Cancel | Ping | Pong | Reply | Refusal
