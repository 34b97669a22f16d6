"""The shell of a router's state machine: it carries out commands, and tells what has arrived.

The router that owns it holds its lock around every call here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ...cluster.routing.dispatch import Dispatcher
from ...cluster.routing.events import (
    Accept,
    Cancel,
    Connect,
    Disconnect,
    Free,
    Probe,
    Refresh,
    Refused,
    RouterCommand,
    Send,
)
from ...proto.errors import ClusterError
from ...proto.expert_pb2 import Frame
from ..tracing.call_trace import trace_send
from .call_log import CallLog
from .connections import HostConnections
from .pool_call import RunningCall

# Limits the damage if a wake-up is ever missed.
LONGEST_WAIT_S = 5.0
_LISTEN_S = 0.02


class CommandShell:
    """Stands between a `Dispatcher` and the connections to hosts."""

    def __init__(
        self,
        name: str,
        dispatcher: Dispatcher,
        connections: HostConnections,
        *,
        clock: Callable[[], float],
        refresh: Callable[[], None] | None,
        interrupted: Callable[[], None],
    ) -> None:
        """``refresh`` is called when a host lacks an expert that the placement promises.

        ``interrupted`` is called when an interrupt has ended all calls in progress.
        """
        # Calls whose result was not taken yet, by the state machine's numbers.
        self.running: dict[int, RunningCall] = {}
        self.closed = False
        self._name = name
        self._dispatcher = dispatcher
        self._connections = connections
        self._clock = clock
        self._refresh = refresh
        self._interrupted = interrupted
        self._log = CallLog(name)

    def execute(self, commands: Iterable[RouterCommand]) -> None:
        todo = deque(commands)
        with self._all_or_nothing():
            while True:
                for lost in self._connections.take_lost():
                    todo.extend(self._dispatcher.handle(lost, self._clock()))
                if not todo:
                    return
                command = todo.popleft()
                try:
                    self._do(command)
                except Exception as error:
                    if not isinstance(command, Send | Accept):
                        raise
                    todo.extend(self._fail(command, error))

    def hear(self, ready: Sequence[int]) -> None:
        """Handle what has arrived there, and then what is due."""
        with self._all_or_nothing():
            for event in self._connections.events(ready):
                if isinstance(event, Refused):
                    self._note_refusal(event)
                self.execute(self._dispatcher.handle(event, self._clock(), more=True))
            self.tick()

    def _note_refusal(self, event: Refused) -> None:
        call = self._dispatcher.call_of(event.seq)
        if call is None:
            return
        tensors = self.running[call.number].tensors
        if tensors.trace is not None:
            tensors.trace.refused(event.seq, event.code)
        if self._log.on:
            self._log.refused(tensors, event)

    def tick(self) -> None:
        """Do what is due."""
        self.execute(self._dispatcher.tick(self._clock()))

    def _fail(self, command: Send | Accept, error: Exception) -> list[RouterCommand]:
        """End the call whose tensors cannot be sent or taken; `combine` raises its error."""
        number = command.call if isinstance(command, Send) else command.send.call
        self.running[number].error = error
        state = self._dispatcher.call(number)
        return [] if state is None else self._dispatcher.cancel(state, self._clock())

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """End all calls in progress if the block is interrupted, at an unknown point.

        The router may have left out a command, such as accepting an answer, and does not know for
        which call.
        """
        try:
            yield
        except BaseException:
            ended = ClusterError(
                f"router {self._name} was interrupted, and its calls have ended; call again"
            )
            for running in [] if self.closed else self.running.values():
                running.error = running.error or ended
                assert running.state is not None  # others are not in progress
                for command in self._dispatcher.abandon(running.state, self._clock()):
                    if isinstance(command, Disconnect):
                        self._connections.disconnect(command.host)
            self._interrupted()
            raise

    def _do(self, command: RouterCommand) -> None:
        match command:
            case Send():
                tensors = self.running[command.call].tensors
                frame, layout = tensors.frame(command)
                if tensors.trace is not None:
                    hedge = self._dispatcher.is_hedge(command.seq)
                    trace_send(tensors.trace, command, frame, hedge=hedge)
                self._connections.send_call(
                    command.host,
                    frame,
                    layout,
                    lambda buffer: tensors.write(command, frame, layout, buffer),
                )
                if self._log.on:
                    self._log.sent(tensors, command, hedge=self._dispatcher.is_hedge(command.seq))
            case Accept(send):
                tensors = self.running[send.call].tensors
                reply, payload = self._connections.reply(send.host, send.seq)
                tensors.accept(send, reply, payload)
                if self._log.on:
                    self._log.answered(tensors, send, reply)
                if tensors.trace is not None:
                    tensors.trace.answered(send.seq, reply.queued_us, reply.batch_us)
                if tensors.half is None:
                    assignments = int((send.assignment_tk >= 0).sum())
                    took_us = reply.queued_us, reply.busy_us, reply.batch_us
                    self._dispatcher.meter.answered(send.host, assignments, *took_us)
            case Connect(entry):
                self._connections.connect(entry)
            case Disconnect(host):
                self._connections.disconnect(host)
            case Cancel(host, seq):
                self._connections.send(host, Frame(cancel={"seq": seq}))
            case Probe(host, number):
                self._connections.send(host, Frame(ping={"seq": number}))
            case Free(host, seq):
                self._connections.free(host, seq)
            case Refresh():
                if self._refresh is not None:
                    self._refresh()


class Waiting:
    """Waits for hosts: of all threads that wait, one listens, and wakes the others."""

    def __init__(
        self,
        shell: CommandShell,
        connections: HostConnections,
        lock: threading.RLock,
        clock: Callable[[], float],
    ) -> None:
        """``lock`` is the router's; its holder calls these methods, but for `may_have_heard`."""
        self._shell = shell
        self._connections = connections
        self._lock = lock
        self._clock = clock
        self._listen_at = clock()  # when to look for events without waiting for an answer
        # A thread listens now; the others wait until it has handled some events.
        self._listening = False
        self._heard = threading.Condition(lock)

    def until(self, when: float) -> None:
        """Wait for events until ``when``, and let the state machine handle them and timeouts.

        The lock is free during the wait.
        """
        timeout_s = min(max(0.0, when - self._clock()), LONGEST_WAIT_S)
        if self._listening:
            self._heard.wait(timeout_s)
            if not self._shell.closed:
                self._shell.tick()
            return
        ready: list[int] = []
        try:
            self._listening = True
            self._lock.release()
            ready = self._connections.wait(timeout_s)
        finally:
            self._lock.acquire()
            self._listening = False
            # Another thread listens from now on, if this one has what it wanted.
            self._heard.notify_all()
        if not self._shell.closed:
            self._hear(ready)

    def may_have_heard(self) -> bool:
        """Return whether `listen` would look for events; any thread may ask."""
        return bool(self._shell.running) or self._clock() >= self._listen_at

    def listen(self) -> None:
        """Handle what has arrived, before a call begins: it is not late, whatever waits for it."""
        if not self._listening and self.may_have_heard():
            self._hear(self._connections.wait(0.0))

    def wake_others(self) -> None:
        """Let the threads that wait look again at what they wait for, and for how long."""
        if self._listening:
            self._connections.ring()
        self._heard.notify_all()

    def stop(self) -> None:
        """Wait until no thread listens any more."""
        self._connections.ring()
        self._heard.wait_for(lambda: not self._listening, LONGEST_WAIT_S)

    def _hear(self, ready: Sequence[int]) -> None:
        self._listen_at = self._clock() + _LISTEN_S
        self._shell.hear(ready)
