"""Messages between simulated processes: connections of routers and hosts, and remote calls.

A connection is an ordered stream, like a socket: a delayed frame delays all frames after it. Calls
on it can be lost. Answers can be lost or come twice, as if a host failed between computing and
answering. Remote calls stand for Ray's, so they may overtake each other.

Shape suffixes: n = assignments of one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from ..expert_keys import LayerKey
from ..placement import PlacementId
from .clock import Clock, SimProcess


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
    number: PlacementId
    incarnation: int
    timeout_s: float
    rows: int
    attempt: int
    version: int
    other_versions: tuple[tuple[int, int], ...]
    ids_n: np.ndarray
    sound: bool = True  # whether the checksum of its tensors is right

    def __str__(self) -> str:
        return f"Call {self.seq} of layer {self.key.layer} of {self.key.model}, slot {self.slot}"


@dataclass(frozen=True, slots=True)
class CancelFrame:
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


Frame = Hello | Welcome | CallFrame | CancelFrame | Ping | Pong | Reply | Refusal


# Frames that may be lost while the connection goes on. A Cancel is never lost: that would be a bug
# of the transport, not a fault.
_MAY_BE_LOST = (CallFrame, Reply, Refusal, Ping, Pong)
_MAY_COME_TWICE = (Reply, Refusal, Pong)


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


class ConnectionEnd(Protocol):
    """One end of a connection: a process that receives frames."""

    @property
    def process(self) -> SimProcess: ...

    def hear(self, connection: Connection, frame: Frame) -> None: ...

    def ended(self, connection: Connection) -> None: ...


class Connection:
    """A connection of a router and one incarnation of a host, with the slots that they share."""

    def __init__(
        self, number: int, router: ConnectionEnd, host: ConnectionEnd, network: Network, slots: int
    ) -> None:
        self.number = number
        self.router, self.host = router, host
        self.open = True
        self.slots: list[object] = [None] * slots  # what was last written into each
        # seq -> slot of the calls that the host has or will get, and has not answered or refused.
        self.unanswered: dict[int, int] = {}
        self._network = network
        self._clear_at = {id(router): 0.0, id(host): 0.0}

    @property
    def name(self) -> str:
        return f"{self.router.process.name}~{self.host.process.name}#{self.number}"

    def send(self, to: ConnectionEnd, frame: Frame) -> None:
        """Send a frame, with the faults of the network; drop it if the connection has ended."""
        if not self.open:
            return
        network_faults, tally = self._network.network_faults, self._network.tally
        copies = 1
        if isinstance(frame, _MAY_BE_LOST) and self._network.happens(network_faults.lost):
            tally.count(f"{type(frame).__name__} lost")
            copies = 0
            if isinstance(frame, CallFrame):
                self.unanswered.pop(frame.seq, None)
        elif isinstance(frame, _MAY_COME_TWICE) and self._network.happens(network_faults.repeated):
            tally.count(f"{type(frame).__name__} repeated")
            copies = 2
        if isinstance(frame, CallFrame | Reply) and self._network.happens(network_faults.corrupted):
            tally.count(f"{type(frame).__name__} corrupted")
            frame = replace(frame, sound=False)
        for _ in range(copies):
            self._deliver(to, f"{self.name}: {frame}", lambda: to.hear(self, frame))

    def close(self, by: ConnectionEnd | None) -> None:
        """End the connection; ``by`` is the end that left, or None for a fault of the network.

        The other ends hear of it after all frames that are under way.
        """
        if self.open:
            self.open = False
            for end in (self.router, self.host):
                if end is not by:
                    self._deliver(end, f"{self.name}: ended", lambda end=end: end.ended(self))

    def _deliver(self, to: ConnectionEnd, what: str, act: Callable[[], None]) -> None:
        clock = self._network.clock
        when = max(clock.now + self._network.delay(), self._clear_at[id(to)])
        self._clear_at[id(to)] = when
        to.process.reach(when - clock.now, what, act)


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
        self._rng = rng
        self._made = 0

    def happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    def delay(self) -> float:
        """Return the delay of a message: exponential, so that messages can overtake each other."""
        delay_s = -self.network_faults.delay_s * math.log(1.0 - self._rng.random())
        return delay_s * 100 if self.happens(self.network_faults.late) else delay_s

    def connect(self, router: ConnectionEnd, host: ConnectionEnd, slots: int) -> Connection:
        self._made += 1
        made = Connection(self._made, router, host, self, slots)
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
