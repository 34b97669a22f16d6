"""The router's state machine takes events and returns commands.

It splits each layer's call over the hosts, and holds several calls at a time. Every assignment (a
token and one of its experts; in names: `assignment`) is accepted from exactly one answer. When a
host dies, freezes or refuses, another replica takes over its assignments within the call. A late
send goes to a second replica as well, and the first answer counts. If no host can compute an
assignment, it waits for a host or a new placement until the call's deadline; then it is reported as
lost.

The clock is an argument. Sockets, threads and tensors are in `actors/router/router.py`.

Shape suffixes: T = tokens, K = experts of a token, N = T * K assignments flattened, E = experts,
t and k = rows and columns of one send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..expert_keys import LayerKey
from ..load.meter import LoadMeter
from ..placement import Placement, PlacementId
from .events import (
    Accept,
    Cancel,
    Disconnect,
    HostDown,
    HostUp,
    Ponged,
    Refresh,
    Refused,
    Replied,
    RouterCommand,
    RouterEvent,
    Send,
)
from .hedging import Hedging
from .host_health import HostHealth
from .host_registry import HostRegistry
from .layer_call import FORWARD, ROWS_TOGETHER, CallKind, InFlightSend, LayerCall, Sending
from .policy import RouterPolicy
from .row_grouping import SendRows
from .step_versions import StepVersions

# After these refusals, another replica or a later attempt may still serve the same assignments.
_RETRYABLE = ("NotHere", "Busy", "Expired", "HostLost", "Corrupted")
# After these the same host may answer, if no other host may.
_SAME_HOST = ("Busy", "Expired", "Corrupted")
# Retries after these are not charged to the retry budget: the host lacks the expert or is gone.
_UNPAID = ("NotHere", "HostLost")


class Dispatcher:
    """State of one router: the hosts that it knows, and the calls in progress.

    All calls share the hosts' windows; an earlier call sends first.
    """

    def __init__(self, policy: RouterPolicy) -> None:
        self.policy = policy
        self.retries = 0  # sends whose assignments had to be sent again
        self.ejections = 0
        self.hedges = 0  # sends that repeated a late one
        self.hedge_wins = 0  # hedges that were answered before the late send
        self.registry = HostRegistry(policy)
        self._calls: dict[int, LayerCall] = {}  # in progress, by their numbers
        self._next_call = 1
        self._versions = StepVersions()
        self._next_seq = 1
        self._first_seq = 1  # of the sends under the placement in use
        self._rotations: dict[LayerKey, int] = defaultdict(int)
        self.meter = LoadMeter()
        self._hedging = Hedging.of(policy)
        self.asked_for: LayerKey | None = None  # a layer that somebody waits for without a call

    @property
    def placement(self) -> Placement | None:
        return self.registry.placement

    @property
    def hosts(self) -> dict[str, HostHealth]:
        return self.registry.hosts

    @property
    def followed(self) -> PlacementId | None:
        """The number of the placement in use."""
        return None if self.placement is None else self.placement.id

    @property
    def unplaced(self) -> LayerKey | None:
        """A layer that the placement lacks and somebody waits for; its model may be asleep."""
        layers = {} if self.placement is None else self.placement.layers
        waiting = (call.key for call in self._calls.values() if call.key not in layers)
        return next(waiting, self.asked_for)

    @property
    def received(self) -> PlacementId | None:
        """The number of the newest placement, which is followed when the running pass ends."""
        newest = self._versions.newest(self.placement)
        return None if newest is None else newest.id

    def place(self, placement: Placement, now: float) -> list[RouterCommand]:
        """Switch to a newer placement; ignore an older or equal one.

        While a forward pass is running, versions of weights do not change (`step_versions.py`).
        """
        found = self._versions.take(placement, self.placement, calls=bool(self._calls))
        return [] if found is None else self._follow(found, now)

    def begin_step(self, now: float) -> list[RouterCommand]:
        """Take note that a forward pass begins; it may be inside another one."""
        commands = self.follow_newest(now)
        self._versions.begin()
        return commands

    def end_step(self, now: float) -> list[RouterCommand]:
        """Take note that a forward pass ended, and follow the newest placement."""
        self._versions.end()
        return self.follow_newest(now)

    def follow_newest(self, now: float) -> list[RouterCommand]:
        """Follow the newest placement, unless a pass or a call is running."""
        newest = self._versions.due(calls=bool(self._calls))
        return [] if newest is None else self._follow(newest, now)

    def _follow(self, placement: Placement, now: float) -> list[RouterCommand]:
        over = self.registry.place(placement)
        self._first_seq = self._next_seq
        for host in over:
            self._orphan(host)
        for call in self._calls.values():
            call.placed_anew()
        return [*map(Disconnect, over), *self.tick(now)]

    # ---- calls ----------------------------------------------------------------------------------

    def begin(
        self,
        key: LayerKey,
        ids_TK: np.ndarray,
        *,
        max_rows: int,
        now: float,
        patience_T: np.ndarray | None = None,
        kind: CallKind = FORWARD,
        like: Sequence[Send] = (),
    ) -> tuple[LayerCall, list[RouterCommand]]:
        """Start a layer's call, which is over when it has an ``outcome``.

        Ids are int32; ids outside [0, experts) mark unused assignments. ``patience_T`` has the
        seconds that each token waits for an expert that no host can compute at the moment. Rows of
        sends in ``like``, of an earlier call of the same ids, go to the same hosts if they can.
        """
        ids_N = ids_TK.reshape(-1)
        layer = self.placement.layers.get(key) if self.placement is not None else None
        experts = 0 if layer is None else len(layer.replicas)
        # Read as unsigned numbers, ids below 0 are larger than all others.
        used = np.count_nonzero(ids_N.view(np.uint32) < experts)
        all_used = layer is not None and used == ids_N.size
        waiting_N = np.arange(ids_N.size) if all_used else np.flatnonzero(ids_N >= 0)
        if layer is not None and kind.counts:
            count = self.meter.count_used if all_used else self.meter.count
            count(key, ids_N, experts)
        self._rotations[key] += 1
        call = self._calls[self._next_call] = LayerCall(
            number=self._next_call,
            kind=kind,
            key=key,
            top_k=ids_TK.shape[1],
            max_rows=min(max_rows, ROWS_TOGETHER) if kind.together else max_rows,
            deadline=now + self.policy.deadline_s,
            rotation=self._rotations[key],
            ids_N=ids_N,
            waiting_N=waiting_N,
            experts=experts if all_used else None,
            patience_T=patience_T,
        )
        self._next_call += 1
        again = [send for send in like if self.registry.takes(send, call, now)]
        call.begin_like(again)
        self._hedging.earn(len(again))
        return call, self.tick(now)

    def cancel(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """End a call whose result its caller does not need."""
        return self._end(call, now) if call.outcome is None else []

    def abandon(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """End the call of a caller that was interrupted at an unknown point.

        Connections with a send or an answer under way are closed, as their state is unknown; other
        calls send their parts again.
        """
        if call.outcome is not None:
            return []
        self._end(call, now)
        busy = [name for name, health in self.hosts.items() if health.occupied]
        for name in busy:
            self.hosts[name].went_down(now)
            self._orphan(name)
        return [Disconnect(name) for name in busy]

    def handle(self, event: RouterEvent, now: float, *, more: bool = False) -> list[RouterCommand]:
        """Handle what happened.

        With ``more`` it leaves what is due to a later `tick`: other events have arrived, too, and
        nothing is late that one of them brings.
        """
        commands: list[RouterCommand] = []
        health = self.hosts.get(event.host)
        if health is None:
            return commands
        match event:
            case Replied(_, seq, versions):
                health.heard(seq)
                commands += self._replied(seq, versions, health, now)
            case HostUp(host, incarnation):
                if incarnation == health.entry.incarnation:
                    health.came_up()
                else:
                    commands.append(Disconnect(host))
                    health.went_down(now)
            case HostDown(host):
                health.went_down(now)
                self._orphan(host)
            case Ponged(_, number):
                commands += health.ponged(number)
            case Refused(_, seq, _, _):
                health.heard(seq)
                commands += self._refused(event, health, now)
        return commands if more else commands + self.tick(now)

    def tick(self, now: float) -> list[RouterCommand]:
        """Do what is due at ``now``: deadlines, hedges, probes, waiting assignments."""
        commands: list[RouterCommand] = []
        for call in list(self._calls.values()):
            if call.idle:
                self._over(call)
            elif now >= call.deadline or now >= call.late_at:
                commands += self._expire(call, now)
        commands += self.registry.tick(now)
        for call in list(self._calls.values()):
            if call.again and now >= call.hold_until:
                commands += self._send_again(call, now)
            if call.waiting_N.size and now >= call.hold_until:
                commands += self._assign(call, now)
            call.lose_patience(now)
            if now >= call.late_at:
                commands += self._hedge(call, now)
                call.update_late_at()
            if call.idle:
                self._over(call)
        return commands

    def wake_at(self, now: float) -> float:
        """Return the next moment at which `tick` has something to do if no event comes first."""
        calls = self._calls.values()
        waits = any(call.waiting_N.size or call.again for call in calls)
        due = [self.registry.wake_at(now, work_waits=waits)]
        return min(due + [call.wake_at(now) for call in calls])

    def is_hedge(self, seq: int) -> bool:
        """Return whether this send repeats a late one that is still in flight."""
        call = self.call_of(seq)
        flight = None if call is None else call.in_flight.get(seq)
        return flight is not None and flight.rival is not None

    def call(self, number: int) -> LayerCall | None:
        """Return a call in progress."""
        return self._calls.get(number)

    def call_of(self, seq: int) -> LayerCall | None:
        """Return the call in progress that a send belongs to; None if that call has ended."""
        for call in self._calls.values():
            if call.knows(seq):
                return call
        return None

    # ---- what becomes of sends ------------------------------------------------------------------

    def _orphan(self, host: str) -> None:
        """Let the assignments in flight to ``host`` wait again: it will not answer them."""
        for call in self._calls.values():
            if not call.kind.moves:
                call.lose_host(host)
            for seq in [seq for seq, flight in call.in_flight.items() if flight.send.host == host]:
                self.retries += call.take(seq)
            for seq in [s for s, send in call.given_up.items() if send.host == host]:
                del call.given_up[seq]

    def _replied(
        self,
        seq: int,
        versions: tuple[int, tuple[tuple[int, int], ...]] | None,
        health: HostHealth,
        now: float,
    ) -> list[RouterCommand]:
        call = self.call_of(seq)
        if call is None:
            return []
        flight = call.in_flight.get(seq)
        send = call.given_up[seq] if flight is None else flight.send
        if versions is not None and versions != (send.version, send.other_versions):
            why = "it used other versions of weights than the call names"
            return self._refused(Refused(send.host, seq, "Corrupted", why), health, now)
        if flight is None:
            late = call.take_late(seq)
            return [] if late is None else [Accept(late)]
        return self._accept(call, flight, now)

    def _accept(self, call: LayerCall, flight: InFlightSend, now: float) -> list[RouterCommand]:
        seq = flight.send.seq
        assignments = flight.send.assignments
        if call.kind.hedges:
            self._hedging.latencies.learn(call.key.model, assignments.size, now - flight.sent_at)
        commands: list[RouterCommand] = [Accept(flight.send)]
        if flight.rival is not None:
            # A hedge was faster than the send that it repeats, which is cancelled now. What neither
            # this answer nor another hedge covers waits again.
            self.hedge_wins += 1
            late = call.in_flight[flight.rival]
            beaten = late.send
            self.hosts[beaten.host].lost_to_hedge(now, now - late.sent_at)
            call.take(seq)
            call.take(beaten.seq, answered=assignments)
            commands.append(self._cancel(beaten, now))
            return commands
        if not flight.hedges:
            self.hosts[flight.send.host].in_time()
        return commands + [self._cancel(send, now) for send in call.end(seq)]

    def _refused(self, event: Refused, health: HostHealth, now: float) -> list[RouterCommand]:
        call = self.call_of(event.seq)
        if call is None or event.seq not in call.in_flight:
            if call is not None:
                call.given_up.pop(event.seq, None)
            return []
        flight = call.in_flight[event.seq]
        if event.code == "Busy":
            health.was_busy(now)
        if event.code not in (_RETRYABLE if call.kind.moves else _SAME_HOST):
            return self._fail(call, flight, event, now)
        if not call.kind.moves:
            self._stay(call, [flight.send], now)
            return []
        waits = call.take(event.seq)
        if waits and event.code not in _UNPAID:
            self._pay(call, 1, now)
        self.retries += waits
        if event.code == "NotHere":
            # What a host lacked under an older placement, it may have been given since.
            if event.seq >= self._first_seq:
                call.not_here(flight.send)
            return [Refresh()]
        return []

    def _fail(
        self, call: LayerCall, flight: InFlightSend, event: Refused, now: float
    ) -> list[RouterCommand]:
        """Fail the assignments of ``flight``, which every host would refuse; only drop a hedge."""
        if flight.rival is not None:
            call.take(event.seq)
            return []
        call.failed.append((flight.send, event))
        return [self._cancel(send, now) for send in call.end(event.seq)]

    def _cancel(self, send: Send, now: float) -> RouterCommand:
        self.hosts[send.host].give_up(send.seq, now)
        return Cancel(send.host, send.seq)

    def _pay(self, call: LayerCall, sends: int, now: float) -> None:
        # Retries are charged in any case; over budget they are held back until it allows them.
        call.attempts += 1
        call.hold_until = max(call.hold_until, now + self._hedging.owe(sends, now))

    def _stay(self, call: LayerCall, sends: Sequence[Send], now: float) -> None:
        """Let sends without an answer be sent to their own hosts again."""
        if sends:
            call.stay(sends)
            self.retries += len(sends)
            self._pay(call, len(sends), now)

    def _end(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """End the call; assignments that have no answer yet are lost."""
        sends = call.stop()
        self._over(call)
        return [self._cancel(send, now) for send in sends]

    def _over(self, call: LayerCall) -> None:
        call.end_now()
        del self._calls[call.number]

    def _expire(self, call: LayerCall, now: float) -> list[RouterCommand]:
        if now >= call.deadline:
            return self._end(call, now)
        expired = call.expired(now)
        commands: list[RouterCommand] = []
        if not call.kind.moves:
            self._stay(call, expired, now)
            commands += [self._cancel(send, now) for send in expired]
        for host in sorted({send.host for send in expired}):
            # One missed deadline makes the whole host suspect: all its sends go elsewhere now.
            self.hosts[host].eject(now)
            self.ejections += 1
            if not call.kind.moves:
                continue
            sends = [f.send for f in call.in_flight.values() if f.send.host == host]
            again = sum(call.take(send.seq) for send in sends)
            call.given_up.update((send.seq, send) for send in sends)
            commands += [self._cancel(send, now) for send in sends]
            self.retries += again
            if again:
                self._pay(call, again, now)
        return commands

    # ---- sending --------------------------------------------------------------------------------

    def _assign(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """Send the waiting assignments that some host can take; the others go on waiting."""
        placement = self.placement
        if placement is None or call.key not in placement.layers:
            call.note_unavailable(call.waiting_N, now)
            return []
        # transformers marks unused assignments with the number of experts as their id.
        experts = len(placement.layers[call.key].replicas)
        if call.experts != experts:
            call.experts = experts
            call.waiting_N = call.waiting_N[call.ids_N[call.waiting_N] < experts]
        host_n = self.registry.choose(call, call.waiting_N, now)
        still = [call.waiting_N[host_n < 0]]
        call.note_unavailable(still[0], now)
        commands: list[RouterCommand] = []
        sending = self._sending(call, call.attempts, now)
        for health, rows in self.registry.pieces(call, call.waiting_N, host_n):
            if health.room > 0:
                commands.append(self._send(call, health, rows, sending).send)
            else:
                still.append(rows.assignments)
        self._hedging.earn(len(commands))
        call.waiting_N = np.sort(np.concatenate(still)) if still[1:] else still[0]
        return commands

    def _send_again(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """Send the parts that only their own hosts may compute, where there is room."""
        sending = self._sending(call, call.attempts, now)
        ready = call.take_again(self.hosts)
        return [self._send(call, self.hosts[one.host], one, sending).send for one in ready]

    def _hedge(self, call: LayerCall, now: float) -> list[RouterCommand]:
        """Repeat late sends on other replicas, if each of their assignments has one.

        A hedge becomes an ordinary send when the send that it repeats ends without an answer.
        """
        commands: list[RouterCommand] = []
        placed = self.placement is not None and call.key in self.placement.layers
        for flight in [f for f in call.in_flight.values() if now >= f.hedge_at]:
            # If it cannot be hedged now, look again when it is twice as old.
            flight.hedge_at = now + max(now - flight.sent_at, self.policy.hedge_min_s)
            if not placed or flight.hedges or flight.rival is not None:
                continue
            pieces = self._hedging.pieces(call, flight, self.registry, now)
            if not pieces:
                continue
            sending = self._sending(call, call.attempts + 1, now)
            for health, rows in pieces:
                hedge = self._send(call, health, rows, sending)
                hedge.rival = flight.send.seq
                flight.hedges.add(hedge.send.seq)
                commands.append(hedge.send)
            self.hedges += len(pieces)
        return commands

    def _sending(self, call: LayerCall, attempt: int, now: float) -> Sending:
        assert self.placement is not None
        expires = min(now + self.policy.attempt_s * 2**call.misses, call.deadline)
        versions = self.registry.versions(call.key)
        return Sending(self.placement.id, versions, attempt, now, expires)

    def _send(
        self, call: LayerCall, health: HostHealth, rows: SendRows | Send, sending: Sending
    ) -> InFlightSend:
        seq = self._next_seq
        if isinstance(rows, Send):
            send = sending.again(rows, seq)
        else:
            send = sending.send(call, health.entry, rows, seq)
        self._next_seq = seq + 1
        health.sent(seq)
        flight = InFlightSend(
            send,
            sent_at=sending.now,
            expires=sending.expires,
            hedge_at=self._hedging.due(call, send, sending.now),
        )
        call.sent(flight)
        return flight
