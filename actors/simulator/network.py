"""Messages between simulated processes: connections of routers and hosts, and remote calls.

A connection is an ordered stream, like a socket: a delayed frame delays all frames after it. Calls
on it can be lost. Answers can be lost or come twice, as if a host failed between computing and
answering. Remote calls stand for Ray's, so they may overtake each other.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...proto.expert_pb2 import Frame
from .clock import Clock, SimProcess

if TYPE_CHECKING:
    from .channels import SimChannel
    from .host import SimHost
    from .router import SimRouter

# Frames that may be lost while the connection goes on. A Cancel is never lost: that would be a bug
# of the transport, not a fault.
_MAY_BE_LOST = ("call", "reply", "refusal", "ping", "pong")
_MAY_COME_TWICE = ("reply", "refusal", "pong")
_HAS_TENSORS = ("call", "reply")
SLOT_BYTES = 4096


class Descriptor:
    """A real descriptor under way to a process, closed if it never arrives."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def take(self) -> int:
        fd, self._fd = self._fd, -1
        return fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Parcel(NamedTuple):
    """A frame under way, with the tensors of a call and the descriptor of lent memory."""

    frame: Frame
    payload: Tensor | None = None
    descriptor: Descriptor | None = None


@dataclass(slots=True)
class NetworkFaults:
    """The faults of the network: the probability of each for a message."""

    delay_s: float = 0.0005  # mean; not a probability
    lost: float = 0.0
    repeated: float = 0.0
    corrupted: float = 0.0
    late: float = 0.0  # delayed a hundred times longer


@dataclass(slots=True)
class FaultCounts:
    """Counts how often each kind of fault happened."""

    faults: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1


class Connection:
    """A connection of a router and one incarnation of a host, with the slots that they share."""

    def __init__(
        self, number: int, router: SimRouter, host: SimHost, network: Network, *, slots: int
    ) -> None:
        self.number = number
        self.router, self.host = router, host
        self.open = True
        self.slots: list[Tensor] = list(torch.zeros(slots, SLOT_BYTES, dtype=torch.uint8))
        # seq -> slot of the calls that the host has or will get, and has not answered or refused.
        self.unanswered: dict[int, int] = {}
        self.channel: SimChannel | None = None  # the router's, until it has closed it
        self._network = network
        self._clear_at = {id(router): 0.0, id(host): 0.0}

    @property
    def name(self) -> str:
        return f"{self.router.name}~{self.host.name}#{self.number}"

    def send(self, to: SimRouter | SimHost, parcel: Parcel) -> None:
        """Send a frame, with the faults of the network; drop it if the connection has ended."""
        if not self.open:
            return
        faults, network = self._network.network_faults, self._network
        kind = parcel.frame.WhichOneof("kind") or ""
        copies = 1
        if kind in _MAY_BE_LOST and network.happens(faults.lost):
            network.tally.count(f"{kind} lost")
            copies = 0
            if kind == "call":
                self.unanswered.pop(parcel.frame.call.seq, None)
        elif kind in _MAY_COME_TWICE and network.happens(faults.repeated):
            network.tally.count(f"{kind} repeated")
            copies = 2
        if kind in _HAS_TENSORS and network.happens(faults.corrupted):
            network.tally.count(f"{kind} corrupted")
            parcel = parcel._replace(frame=_corrupted(parcel.frame))
        what = f"{self.name}: {describe(parcel.frame)}"
        for _ in range(copies):
            self._deliver(to, what, lambda: to.hear(self, parcel))

    def close(self, by: SimRouter | SimHost | None) -> None:
        """End the connection; ``by`` is the end that left, or None for a fault of the network.

        The other ends hear of it after all frames that are under way.
        """
        if self.open:
            self.open = False
            for end in (self.router, self.host):
                if end is not by:
                    self._deliver(end, f"{self.name}: ended", lambda end=end: end.ended(self))

    def _deliver(self, to: SimRouter | SimHost, what: str, act: Callable[[], None]) -> None:
        clock = self._network.clock
        when = max(clock.now + self._network.delay(), self._clear_at[id(to)])
        self._clear_at[id(to)] = when
        to.reach(when - clock.now, what, act)


