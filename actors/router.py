"""The router: the library in every trunk process that computes experts' layers in the pool.

A thin shell around `cluster/dispatch.py`: the calling thread itself sends, waits for all hosts at
once and adds the answers up, so that no call passes through another thread.

Shape suffixes: T = tokens, H = hidden size, K = choices of a token, N = T * K choices flattened,
t and k = rows and columns of one send.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..cluster.dispatch import Dispatcher
from ..cluster.events import (
    Accept,
    Cancel,
    Command,
    Connect,
    Disconnect,
    Event,
    HostDown,
    HostUp,
    Ponged,
    Probe,
    Refresh,
    Refused,
    Replied,
    Send,
)
from ..cluster.health import HostState, RouterPolicy
from ..cluster.placement import HostEntry, LayerKey, Number, Placement
from ..models.trunk import PoolFunction
from ..proto.errors import (
    BadExpert,
    CallError,
    ClusterError,
    ExpertUnavailable,
    HostLost,
    MoesaicError,
    from_wire,
)
from ..proto.expert_pb2 import Frame
from ..proto.wire import DTYPE_TO_WIRE, CallLayout
from .transport.base import Channel, Inbound
from .transport.connect import TransportChoice, connect

log = logging.getLogger(__name__)

# (rows of the trunk's batch, why they have no result); their values are zero.
RowsLost = Callable[[list[int], MoesaicError], None]


@dataclass(slots=True)
class _Job:
    """The tensors of the layer's call in progress."""

    key: LayerKey
    exact: bool
    number: Number
    x_TH: Tensor
    weights_N: np.ndarray
    ids_N: np.ndarray
    top_k: int
    parts: list[tuple[Send, Tensor]] = field(default_factory=list)
    bad: list[tuple[int, list[int]]] = field(default_factory=list)  # (expert, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    calls: int
    rows: int
    retries: int
    ejections: int
    rows_lost: int
    placement: Number
    hosts: dict[str, str]


