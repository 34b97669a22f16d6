"""The router: the library in every trunk process that computes experts' layers in the pool.

It is a thin shell around `cluster/routing/dispatch.py`. The calling thread itself sends the calls,
waits for all hosts at once and adds the answers up, so a call is never handed to another thread.
Between calls, `Upkeep` looks after the connections while somebody waits for an expert.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from ...cluster.routing.transports import Transport, TransportChoice
from ...models.trunk.in_pool import PoolFunction
from ...proto.errors import CallError, ClusterError, ExpertUnavailable, from_wire
from ...proto.expert_pb2 import Frame
from ...proto.keys import ClusterSecret, secret_of_process
from ...proto.wire import DTYPE_TO_WIRE
from .call_log import CallLog
from .connections import HostConnections
from .layer_tensors import LayerTensors, check_shapes
from .row_attribution import RowAttribution
from .upkeep import Upkeep


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    retries: int
    ejections: int
    hedges: int  # sends that repeated a late one
    hedge_wins: int  # hedges that were answered before the send that they repeated
    rows_lost: int
    placement: PlacementId
    hosts: dict[str, str]
    transports: dict[str, Transport]  # of the hosts that are connected


# Limits the damage if a wake-up is ever missed.
LONGEST_WAIT_S = 5.0
# How long a load report waits for the running call to end.
HAND_OVER_S = 1.0
_CPU = torch.device("cpu")


class Router:
    """Computes experts' layers on the hosts of a placement, one call at a time; thread-safe."""

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
        self._tensors: LayerTensors | None = None
        self._calls = self._rows = 0
        self._lock = threading.RLock()
        self._placements: queue.SimpleQueue[Placement] = queue.SimpleQueue()
        # Set when `take_load` gave up waiting for the lock: the running call then puts the report
        # into the queue when it ends.
        self._report_wanted = False
        # There is something to report: set when calls begin and layers are asked for.
        self.stirred = threading.Event()
        self._handed: queue.SimpleQueue[LoadReport] = queue.SimpleQueue()
        self._closed = False

    # ---- life -----------------------------------------------------------------------------------

    def place(self, placement: Placement) -> None:
        """Use ``placement`` from the next send on. Any thread may call this; it hardly blocks."""
        self._placements.put(placement)
        if self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self._take_placements()
            finally:
                self._lock.release()
        else:
            # The thread that holds the lock also polls the bell, and takes the placement then.
            self._connections.ring()

    def wait_ready(self, timeout_s: float, layers: Sequence[LayerKey] = ()) -> None:
        """Wait until ``layers`` are placed and every host accepts calls. Raises ClusterError."""
        deadline = self._clock() + timeout_s
        while True:
            with self._lock:
                if self._ready(layers):
                    return
                self._ask_for(layers)
                # Short waits, so that other threads get the lock in between.
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
        # Without the lock, which a call holds for its whole time. Placements are replaced as a
        # whole, and each other read is of one value.
        now = self._clock()
        return all(self._dispatcher.registry.has(key, now) for key in experts)

    def _look_after(self, layers: Sequence[LayerKey]) -> None:
        """Handle what arrived and what is due, and ask for ``layers`` that are not placed.

        Does nothing while a call runs, whose thread does it.
        """
        if self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self._wait(self._clock())
                    self._ask_for(layers)
            finally:
                self._lock.release()

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
        """Return the load counted since the last report, and the number of the placement in use.

        It waits little longer than `HAND_OVER_S`: if slow calls keep the lock, the next one that
        ends hands the counts over.
        """
        if self._handed.empty():
            if self._lock.acquire(timeout=0.05):
                try:
                    if not self._closed:
                        self._take_placements()
                    return self._report()
                finally:
                    self._lock.release()
            self._report_wanted = True
        # A call that waits for an unplaced layer ends only after the controller has heard of that
        # layer. So do not wait for the call; report the layer without counts.
        unplaced = self._dispatcher.unplaced
        try:
            return self._handed.get(timeout=HAND_OVER_S if unplaced is None else 0)
        except queue.Empty:
            asked = () if unplaced is None else (unplaced,)
            return LoadReport(
                router=self.name,
                placement_id=self._number,
                received=self._dispatcher.received,
                unplaced=asked,
            )

    def _report(self) -> LoadReport:
        """Take the counts and the unplaced layer; the caller holds the lock."""
        unplaced, self._dispatcher.unplaced = self._dispatcher.unplaced, None
        asked = () if unplaced is None else (unplaced,)
        dispatcher = self._dispatcher
        return dispatcher.meter.take(self.name, self._number, dispatcher.received, asked)

    def _ask_for(self, layers: Sequence[LayerKey]) -> None:
        """Let the next report name a layer that no placement has, if one of these is."""
        self._dispatcher.unplaced = next(iter(self._unplaced(layers)), None)
        if self._dispatcher.unplaced is not None:
            self.stirred.set()

    @property
    def _number(self) -> PlacementId | None:
        placement = self._dispatcher.placement
        return None if placement is None else placement.id

    def close(self) -> None:
        self._upkeep.close()
        with self._lock:
            if not self._closed:
                self._closed = True
                self._connections.close()

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
                self._take_placements()
                self._execute(self._dispatcher.begin_step(self._clock()))

    def end_step(self) -> None:
        """End a forward pass: the next one may use other versions of weights."""
        with self._lock:
            if not self._closed:
                self._follow_newest(self._dispatcher.end_step(self._clock()))

    @torch.no_grad()
    def forward(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts: (T, H) in x's dtype and on its device.

        A choice outside [0, experts) is skipped. If no replica of an expert answered in time, the
        call raises ExpertUnavailable with the expert's name; if `batch.on_lost` is set, the
        affected rows are zero instead.
        """
        if x_TH.shape[0] == 0:
            return x_TH.clone()
        if x_TH.dtype not in DTYPE_TO_WIRE:
            known = ", ".join(str(dtype) for dtype in DTYPE_TO_WIRE)
            raise CallError(f"dtype: hidden states are {x_TH.dtype}; use one of {known}")
        check_shapes(x_TH, ids_TK, weights_TK)
        if not self.stirred.is_set():
            self.stirred.set()
        with self._lock:
            if self._closed:
                raise ClusterError(f"router {self.name} is closed")
            self._take_placements()
            placement = self._dispatcher.placement
            tensors = LayerTensors(
                key, placement, x_TH, ids_TK, weights_TK, without=self.batch.dead, step=self.step
            )
            self._tensors = tensors
            began = self._clock()
            try:
                self._run(tensors)
                out_TH = tensors.combine()
                if (took_s := self._clock() - began) > self.policy.attempt_s:
                    self._log.slow(tensors, took_s)
                if tensors.bad_rows:
                    self.batch.report_bad(tensors)
            except BaseException:
                self._execute(self._dispatcher.abandon(self._clock()))
                raise
            finally:
                self._tensors = None
                self._follow_newest(self._dispatcher.follow_newest(self._clock()))
                if self._report_wanted:
                    self._report_wanted = False
                    self._handed.put(self._report())
            if self.batch.dead:
                out_TH[[row for row in self.batch.dead if row < tensors.tokens]] = 0.0
            return out_TH.to(device=x_TH.device, dtype=x_TH.dtype)

    def _run(self, tensors: LayerTensors) -> None:
        self._calls += 1
        self._rows += tensors.tokens
        dispatcher = self._dispatcher
        max_rows = self._rows_per_call(tensors)
        options = self.batch.options(tensors.tokens, self.policy.deadline_s)
        patience_T = None if options is None else options.patience_T
        if options is not None and options.experts_T is not None:
            tensors.keep_top_experts(options.experts_T)
        begun = dispatcher.begin(
            tensors.key, tensors.ids_TK, max_rows=max_rows, now=self._clock(), patience_T=patience_T
        )
        self._execute(begun)
        while dispatcher.outcome is None:
            self._wait(dispatcher.wake_at(self._clock()))
        outcome = dispatcher.outcome
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
        while True:
            for lost in self._connections.take_lost():
                todo.extend(self._dispatcher.handle(lost, self._clock()))
            if not todo:
                return
            self._do(todo.popleft())

    def _do(self, command: RouterCommand) -> None:
        match command:
            case Send():
                tensors = self._tensors
                assert tensors is not None
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
                assert self._tensors is not None
                reply, payload = self._connections.reply(send.host, send.seq)
                self._tensors.accept(send, reply, payload)
                if self._log.on:
                    self._log.answered(self._tensors, send, reply)
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
        """Wait for events until ``until``, and let the state machine handle them and timeouts."""
        timeout_s = min(max(0.0, until - self._clock()), LONGEST_WAIT_S)
        heard = False
        for event in self._connections.events(timeout_s):
            heard = True
            if isinstance(event, Refused) and self._tensors is not None and self._log.on:
                self._log.refused(self._tensors, event)
            self._execute(self._dispatcher.handle(event, self._clock()))
        self._take_placements()
        self._execute(() if heard else self._dispatcher.tick(self._clock()))

    def _take_placements(self) -> None:
        while not self._placements.empty():
            self._execute(self._dispatcher.place(self._placements.get_nowait(), self._clock()))

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
