"""A simulated trunk process: the real `Dispatcher`, and models that make calls.

It takes the place of the shells `actors/router/router.py` and `actors/trunk/trunk.py`.

Shape suffixes: T = tokens, K = experts of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ...proto.errors import Corrupted
from ..expert_keys import ExpertKey, LayerKey
from ..placement import Placement, PlacementNews, VersionChange
from ..routing.dispatch import Dispatcher
from ..routing.events import (
    Accept,
    Cancel,
    Connect,
    Disconnect,
    Free,
    HostUp,
    Ponged,
    Probe,
    Refresh,
    Refused,
    Replied,
    RouterCommand,
    RouterEvent,
    Send,
)
from ..routing.layer_call import LayerCall
from . import network
from .clock import SimProcess
from .connections import SimConnections
from .network import Answered, Connection, Frame, Pong, Refusal, Reply, Result, Welcome
from .trace_events import Accepted, Ended, Followed

if TYPE_CHECKING:
    from .controller import SimController
    from .world import World


_LONGEST_WAIT_S = 5.0


@dataclass(slots=True, eq=False)
class SimCall:
    """One layer's call, as the model that made it sees it."""

    state: LayerCall
    key: LayerKey
    ids_TK: np.ndarray
    began: float
    deadline: float
    until_T: np.ndarray  # time until which each token waits for a missing expert
    accepted: list[int] = field(default_factory=list)
    versions: dict[ExpertKey, int] = field(default_factory=dict)  # that its sends named


