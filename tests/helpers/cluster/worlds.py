"""A simulated pool for the router's state machine: hosts that answer, die, freeze and refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moesaic.cluster.expert_keys import LayerKey
from moesaic.cluster.placement import (
    HostEntry,
    LayerPlacement,
    ModelShape,
    Placement,
    PlacementId,
    initial_placement,
)
from moesaic.cluster.routing.dispatch import Dispatcher
from moesaic.cluster.routing.events import (
    Accept,
    Cancel,
    Connect,
    Disconnect,
    Free,
    HostDown,
    HostUp,
    Ponged,
    Probe,
    Refused,
    Replied,
    RouterCommand,
    RouterEvent,
    Send,
)
from moesaic.cluster.routing.layer_call import FORWARD, CallKind, LayerCall, Outcome
from moesaic.cluster.routing.policy import RouterPolicy

KEY = LayerKey("m", 0)


def entry(host: str, incarnation: int = 1) -> HostEntry:
    return HostEntry(host=host, incarnation=incarnation, node="n", shm_address="", grpc_address="")


def placement(
    hosts: int, replicas: int, experts: int = 8, *, epoch: int = 1, layer: int = 0
) -> Placement:
    names = [f"h{i}" for i in range(hosts)]
    shape = ModelShape(model="m", experts={layer: experts}, replicas=replicas)
    return Placement(
        PlacementId(1, epoch),
        {name: entry(name) for name in names},
        initial_placement([shape], names),
    )


@dataclass
class SimHost:
    """One host: what it was sent and has not answered yet."""

    name: str
    incarnation: int = 1
    alive: bool = True
    frozen: bool = False
    connected: bool = False
    welcomed: bool = False
    inbox: list[Send] = field(default_factory=list)
    pings: int = 0  # number of the last probe that was not answered
    cancelled: set[int] = field(default_factory=set)


@dataclass
class Asked:
    """One call: what was asked, and what has become of it."""

    state: LayerCall
    ids_N: np.ndarray
    accepted: list[int] = field(default_factory=list)
    answers: list[Send] = field(default_factory=list)  # the sends that were accepted
    # Choices that no host would have answered.
    refused_for_good: set[int] = field(default_factory=set)

    def check_whole(self) -> None:
        outcome = self.state.outcome
        assert outcome is not None
        wanted = set(np.flatnonzero(self.ids_N >= 0).tolist())
        lost = set(outcome.lost.tolist())
        assert not lost & set(self.accepted), "a choice is both lost and accepted"
        assert lost | set(self.accepted) == wanted, "a choice is neither lost nor accepted"


class World:
    """Feeds a `Dispatcher` and checks what it says."""

    def __init__(self, first: Placement, policy: RouterPolicy) -> None:
        self.now = 0.0
        self.placement = first
        self.dispatcher = Dispatcher(policy)
        self.hosts = {name: SimHost(name) for name in first.hosts}
        self.calls: dict[int, Asked] = {}
        self.seqs: set[int] = set()
        self.answered: set[tuple[str, int]] = set()
        # What was sent of calls whose parts stay where they are: by call and part.
        self.parts: dict[tuple[int, int], tuple[str, int, list[int]]] = {}
        self.run(self.dispatcher.place(first, self.now))

    @property
    def outcome(self) -> Outcome | None:
        """Of the last call."""
        return self.last.state.outcome

    @property
    def accepted(self) -> list[int]:
        return self.last.accepted

    @property
    def refused_for_good(self) -> set[int]:
        return self.last.refused_for_good

    @property
    def last(self) -> Asked:
        return self.calls[max(self.calls)]

    # ---- commands -------------------------------------------------------------------------------

    def run(self, commands: list[RouterCommand]) -> None:
        todo = list(commands)
        while todo:
            command = todo.pop(0)
            match command:
                case Send():
                    self._sent(command)
                case Accept(send):
                    self._accepted(send)
                case Connect(wanted):
                    host = self.hosts[wanted.host]
                    if host.alive and host.incarnation == wanted.incarnation:
                        host.connected, host.welcomed, host.inbox = True, False, []
                    else:
                        todo += self.dispatcher.handle(HostDown(wanted.host), self.now)
                case Disconnect(name):
                    self.hosts[name].connected = False
                    self.hosts[name].inbox = []
                case Probe(name, number):
                    self.hosts[name].pings = number
                case Free(name, seq):
                    host = self.hosts[name]
                    assert all(send.seq != seq for send in host.inbox), "freed before its answer"
                case Cancel(name, seq):
                    self.hosts[name].cancelled.add(seq)

    def _sent(self, send: Send) -> None:
        host = self.hosts[send.host]
        assert host.connected, "sent to a host without a connection"
        assert host.welcomed, "sent before Welcome"
        assert send.incarnation == host.incarnation
        assert send.seq not in self.seqs, "a sequence number was used twice"
        self.seqs.add(send.seq)
        host.inbox.append(send)
        if not self.calls[send.call].state.kind.moves:
            part = send.host, send.incarnation, send.assignments.tolist()
            first = self.parts.setdefault((send.call, send.part), part)
            assert part == first, "a part was sent elsewhere, or is another one now"
        assert len(host.inbox) <= self.dispatcher.policy.window, "a slot was used twice"
        held = self.placement.layers[KEY]
        for choice, expert in zip(send.assignments, send.ids_tk[send.ids_tk >= 0], strict=True):
            assert self.calls[send.call].ids_N[choice] == expert, (
                "a choice was sent to another expert"
            )
            assert send.host in held.hosts(int(expert)), "sent to a host without the expert"

    def _accepted(self, send: Send) -> None:
        assert (send.host, send.seq) in self.answered, "accepted what was never answered"
        self.calls[send.call].answers.append(send)
        accepted = self.calls[send.call].accepted
        accepted += send.assignments.tolist()
        assert len(set(accepted)) == len(accepted), "a choice was accepted twice"

    # ---- what may happen ------------------------------------------------------------------------

    def tell(self, event: RouterEvent) -> None:
        self.run(self.dispatcher.handle(event, self.now))

    def welcome(self, host: SimHost) -> None:
        host.welcomed = True
        self.tell(HostUp(host.name, host.incarnation))

    def answer(self, host: SimHost, index: int, *, twice: bool = False) -> None:
        send = host.inbox.pop(index)
        self.answered.add((host.name, send.seq))
        self.tell(Replied(host.name, send.seq))
        if twice:
            self.tell(Replied(host.name, send.seq))

    def refuse(self, host: SimHost, index: int, code: str) -> None:
        send = host.inbox.pop(index)
        stays = not self.calls[send.call].state.kind.moves
        if code == "CallError" or (code == "NotHere" and stays):
            self.calls[send.call].refused_for_good.update(send.assignments.tolist())
        self.tell(Refused(host.name, send.seq, code, "drill"))

    def lose(self, host: SimHost, index: int) -> None:
        """The answer never comes, and the connection stays."""
        host.inbox.pop(index)

    def pong(self, host: SimHost) -> None:
        number, host.pings = host.pings, 0
        # A connection keeps its order: calls that were cancelled are refused by now.
        for index in reversed(range(len(host.inbox))):
            if host.inbox[index].seq in host.cancelled:
                self.refuse(host, index, "HostLost")
        self.tell(Ponged(host.name, number))

    def kill(self, host: SimHost) -> None:
        was_connected = host.connected
        self._lose_parts(host)
        host.alive = host.connected = host.welcomed = host.frozen = False
        host.inbox, host.pings = [], 0
        if was_connected:
            self.tell(HostDown(host.name))

    def cut(self, host: SimHost) -> None:
        """The connection breaks; the host lives."""
        if host.connected:
            self._lose_parts(host)
            host.connected = host.welcomed = False
            host.inbox = []
            self.tell(HostDown(host.name))

    def restart(self, host: SimHost) -> None:
        self._lose_parts(host)
        host.alive, host.incarnation = True, host.incarnation + 1
        host.connected = host.welcomed = False
        entries = {**self.placement.hosts, host.name: entry(host.name, host.incarnation)}
        self.replace(Placement(self._next(), entries, self.placement.layers))

    def _lose_parts(self, host: SimHost) -> None:
        """Only this process of the host would have answered what it was sent of such calls."""
        for (call, _), (name, _, assignments) in self.parts.items():
            if name == host.name and self.calls[call].state.outcome is None:
                self.calls[call].refused_for_good.update(assignments)

    def replace(self, newer: Placement) -> None:
        self.placement = newer
        self.run(self.dispatcher.place(newer, self.now))

    def _next(self) -> PlacementId:
        return PlacementId(1, self.placement.id.epoch + 1)

    def republish(self, layer: LayerPlacement) -> None:
        self.replace(Placement(self._next(), self.placement.hosts, {KEY: layer}))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.run(self.dispatcher.tick(self.now))

    def pass_to_next(self) -> None:
        due = self.dispatcher.wake_at(self.now)
        self.pass_time(max(0.0, min(due - self.now, 10.0)) + 1e-6)

    # ---- calls ----------------------------------------------------------------------------------

    def accustom(self, ids_TK: np.ndarray, took_s: float, calls: int = 16) -> None:
        """Calls that all hosts answer after ``took_s``, or a little earlier."""
        for call in range(calls):
            self.begin(ids_TK)
            self.now += took_s if call == 0 else 0.8 * took_s
            for host in self.hosts.values():
                while host.inbox:
                    self.answer(host, 0)
            assert self.outcome is not None
            self.check_whole()

    def begin(
        self,
        ids_TK: np.ndarray,
        max_rows: int = 64,
        patience_T: np.ndarray | None = None,
        kind: CallKind = FORWARD,
        like: Sequence[Send] = (),
    ) -> Asked:
        state, begun = self.dispatcher.begin(
            KEY,
            ids_TK,
            max_rows=max_rows,
            now=self.now,
            patience_T=patience_T,
            kind=kind,
            like=like,
        )
        asked = self.calls[state.number] = Asked(state, ids_TK.reshape(-1))
        self.run(begun)
        return asked

    def settle(self, rounds: int = 400) -> None:
        """No more faults: everybody lives and answers until all calls have ended."""
        for host in self.hosts.values():
            host.frozen = False
            if not host.alive:
                self.restart(host)
        for _ in range(rounds):
            if self.is_idle:
                return
            for host in self.hosts.values():
                if host.connected and not host.welcomed:
                    self.welcome(host)
                while host.inbox:
                    self.answer(host, 0)
                if host.connected and host.pings:
                    self.pong(host)
            if not self.is_idle:
                self.pass_to_next()
        raise AssertionError("a call did not end although all hosts answer")

    @property
    def is_idle(self) -> bool:
        return all(call.state.outcome is not None for call in self.calls.values())

    def check_whole(self) -> None:
        for call in self.calls.values():
            call.check_whole()