class Router:
    """Computes experts' layers on the hosts of a placement. One call at a time; thread-safe."""

    def __init__(
        self,
        *,
        name: str,
        node: str,
        policy: RouterPolicy | None = None,
        transport: TransportChoice = "auto",
        refresh: Callable[[], None] | None = None,
    ) -> None:
        """``node`` is this process's Ray node: hosts on it are reached over shared memory.

        ``refresh`` is called when a host lacks what the placement says; it must not block.
        """
        self.name = name
        self.policy = policy or RouterPolicy()
        # Set by a trunk's engine: rows without a result are reported, not raised.
        self.on_rows_lost: RowsLost | None = None
        self._node = node
        self._transport: TransportChoice = transport
        self._refresh = refresh
        self._dispatcher = Dispatcher(self.policy)
        self._channels: dict[str, Channel] = {}
        self._max_rows: dict[str, int] = {}
        self._payloads: dict[tuple[str, int], Inbound] = {}
        self._dead_rows: set[int] = set()
        self._job: _Job | None = None
        self._calls = self._rows = self._rows_lost = 0
        self._lock = threading.RLock()
        self._placements: queue.SimpleQueue[Placement] = queue.SimpleQueue()
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._closed = False

    # ---- life -----------------------------------------------------------------------------------

    def place(self, placement: Placement) -> None:
        """Follow ``placement`` from the next send on. From any thread; never waits long."""
        self._placements.put(placement)
        if self._lock.acquire(blocking=False):
            try:
                if not self._closed:
                    self._take_placements()
            finally:
                self._lock.release()
        else:
            # Whoever holds the lock waits on this descriptor.
            os.eventfd_write(self._wake, 1)

    def wait_ready(self, timeout_s: float, layers: Sequence[LayerKey] = ()) -> None:
        """Wait until ``layers`` are placed and every host takes calls. Raises ClusterError."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._ready(layers):
                if time.monotonic() >= deadline:
                    states = {h: s.state.value for h, s in self._dispatcher.hosts.items()}
                    raise ClusterError(
                        f"router {self.name}: not ready after {timeout_s:g} s: hosts {states}, "
                        f"{self._unplaced(layers)} of {len(layers)} layers not placed"
                    )
                self._wait(min(deadline, time.monotonic() + 0.2))

    def stats(self) -> RouterStats:
        dispatcher = self._dispatcher
        placement = dispatcher.placement
        return RouterStats(
            calls=self._calls,
            rows=self._rows,
            retries=dispatcher.retries,
            ejections=dispatcher.ejections,
            rows_lost=self._rows_lost,
            placement=placement.number if placement else Number(0, 0),
            hosts={name: host.state.value for name, host in dispatcher.hosts.items()},
        )

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for host in list(self._channels):
                self._disconnect(host)
            self._epoll.close()
            os.close(self._wake)

    # ---- computing ------------------------------------------------------------------------------

    def experts(self, model: str, layer: int) -> PoolFunction:
        """The function that computes one layer of one model in the pool."""
        key = LayerKey(model, layer)

        def compute(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return self.forward(key, x_TH, ids_TK, weights_TK)

        return compute

    def begin_step(self) -> None:
        """A trunk starts a forward pass: rows that were lost in the last one are forgotten."""
        self._dead_rows.clear()

    @torch.no_grad()
    def forward(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts: (T, H) in x's dtype and on its device.

        A choice outside [0, experts) is skipped. Raises ExpertUnavailable, naming the expert, when
        no replica answered in time, unless `on_rows_lost` is set; then those rows are zero.
        """
        if x_TH.shape[0] == 0:
            return x_TH.clone()
        if x_TH.dtype not in DTYPE_TO_WIRE:
            known = ", ".join(str(dtype) for dtype in DTYPE_TO_WIRE)
            raise CallError(f"dtype: hidden states are {x_TH.dtype}, the wire knows {known}")
        with self._lock:
            if self._closed:
                raise ClusterError(f"router {self.name}: closed")
            self._take_placements()
            job = self._job = self._new_job(key, x_TH, ids_TK, weights_TK)
            try:
                self._run(job)
                return self._combine(job).to(device=x_TH.device, dtype=x_TH.dtype)
            finally:
                self._job = None

    def _new_job(self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> _Job:
        placement = self._dispatcher.placement
        ids = ids_TK.to(device="cpu", dtype=torch.int32).contiguous().numpy()
        layer = placement.layers.get(key) if placement else None
        if layer is not None:
            # transformers marks choices that belong to nobody with the number of experts.
            outside = (ids < 0) | (ids >= len(layer.replicas))
            ids = np.where(outside, np.int32(-1), ids)
        if self._dead_rows:
            ids = ids.copy()
            ids[sorted(self._dead_rows)] = -1
        return _Job(
            key=key,
            exact=placement is not None and key.model in placement.exact,
            number=placement.number if placement else Number(0, 0),
            x_TH=x_TH.detach(),
            weights_N=weights_TK.detach().to("cpu", torch.float32).reshape(-1).numpy(),
            ids_N=ids.reshape(-1),
            top_k=ids.shape[1],
        )

    def _run(self, job: _Job) -> None:
        ids_TK = job.ids_N.reshape(-1, job.top_k)
        self._calls += 1
        self._rows += ids_TK.shape[0]
        dispatcher = self._dispatcher
        self._execute(
            dispatcher.begin(job.key, ids_TK, max_rows=self._rows_per_call(job), now=_now())
        )
        while dispatcher.outcome is None:
            self._wait(dispatcher.wake_at(_now()))
        outcome = dispatcher.outcome
        if outcome.ok:
            return
        rows = sorted({int(n) // job.top_k for n in outcome.lost})
        if outcome.error is not None:
            error = from_wire(outcome.error.code, outcome.error.message)
        else:
            missing = [str(job.key.expert(int(e))) for e in np.unique(job.ids_N[outcome.lost])]
            error = ExpertUnavailable(
                f"{', '.join(missing[:4])}{' and others' if missing[4:] else ''}: no replica "
                f"answered within {self.policy.deadline_s:g} s"
            )
        self._lose(rows, error)
        # What was accepted of these rows would be a part of their sum only.
        job.ids_N.reshape(-1, job.top_k)[rows] = -1

    def _lose(self, rows: list[int], error: MoesaicError) -> None:
        self._rows_lost += len(rows)
        if self.on_rows_lost is None:
            raise error
        self._dead_rows.update(rows)
        self.on_rows_lost(rows, error)

    def _rows_per_call(self, job: _Job) -> int:
        """Rows that fit in one call to every host, whatever choices they bring."""
        slot_bytes = min((c.slot_bytes for c in self._channels.values()), default=1 << 20)
        one = CallLayout.of(1, job.x_TH.shape[1], job.top_k, job.x_TH.dtype, job.exact)
        fit = slot_bytes // (one.slot_bytes + 64)
        if fit < 1:
            raise CallError(
                f"hidden: one row of {job.x_TH.shape[1]} with {job.top_k} choices takes "
                f"{one.slot_bytes} bytes, a call may have {slot_bytes}"
            )
        return min(fit, *self._max_rows.values()) if self._max_rows else fit

    def _combine(self, job: _Job) -> Tensor:
        """Add the answers up, in an order that does not depend on when they came."""
        tokens, hidden = job.x_TH.shape
        if job.exact:
            y_NH = torch.zeros(tokens * job.top_k, hidden)
            for send, part_tkH in job.parts:
                valid = torch.from_numpy(send.choice_tk >= 0)
                y_NH[torch.from_numpy(send.choices)] = part_tkH[valid]
            y_TKH = y_NH.view(tokens, job.top_k, hidden)
            out = y_TKH[:, 0].clone()
            for k in range(1, job.top_k):
                out += y_TKH[:, k]
        else:
            job.parts.sort(key=lambda part: (part[0].host, part[0].choice_tk[0, 0]))
            out = torch.zeros(tokens, hidden)
            for send, part_tH in job.parts:
                if send.token_t.size == tokens:
                    out += part_tH
                else:
                    out.index_add_(0, torch.from_numpy(send.token_t), part_tH)
        if self._dead_rows:
            out[sorted(row for row in self._dead_rows if row < tokens)] = 0.0
        if job.bad:
            self._report_bad(job, out)
        return out

    def _report_bad(self, job: _Job, out: Tensor) -> None:
        rows = sorted({row for _, rows in job.bad for row in rows})
        names = ", ".join(str(job.key.expert(expert)) for expert, _ in job.bad)
        error = BadExpert(f"{names}: output is not finite")
        log.error("router %s: %s; rows %s", self.name, error, rows)
        if self.on_rows_lost is not None:
            out[rows] = 0.0
            self._lose(rows, error)

    # ---- carrying out commands ------------------------------------------------------------------

    def _execute(self, commands: Iterable[Command]) -> None:
        todo = deque(commands)
        while todo:
            command = todo.popleft()
            try:
                self._do(command)
            except HostLost as lost:
                host = command.entry.host if isinstance(command, Connect) else _host_of(command)
                todo.extend(self._lost(host, lost))

    def _do(self, command: Command) -> None:
        match command:
            case Send():
                self._send(command)
            case Accept(send):
                self._accept(send)
            case Connect(entry):
                self._connect(entry)
            case Disconnect(host):
                self._disconnect(host)
            case Cancel(host, seq):
                frame = Frame()
                frame.cancel.seq = seq
                self._tell(host, frame)
            case Probe(host):
                frame = Frame()
                frame.ping.seq = 0
                self._tell(host, frame)
            case Refresh():
                if self._refresh is not None:
                    self._refresh()

    def _tell(self, host: str, frame: Frame) -> None:
        channel = self._channels.get(host)
        if channel is not None:
            channel.send(frame)

    def _send(self, send: Send) -> None:
        job = self._job
        channel = self._channels.get(send.host)
        if channel is None:
            raise HostLost(f"{send.host}: no connection")
        assert job is not None
        rows, top_k = send.choice_tk.shape
        layout = CallLayout.of(rows, job.x_TH.shape[1], top_k, job.x_TH.dtype, job.exact)
        frame = Frame()
        call = frame.call
        call.seq = send.seq
        call.model, call.layer = job.key
        call.term, call.epoch = job.number
        call.incarnation = send.incarnation
        call.timeout_us = max(0, int(send.timeout_s * 1e6))
        call.rows, call.hidden, call.top_k = rows, job.x_TH.shape[1], top_k
        call.dtype = DTYPE_TO_WIRE[job.x_TH.dtype]
        call.exact = job.exact
        call.payload_bytes = layout.call_bytes

        def write(buffer: Tensor) -> None:
            x_tH, ids_tk, weights_tk = layout.call_tensors(buffer)
            if rows == job.x_TH.shape[0]:
                x_tH.copy_(job.x_TH)
            elif job.x_TH.device.type == "cpu":
                torch.index_select(job.x_TH, 0, torch.from_numpy(send.token_t), out=x_tH)
            else:
                token_t = torch.from_numpy(send.token_t).to(job.x_TH.device)
                x_tH.copy_(job.x_TH.index_select(0, token_t))
            ids_tk.copy_(torch.from_numpy(send.ids_tk))
            # An unused choice (-1) takes some weight; hosts skip it by its id.
            weights_tk.copy_(torch.from_numpy(job.weights_N[send.choice_tk]))

        channel.send_call(frame, layout, write)

    def _accept(self, send: Send) -> None:
        inbound = self._payloads.pop((send.host, send.seq))
        job = self._job
        assert job is not None
        assert inbound.payload is not None
        rows, top_k = send.choice_tk.shape
        layout = CallLayout.of(rows, job.x_TH.shape[1], top_k, job.x_TH.dtype, job.exact)
        part = layout.reply_tensor(inbound.payload).clone()
        job.parts.append((send, part))
        self._channels[send.host].release(send.seq)
        for expert in inbound.frame.reply.bad_experts:
            hit = (send.ids_tk == expert).any(axis=1)
            broken = ~torch.isfinite(part.view(rows, -1)).all(dim=1).numpy()
            job.bad.append((expert, send.token_t[hit & broken].tolist()))

    def _connect(self, entry: HostEntry) -> None:
        self._disconnect(entry.host)
        channel = connect(
            entry,
            router=self.name,
            node=self._node,
            choice=self._transport,
            slots=self.policy.window,
        )
        self._channels[entry.host] = channel
        self._epoll.register(channel.fileno(), select.EPOLLIN)

    def _disconnect(self, host: str) -> None:
        channel = self._channels.pop(host, None)
        self._max_rows.pop(host, None)
        if channel is None:
            return
        for key in [key for key in self._payloads if key[0] == host]:
            del self._payloads[key]
        self._epoll.unregister(channel.fileno())
        channel.close()

    def _lost(self, host: str, reason: HostLost) -> list[Command]:
        log.info("router %s: host %s: %s", self.name, host, reason)
        self._disconnect(host)
        return self._dispatcher.handle(HostDown(host), _now())

    # ---- hearing events -------------------------------------------------------------------------

    def _take_placements(self) -> None:
        while not self._placements.empty():
            self._execute(self._dispatcher.place(self._placements.get_nowait(), _now()))

    def _unplaced(self, layers: Sequence[LayerKey]) -> int:
        placement = self._dispatcher.placement
        return sum(1 for key in layers if placement is None or key not in placement.layers)

    def _ready(self, layers: Sequence[LayerKey]) -> bool:
        hosts = self._dispatcher.hosts.values()
        up = bool(hosts) and all(host.state is HostState.UP for host in hosts)
        return up and not self._unplaced(layers)

    def _wait(self, until: float) -> None:
        """Hear what comes until ``until``, and let the state machine act on it and on time."""
        timeout_s = min(max(0.0, until - _now()), 5.0)
        # Above the kernel's millisecond, so that a deadline has passed when the wait ends.
        ready = self._epoll.poll(timeout_s + 0.0005 if timeout_s else 0.0)
        by_fd = {channel.fileno(): channel for channel in self._channels.values()}
        for fd, _ in ready:
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._take_placements()
            elif fd in by_fd:
                self._hear(by_fd[fd])
        if not ready:
            self._execute(self._dispatcher.tick(_now()))

    def _hear(self, channel: Channel) -> None:
        try:
            arrived = channel.receive()
        except HostLost as lost:
            self._execute(self._lost(channel.host, lost))
            return
        for inbound in arrived:
            event = self._event(channel, inbound)
            if event is not None:
                self._execute(self._dispatcher.handle(event, _now()))
                if isinstance(event, Replied) and (event.host, event.seq) in self._payloads:
                    # Nobody wanted it any more.
                    del self._payloads[event.host, event.seq]
                    channel.release(event.seq)

    def _event(self, channel: Channel, inbound: Inbound) -> Event | None:
        frame, host = inbound.frame, channel.host
        match frame.WhichOneof("kind"):
            case "reply":
                self._payloads[host, frame.reply.seq] = inbound
                return Replied(host, frame.reply.seq)
            case "refusal":
                refusal = frame.refusal
                return Refused(host, refusal.seq, refusal.code, refusal.message)
            case "pong":
                return Ponged(host)
            case "welcome":
                self._max_rows[host] = max(1, frame.welcome.max_rows)
                return HostUp(host, frame.welcome.incarnation)
            case kind:
                log.warning("router %s: host %s sent %r, which hosts do not", self.name, host, kind)
                return None


def _host_of(command: Command) -> str:
    return command.send.host if isinstance(command, Accept) else getattr(command, "host", "")


def _now() -> float:
    return time.monotonic()