class SimRouter(SimProcess):
    """One trunk: it makes calls, several at a time, and watches placements."""

    def __init__(self, name: str, world: World) -> None:
        super().__init__(name, world.clock)
        self.world = world
        self.policy = world.settings.router
        self.dispatcher = Dispatcher(self.policy)
        self.connections = SimConnections(self, world, slots=self.policy.window)
        self.calls: dict[int, SimCall] = {}  # that have not ended, by the dispatcher's numbers
        # When a report of this router last reached a controller, and since when its lease has been
        # valid without a gap.
        self.heard_at = self.leased_since = -float("inf")
        self._arrived: deque[tuple[Connection, Frame | None]] = deque()
        self._reply: Reply | None = None  # the reply that is being handled
        self._news: deque[PlacementNews] = deque()
        self._newest: Placement | None = None
        self._controller: SimController | None = None
        self._stopping = False
        self._watch()
        self.alarm("thinks", self.clock.now + world.settings.think_s, self._begin)

    @property
    def process(self) -> SimProcess:
        return self

    def stop(self) -> None:
        """Begin no more calls; those in progress go on."""
        self._stopping = True

    def kill(self) -> None:
        super().kill()
        self.connections.close()

    # ---- the thread that watches placements -----------------------------------------------------

    def was_heard(self, now: float) -> None:
        """Take note that a report has reached a controller, which renews the lease."""
        if now - self.heard_at > self.world.settings.control.lease_s:
            self.leased_since = now
        self.heard_at = now

    def _watch(self) -> None:
        if self._controller is None or not self._controller.alive:
            self._controller = self.world.registry.controller
        controller = self._controller
        if controller is None:
            self._watch_later()
            return
        self._take_placements()
        placement = self.dispatcher.placement
        number = None if placement is None else placement.id
        report = self.dispatcher.meter.take(self.name, number, self.dispatcher.received)
        watch_s = self.world.settings.watch_s
        self.world.network.call(
            self,
            controller,
            f"{self.name} reports to {controller.name}",
            lambda respond: controller.hear_report(self, report, watch_s, respond),
            self._watched,
            timeout_s=watch_s + self.world.settings.patience_s,
        )

    def _watched(self, result: Result) -> None:
        if not isinstance(result, Answered):
            self._controller = None
            self._watch_later()
            return
        if isinstance(result.value, Placement | VersionChange):
            self._news.append(result.value)
            self._wake_up()
        self._watch()

    def _watch_later(self) -> None:
        self.alarm("watches", self.clock.now + self.world.settings.rest_s, self._watch)

    def move_to(self, controller: SimController) -> None:
        """Report to another controller from now on, as Ray says."""
        self._controller = controller

    # ---- the threads that compute ---------------------------------------------------------------

    def hear(self, connection: Connection, frame: Frame) -> None:
        self._arrived.append((connection, frame))
        self._wake_up()

    def ended(self, connection: Connection) -> None:
        self._arrived.append((connection, None))
        self._wake_up()

    def _wake_up(self) -> None:
        # A router waits for events only while a call is in progress.
        if self.calls:
            self._turn()
        else:
            self._take_placements()

    def _begin(self) -> None:
        if self._stopping:
            return
        asked = self.world.traffic.next(self.dispatcher.placement)
        if asked is None or len(self.calls) >= self.world.settings.calls_at_once:
            self.alarm("thinks", self.clock.now + self.world.settings.think_s, self._begin)
            return
        self._take_placements()
        assert self.dispatcher.placement is not None
        now = self.clock.now
        self.world.calls += 1
        state, begun = self.dispatcher.begin(
            asked.key, asked.ids_TK, max_rows=64, now=now, patience_T=asked.patience_T
        )
        self.calls[state.number] = SimCall(
            state=state,
            key=asked.key,
            ids_TK=asked.ids_TK,
            began=now,
            deadline=now + self.policy.deadline_s,
            until_T=now + asked.patience_T,
        )
        self._execute(begun)
        self.alarm("thinks", now + self.world.traffic.pause_s(), self._begin)
        self._go_on()

    def _turn(self) -> None:
        """Handle what has arrived or is due, as `Router._wait` does."""
        heard = False
        while self._arrived:
            connection, frame = self._arrived.popleft()
            channel = self.connections.channel_of(connection)
            if channel is None:
                continue
            host = next(h for h, c in self.connections.channels.items() if c is channel)
            if frame is None:
                self.connections.down(host)
                self._execute(())
            elif self.connections.received(channel, frame):
                heard = True
                if isinstance(frame, Reply):
                    self._reply = frame
                self._execute(self.dispatcher.handle(_event(host, frame), self.clock.now))
                if isinstance(frame, Reply):
                    # The reply has been accepted by now, or has given the call up.
                    channel.release(frame.seq)
        self._take_placements()
        if not heard:
            self._execute(self.dispatcher.tick(self.clock.now))
        self._go_on()

    def _go_on(self) -> None:
        now = self.clock.now
        for number, call in list(self.calls.items()):
            outcome = call.state.outcome
            if outcome is not None:
                del self.calls[number]
                self._execute(self.dispatcher.follow_newest(now))
                refusal = outcome.error
                error = "" if refusal is None else f"{refusal.code}: {refusal.message}"
                self.world.tell(Ended(self, call, outcome.lost, error))
        if self.calls:
            due = min(self.dispatcher.wake_at(now), now + _LONGEST_WAIT_S)
            self.alarm("waits", now if self._arrived else due, self._turn)

    def _take_placements(self) -> None:
        while self._news:
            news = self._news.popleft()
            if isinstance(news, VersionChange):
                assert self._newest is not None, "it had reported a placement"
                news = news.applied_to(self._newest)
            self._newest = placement = news
            self._execute(self.dispatcher.place(placement, self.clock.now))
            followed = self.dispatcher.placement
            assert followed is not None
            self.world.tell(Followed(self, followed.id))

    def _execute(self, commands: Iterable[RouterCommand]) -> None:
        todo = deque(commands)
        while True:
            for lost in self.connections.take_lost():
                todo.extend(self.dispatcher.handle(lost, self.clock.now))
            if not todo:
                return
            self._do(todo.popleft())

    def _do(self, command: RouterCommand) -> None:
        match command:
            case Send():
                self.connections.send_call(command, self.calls[command.call])
            case Accept(send):
                call = self.calls[send.call]
                read = self.connections.read(send.host, send.seq)
                self.world.tell(Accepted(self, call, send.assignments, send.seq, read))
                call.accepted += send.assignments.tolist()
                reply = self._reply
                assert reply is not None
                self.dispatcher.meter.answered(
                    send.host,
                    send.assignments.size,
                    reply.queued_us,
                    reply.busy_us,
                    reply.batch_us,
                )
            case Connect(entry):
                self.connections.connect(entry)
            case Disconnect(host):
                self.connections.disconnect(host)
            case Cancel(host, seq):
                self.connections.send(host, network.CancelFrame(seq))
            case Probe(host, number):
                self.connections.send(host, network.Ping(number))
            case Free(host, seq):
                self.connections.free(host, seq)
            case Refresh():
                pass  # as in a trunk, the next placement arrives without asking


def _event(host: str, frame: Frame) -> RouterEvent:
    match frame:
        case Reply(seq=seq, sound=True):
            return Replied(host, seq)
        case Reply(seq=seq):
            return Refused(host, seq, Corrupted.__name__, "its tensors have another checksum")
        case Refusal(seq=seq, code=code, message=message):
            return Refused(host, seq, code, message)
        case Pong(number):
            return Ponged(host, number)
        case Welcome(incarnation):
            return HostUp(host, incarnation)
        case _:
            raise AssertionError(f"{host} sent {frame}, as no host does")