def _corrupted(frame: Frame) -> Frame:
    """Return a call or a reply whose checksum is not that of its tensors."""
    copy = Frame()
    copy.CopyFrom(frame)
    sent = copy.call if copy.HasField("call") else copy.reply
    sent.checksum ^= 1
    return copy


def describe(frame: Frame) -> str:
    """Return a frame's kind and number, for the log of a run."""
    kind = frame.WhichOneof("kind") or ""
    match kind:
        case "call":
            call = frame.call
            return f"call {call.seq} of layer {call.layer} of {call.model}, slot {call.slot}"
        case "refusal":
            return f"refusal {frame.refusal.seq} {frame.refusal.code}"
        case "reply" | "cancel" | "ping" | "pong":
            return f"{kind} {getattr(frame, kind).seq}"
        case _:
            return kind


@dataclass(frozen=True, slots=True)
class Answered:
    value: object


@dataclass(frozen=True, slots=True)
class Failed:
    """The callee raised ``error``; None stands for a callee that is gone."""

    error: Exception | None


@dataclass(frozen=True, slots=True)
class TimedOut:
    pass


Result = Answered | Failed | TimedOut
# A callee gets one of these, and calls it once with a value or an exception.
Responder = Callable[[object], None]


class Network:
    """All connections and remote calls of a world, and the faults that they suffer."""

    def __init__(self, clock: Clock, rng: np.random.Generator) -> None:
        self.clock = clock
        self.network_faults = NetworkFaults()
        self.tally = FaultCounts()
        self.connections: list[Connection] = []
        self.descriptors = itertools.count(1 << 20)  # numbers that no real descriptor has
        self._rng = rng
        self._made = 0

    def happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    def delay(self) -> float:
        """Return the delay of a message: exponential, so that messages can overtake each other."""
        delay_s = -self.network_faults.delay_s * math.log(1.0 - self._rng.random())
        return delay_s * 100 if self.happens(self.network_faults.late) else delay_s

    def connect(self, router: SimRouter, host: SimHost, *, slots: int) -> Connection:
        self._made += 1
        made = Connection(self._made, router, host, self, slots=slots)
        self.connections = [one for one in self.connections if one.open] + [made]
        return made

    def call(
        self,
        caller: SimProcess,
        callee: SimProcess | None,
        what: str,
        handle: Callable[[Responder], None],
        done: Callable[[Result], None],
        *,
        timeout_s: float,
    ) -> None:
        """Make a remote call: ``handle`` runs at the callee, and ``done`` once at the caller."""
        finished = False

        def finish(result: Result) -> None:
            nonlocal finished
            if not finished:
                finished = True
                done(result)

        late = self.clock.now + timeout_s
        self.clock.at(late, f"{what}: late", lambda: caller._run(what, lambda: finish(TimedOut())))

        def back(result: Result) -> None:
            if self.happens(self.network_faults.lost):
                self.tally.count("answer of a remote call lost")
                return
            kind = "failed" if isinstance(result, Failed) else "answered"
            caller.reach(self.delay(), f"{what}: {kind}", lambda: finish(result))

        if callee is None or not callee.alive:
            back(Failed(None))
            return
        if self.happens(self.network_faults.lost):
            self.tally.count("remote call lost")
            return
        forget = callee.on_death(lambda: back(Failed(None)))

        def respond(value: object) -> None:
            forget()
            back(Failed(value) if isinstance(value, Exception) else Answered(value))

        twice = self.happens(self.network_faults.repeated)
        for _ in range(1 + twice):
            callee.reach(self.delay(), what, lambda: handle(respond))
        if twice:
            self.tally.count("remote call repeated")
