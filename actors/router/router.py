"""The router: the library in every trunk process that computes experts' layers in the pool.

It is a thin shell around `cluster/routing/dispatch.py`. Any number of calls may be in progress, in
one thread or several: `dispatch` sends a call and returns, `PoolCall.combine` waits for its result.
The calling thread itself sends and adds the answers up. Of the threads that wait, one waits for all
hosts at once, handles what arrives for any call, and wakes the others. Between calls, `Upkeep`
looks after the connections while somebody waits for an expert.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertKey, LayerKey
from ...cluster.load.meter import LoadReport
from ...cluster.placement import Placement, PlacementId
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
from ...cluster.routing.host_health import HostState
from ...cluster.routing.policy import RouterPolicy
from ...cluster.routing.transports import TransportChoice
from ...models.trunk.in_pool import PoolFunction
from ...proto.errors import CallError, ClusterError, ExpertUnavailable, from_wire
from ...proto.expert_pb2 import Frame
from ...proto.keys import ClusterSecret, secret_of_process
from ...proto.wire import DTYPE_TO_WIRE
from .call_log import CallLog
from .connections import HostConnections
from .layer_tensors import LayerTensors, check_shapes
from .pool_call import PoolCall, RunningCall
from .router_stats import RouterStats
from .row_attribution import RowAttribution
from .upkeep import Upkeep

# Limits the damage if a wake-up is ever missed.
LONGEST_WAIT_S = 5.0
_CPU = torch.device("cpu")


class Router:
    """Computes experts' layers on the hosts of a placement; thread-safe."""

    def __init__(
        self,
        *,
        name: str,
        node: str,
        policy: RouterPolicy | None = None,
        transport: TransportChoice = "auto",
        device: torch.device = _CPU,
        refresh: Callable[[], None] | None = None,
        secret: ClusterSecret | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a router that waits for its first placement.

        ``node`` is this process's Ray node and ``device`` is where its tensors are; both decide
        which transport reaches a host. ``refresh`` is called when a host lacks an expert that the
        placement promises; it must not block. ``secret`` is the secret of the hosts' cluster (None:
        that of this process).
        """
        self.name = name
        self._clock = clock
        self.policy = policy or RouterPolicy()
        self._upkeep = Upkeep(name, self._look_after)
        self.expecting = self._upkeep.expecting
        self.batch = RowAttribution(name, self.has, self.expecting)
        self.step = 0  # forward passes that have begun
        self._log = CallLog(name)
        self._refresh = refresh
        self._dispatcher = Dispatcher(self.policy)
        slots = self.policy.window
        self._connections = HostConnections(
            router=name,
            node=node,
            transport=transport,
            slots=slots,
            device=device,
            secret=secret or secret_of_process(),
            clock=clock,
        )
        self._running: dict[int, RunningCall] = {}  # whose result was not taken, by their numbers
        self._calls = self._rows = 0
        # Never held while a thread waits for events.
        self._lock = threading.RLock()
        # A thread waits for events now; the others wait until it has handled some.
        self._polling = False
        self._heard = threading.Condition(self._lock)
        # There is something to report: set when calls begin and layers are asked for.
        self.stirred = threading.Event()
        self._closed = False

    # ---- life -----------------------------------------------------------------------------------

    def place(self, placement: Placement) -> None:
        """Use ``placement`` from the next send on. Any thread may call this; it hardly blocks."""
        with self._lock:
            if self._closed:
                return
            self._execute(self._dispatcher.place(placement, self._clock()))
            self._tell_others()

    def wait_ready(self, timeout_s: float, layers: Sequence[LayerKey] = ()) -> None:
        """Wait until ``layers`` are placed and every host accepts calls. Raises ClusterError."""
        deadline = self._clock() + timeout_s
        while True:
            with self._lock:
                self._check_open()
                if self._ready(layers):
                    return
                self._ask_for(layers)
                self._wait(min(deadline, self._clock() + 0.05))
            if self._clock() >= deadline:
                states = (f"{h} {s.state.value}" for h, s in self._dispatcher.hosts.items())
                raise ClusterError(
                    f"router {self.name} was not ready within {timeout_s:g} s: "
                    f"{len(self._unplaced(layers))} of {len(layers)} layers have no placement; its "
                    f"hosts are {', '.join(states) or 'unknown'}"
                )

    def has(self, experts: Sequence[ExpertKey]) -> bool:
        """Return whether each of these experts has a host that accepts calls now.

        It neither waits nor connects: calls do so, and between them the router's own thread, while
        somebody is inside `expecting` (see `Upkeep`).
        """
        # Without the lock: placements are replaced as a whole, and each other read is of one value.
        now = self._clock()
        return all(self._dispatcher.registry.has(key, now) for key in experts)

    def _look_after(self, layers: Sequence[LayerKey]) -> None:
        """Handle what arrived and what is due, and ask for ``layers`` that are not placed."""
        with self._lock:
            if not self._closed:
                self._wait(self._clock())
                self._ask_for(layers)

    def stats(self) -> RouterStats:
        dispatcher = self._dispatcher
        return RouterStats(
            calls=self._calls,
            rows=self._rows,
            retries=dispatcher.retries,
            ejections=dispatcher.ejections,
            hedges=dispatcher.hedges,
            hedge_wins=dispatcher.hedge_wins,
            rows_lost=self.batch.lost,
            placement=self._number or PlacementId(0, 0),
            hosts={name: host.state.value for name, host in list(dispatcher.hosts.items())},
            transports=self._connections.transports,
        )

    def take_load(self) -> LoadReport:
        """Return the load counted since the last report, and the number of the placement in use."""
        with self._lock:
            dispatcher = self._dispatcher
            unplaced, dispatcher.asked_for = dispatcher.unplaced, None
            asked = () if unplaced is None else (unplaced,)
            return dispatcher.meter.take(self.name, self._number, dispatcher.received, asked)

    def _ask_for(self, layers: Sequence[LayerKey]) -> None:
        """Let the next report name a layer that no placement has, if one of these is."""
        self._dispatcher.asked_for = next(iter(self._unplaced(layers)), None)
        if self._dispatcher.asked_for is not None:
            self.stirred.set()

    @property
    def _number(self) -> PlacementId | None:
        placement = self._dispatcher.placement
        return None if placement is None else placement.id

    def close(self) -> None:
        """Close all connections; calls in progress end with ClusterError."""
        self._upkeep.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._connections.ring()
            self._heard.wait_for(lambda: not self._polling, LONGEST_WAIT_S)
            self._connections.close()
            self._heard.notify_all()

    # ---- computing ------------------------------------------------------------------------------

    def experts(self, model: str, layer: int) -> PoolFunction:
        """Return the function that computes one layer of one model in the pool."""
        key = LayerKey(model, layer)

        def compute(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return self.forward(key, x_TH, ids_TK, weights_TK)

        return compute

    def begin_step(self) -> None:
        """Start a forward pass: forget the rows that were lost in the last one.

        Its calls use the versions of weights that are served now, until `end_step`.
        """
        self.step += 1
        self.batch.begin_step(self.step)
        with self._lock:
            if not self._closed:
                self._execute(self._dispatcher.begin_step(self._clock()))

    def end_step(self) -> None:
        """End a forward pass: the next one may use other versions of weights."""
        with self._lock:
            if not self._closed:
                self._follow_newest(self._dispatcher.end_step(self._clock()))

    def forward(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Compute one layer: `dispatch` and `PoolCall.combine`."""
        return self.dispatch(key, x_TH, ids_TK, weights_TK).combine()

    @torch.no_grad()
    def dispatch(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> PoolCall:
        """Send one layer's call to the hosts, and return it at once.

        Its result is the weighted sum of the chosen experts: (T, H) in x's dtype and on its device.
        A choice outside [0, experts) is skipped. Each call must be combined or cancelled; its
        tensors must not change before, because a part of them may be sent again.
        """
        if x_TH.shape[0] == 0:
            return PoolCall(self, None, x_TH)
        if x_TH.dtype not in DTYPE_TO_WIRE:
            known = ", ".join(str(dtype) for dtype in DTYPE_TO_WIRE)
            raise CallError(f"dtype: hidden states are {x_TH.dtype}; use one of {known}")
        check_shapes(x_TH, ids_TK, weights_TK)
        if not self.stirred.is_set():
            self.stirred.set()
        with self._lock:
            self._check_open()
            if self._running and not self._polling:
                # What has arrived meanwhile is not late.
                self._hear(self._connections.wait(0.0))
            placement, dead = self._dispatcher.placement, self.batch.dead
            tensors = LayerTensors(
                key, placement, x_TH, ids_TK, weights_TK, without=dead, step=self.step
            )
            max_rows = self._rows_per_call(tensors)
            options = self.batch.options(tensors.tokens, self.policy.deadline_s)
            if options is not None and options.experts_T is not None:
                tensors.keep_top_experts(options.experts_T)
            began = self._clock()
            state, begun = self._dispatcher.begin(
                key,
                tensors.ids_TK,
                max_rows=max_rows,
                now=began,
                patience_T=None if options is None else options.patience_T,
            )
            self._calls += 1
            self._rows += tensors.tokens
            running = self._running[state.number] = RunningCall(state, tensors, options, began)
            try:
                self._execute(begun)
            except BaseException:
                self._over(running)
                raise
            self._tell_others()
            return PoolCall(self, running, x_TH)

    def combine(self, call: RunningCall, x_TH: Tensor) -> Tensor:
        """Wait for a call, and return its result (see `PoolCall.combine`)."""
        tensors = call.tensors
        with self._lock:
            try:
                while call.state.outcome is None and call.error is None:
                    self._check_open()
                    self._wait(self._dispatcher.wake_at(self._clock()))
                if call.error is not None:
                    raise call.error
                self._take_outcome(call)
                out_TH = tensors.combine()
                if (took_s := self._clock() - call.began) > self.policy.attempt_s:
                    self._log.slow(tensors, took_s)
                if tensors.bad_rows:
                    self.batch.report_bad(tensors)
            finally:
                self._over(call)
            if self.batch.dead:
                out_TH[[row for row in self.batch.dead if row < tensors.tokens]] = 0.0
            return out_TH.to(device=x_TH.device, dtype=x_TH.dtype)

    def cancel(self, call: RunningCall) -> None:
        """End a call without a result."""
        with self._lock:
            self._over(call)

    def _over(self, call: RunningCall) -> None:
        """Forget a call, and end it if it is in progress."""
        self._running.pop(call.state.number, None)
        if not self._closed:
            self._execute(self._dispatcher.cancel(call.state, self._clock()))
            self._follow_newest(self._dispatcher.follow_newest(self._clock()))
            self._tell_others()

    def _tell_others(self) -> None:
        """Let the threads that wait look again at what they wait for, and for how long."""
        if self._polling:
            self._connections.ring()
        self._heard.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise ClusterError(f"router {self.name} is closed")

    def _take_outcome(self, call: RunningCall) -> None:
        """Report what is lost, as the rows' options say; without an engine, raise an error."""
        tensors, options, outcome = call.tensors, call.options, call.state.outcome
        assert outcome is not None
        if outcome.ok:
            return
        if outcome.error is not None:
            error = from_wire(outcome.error.code, outcome.error.message)
        elif options is not None:
            self.batch.apply_fallback(tensors, options, outcome.lost)
            return
        else:
            error = ExpertUnavailable(
                f"{tensors.names(outcome.lost)}: no replica answered within "
                f"{self.policy.deadline_s:g} s"
            )
        self.batch.lose(tensors.rows_of(outcome.lost), error)

    def _rows_per_call(self, tensors: LayerTensors) -> int:
        """Return how many rows fit in one call to any host, even if all assignments go to it."""
        one = tensors.layout(1, tensors.top_k).slot_bytes
        fit = self._connections.slot_bytes // one
        if fit < 1:
            raise CallError(
                f"hidden: one row of {tensors.hidden} with {tensors.top_k} assignments takes {one} "
                f"bytes, and a call may have at most {self._connections.slot_bytes}"
            )
        return min(fit, self._connections.max_rows or fit)

    # ---- the state machine's shell --------------------------------------------------------------

    def _execute(self, commands: Iterable[RouterCommand]) -> None:
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

    def _fail(self, command: Send | Accept, error: Exception) -> list[RouterCommand]:
        """End the call whose tensors cannot be sent or taken; `combine` raises its error."""
        number = command.call if isinstance(command, Send) else command.send.call
        self._running[number].error = error
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
                f"router {self.name} was interrupted, and its calls have ended; call again"
            )
            for running in [] if self._closed else self._running.values():
                running.error = running.error or ended
                for command in self._dispatcher.abandon(running.state, self._clock()):
                    if isinstance(command, Disconnect):
                        self._connections.disconnect(command.host)
            self._tell_others()
            raise

    def _do(self, command: RouterCommand) -> None:
        match command:
            case Send():
                tensors = self._running[command.call].tensors
                frame, layout = tensors.frame(command)
                self._connections.send_call(
                    command.host,
                    frame,
                    layout,
                    lambda buffer: tensors.write(command, frame, layout, buffer),
                )
                if self._log.on:
                    self._log.sent(tensors, command, hedge=self._dispatcher.is_hedge(command.seq))
            case Accept(send):
                tensors = self._running[send.call].tensors
                reply, payload = self._connections.reply(send.host, send.seq)
                tensors.accept(send, reply, payload)
                if self._log.on:
                    self._log.answered(tensors, send, reply)
                assignments = int((send.assignment_tk >= 0).sum())
                meter = self._dispatcher.meter
                took_us = reply.queued_us, reply.busy_us, reply.batch_us
                meter.answered(send.host, assignments, *took_us)
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

    def _wait(self, until: float) -> None:
        """Wait for events until ``until``, and let the state machine handle them and timeouts.

        The caller holds the lock, which is free during the wait.
        """
        timeout_s = min(max(0.0, until - self._clock()), LONGEST_WAIT_S)
        if self._polling:
            self._heard.wait(timeout_s)
            if not self._closed:
                self._execute(self._dispatcher.tick(self._clock()))
            return
        ready: list[int] = []
        try:
            self._polling = True
            self._lock.release()
            ready = self._connections.wait(timeout_s)
        finally:
            self._lock.acquire()
            self._polling = False
            # Another thread waits from now on, if this one has what it wanted.
            self._heard.notify_all()
        if not self._closed:
            self._hear(ready)

    def _hear(self, ready: Sequence[int]) -> None:
        """Handle what has arrived, and then what is due."""
        with self._all_or_nothing():
            for event in self._connections.events(ready):
                if isinstance(event, Refused) and self._log.on:
                    call = self._dispatcher.call_of(event.seq)
                    if call is not None:
                        self._log.refused(self._running[call.number].tensors, event)
                self._execute(self._dispatcher.handle(event, self._clock(), more=True))
            self._execute(self._dispatcher.tick(self._clock()))

    def _follow_newest(self, commands: Sequence[RouterCommand]) -> None:
        """Carry out what following the newest placement needs, and report that it is followed."""
        if commands:
            self._execute(commands)
            self.stirred.set()

    def _unplaced(self, layers: Sequence[LayerKey]) -> list[LayerKey]:
        placement = self._dispatcher.placement
        return [key for key in layers if placement is None or key not in placement.layers]

    def _ready(self, layers: Sequence[LayerKey]) -> bool:
        hosts = self._dispatcher.hosts.values()
        up = bool(hosts) and all(host.state is HostState.UP for host in hosts)
        return up and not self._unplaced(layers)
