"""The thread of an expert host that receives calls from routers, computes and answers them.

It is a thin shell around `cluster/host/residency.py`. The thread waits for all routers at once,
queues what arrived, computes the next batch, and starts over. Other threads load weights, and
announce them with `post`.

Shape suffixes: T = tokens (of merged calls), H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from ...cluster.expert_keys import ExpertVersion, LayerKey
from ...cluster.host.emulation import Emulation
from ...cluster.host.residency import QueuedCall, Residency, split_batch_time
from ...proto.errors import (
    CallError,
    Corrupted,
    HostLost,
    InternalError,
    MoesaicError,
    describe_error,
)
from ...proto.expert_pb2 import Call, Frame, Pong, Welcome
from ...proto.wire import WIRE_VERSION, CallLayout, checksum
from ..tracing.host_spans import trace_batch
from ..transport.base import InboundFrame, Listener, Session, call_id, call_of, check_slot
from ..transport.mailbox import Mailbox
from ..transport.poller import Epoll, Poller
from .compute import Compute, PendingCall, ReplyTensors
from .device import Device
from .device_compute import BatchCompute
from .gradients import HostGradients
from .lender import Lender
from .report import LoopStats
from .weight_store import ExpertStore

# How often listeners check for connections that have sent nothing.
_LOOK_S = 0.5
# A batch that takes longer is worth a warning.
SLOW_BATCH_S = 5.0

log = logging.getLogger(__name__)


class HostLoop:
    """Owns the sessions and the queue of one host; it runs from `start` to `close`."""

    def __init__(
        self,
        name: str,
        store: ExpertStore,
        residency: Residency,
        listeners: list[Listener],
        clock: Callable[[], float] = time.monotonic,
        *,
        lends: bool = False,
        compute: Compute | None = None,
        poller: Poller | None = None,
    ) -> None:
        """Take the parts of one host.

        ``lends``: routers that ask for it may compute with the memory of this host's experts.
        ``compute`` answers a batch (None: where the store's experts lie), and ``poller`` waits for
        all routers (None: the system's).
        """
        self.name = name
        self.failure: BaseException | None = None
        self._store = store
        self._clock = clock
        self._residency = residency
        self._listeners = listeners
        self._sessions: dict[int, Session] = {}
        self._pending: dict[tuple[str, int], PendingCall] = {}
        self._posted: Mailbox[Callable[[], None]] = Mailbox()
        self._compute_batch = compute or BatchCompute(store.device)
        self._poller = poller or Epoll()
        self._poller.register(self._posted.fileno())
        for listener in listeners:
            self._poller.register(listener.fileno())
        self._look_at = self.turned_at = clock()
        self._stopping = False
        self._refused = 0
        self._device = Device(residency.policy.emulate, clock)
        self._lender = Lender(store, clock) if lends else None
        self.gradients = HostGradients(store)  # for this loop's thread
        self._thread = threading.Thread(target=self._run, name=f"host-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the loop's thread, between two batches."""
        self._posted.put(work)

    def call(self, work: Callable[[], None], timeout_s: float = 30.0) -> None:
        """Run ``work`` as `post` does, and wait until it is done.

        Raises what ``work`` raises, and InternalError if the loop does not run it in time.
        """
        done: Future[None] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                # Whatever it is, the caller gets it, and the loop goes on.
                done.set_exception(error)

        self.post(run)
        try:
            done.result(timeout_s)
        except TimeoutError:
            done.add_done_callback(self._came_late)
            raise InternalError(
                f"host {self.name}: the loop did not answer for {timeout_s} s"
            ) from None

    def _came_late(self, done: Future[None]) -> None:
        """Log the error of a work for whose end its caller waits no more."""
        error = done.exception()
        if error is not None:
            log.error(
                "host %s: a task of the loop failed after its caller had stopped waiting",
                self.name,
                exc_info=error,
            )

    def stats(self) -> LoopStats:
        return self._device.stats(
            refused=self._refused,
            queued_rows=self._residency.queued_rows,
            routers=len(self._sessions),
        )

    def emulate(self, emulation: Emulation | None) -> None:
        """Emulate the speed of another device from the next batch on; None: stop emulating."""

        def change() -> None:
            self._device.emulate(emulation)
            # Who computes with this host's memory does not take the emulated device's time.
            for session, lost in self._lender.pause(emulation is not None) if self._lender else ():
                self._drop(session, lost)

        self.call(change)

    def close(self, timeout_s: float = 10.0) -> None:
        self._stopping = True
        if self._thread.is_alive():
            self._posted.end()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise InternalError(f"host {self.name}: the loop did not end within {timeout_s} s")
        elif self._posted.fileno() >= 0:
            self._free()

    def release(self, gone: Sequence[ExpertVersion]) -> None:
        """Forget experts and refuse the queued calls for them; call on the loop's thread only."""
        for queued, error in self._residency.release(gone):
            self._answer_with(queued, error)

    # ---- the loop -------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while not self._stopping:
                self.turn(self._poller.wait(0.0 if self._pending else 1.0))
        except BaseException as error:
            self.failure = error  # the next report ends this process
            log.exception("host %s: its loop failed", self.name, extra={"host": self.name})
        finally:
            self._free()

    def _free(self) -> None:
        self.gradients.forget()
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._pending.clear()
        for listener in self._listeners:
            listener.close()
        self._poller.close()
        self._posted.close()

    def turn(self, ready: Iterable[int]) -> bool:
        """Handle what has arrived there, and compute one batch; return whether calls still wait."""
        self.turned_at = self._clock()
        self._hear(ready)
        self._lend()
        self._work()
        return bool(self._pending)

    def _hear(self, ready: Iterable[int]) -> None:
        accepting = {listener.fileno(): listener for listener in self._listeners}
        for fd in ready:
            if fd == self._posted.fileno():
                for work in self._posted.take():
                    work()
            elif fd in accepting:
                self._accept(accepting[fd])
            elif fd in self._sessions:  # it may have been dropped earlier in this round
                self._hear_session(self._sessions[fd])
        # After the frames: a router whose Hello arrived during a long batch must not be dropped
        # for being silent.
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + _LOOK_S
            for listener in self._listeners:
                self._accept(listener)

    def _lend(self) -> None:
        for session, lost in self._lender.lend() if self._lender is not None else ():
            self._drop(session, lost)

    def _accept(self, listener: Listener) -> None:
        for session in listener.accept():
            self._sessions[session.fileno()] = session
            self._poller.register(session.fileno())

    def _hear_session(self, session: Session) -> None:
        try:
            for inbound in session.receive():
                self._on_frame(session, inbound)
        except HostLost as error:
            self._drop(session, error)

    def _drop(self, session: Session, reason: HostLost) -> None:
        log.info(
            "host %s: router %s is gone: %s",
            self.name,
            session.router,
            reason,
            extra={"host": self.name, "router": session.router},
        )
        fd = session.fileno()
        if self._sessions.pop(fd, None) is not None:
            self._poller.unregister(fd)
        if self._lender is not None:
            self._lender.gone(session)
        self._residency.router_gone(_router_id(session))
        for key in [k for k, p in self._pending.items() if p.session is session]:
            del self._pending[key]
        session.close()

    def _on_frame(self, session: Session, inbound: InboundFrame) -> None:
        frame = inbound.frame
        match frame.WhichOneof("kind"):
            case "hello":
                self._welcome(session, frame)
            case "call" | "backward":
                self._on_call(session, inbound)
            case "cancel":
                router = _router_id(session)
                self._residency.cancel(router, frame.cancel.seq)
                pending = self._pending.pop((router, frame.cancel.seq), None)
                if pending is not None:
                    # The router may reuse the slot only when it knows that the host does not
                    # write into it any more.
                    error = HostLost(f"call {frame.cancel.seq}: cancelled by its router")
                    self._refuse(session, frame.cancel.seq, error)
            case "ping":
                pong = Pong(seq=frame.ping.seq, incarnation=self._residency.incarnation)
                session.send(Frame(pong=pong))
            case kind:
                raise HostLost(f"{session.router}: routers must not send frames of kind {kind!r}")

    def _welcome(self, session: Session, frame: Frame) -> None:
        if frame.hello.wire_version != WIRE_VERSION:
            raise HostLost(
                f"wire_version: {session.router} has version {frame.hello.wire_version}, but this "
                f"host has {WIRE_VERSION}"
            )
        welcome = Welcome(wire_version=WIRE_VERSION, host=self.name)
        welcome.incarnation = self._residency.incarnation
        welcome.max_rows = self._residency.policy.max_rows
        session.send(Frame(welcome=welcome))
        if self._lender is not None and frame.hello.borrows:
            self._lender.add(session)
        log.info(
            "host %s: router %s has connected",
            self.name,
            session.router,
            extra={"host": self.name, "router": session.router},
        )

    def _on_call(self, session: Session, inbound: InboundFrame) -> None:
        call, payload = call_of(inbound.frame), inbound.payload
        backward = inbound.frame.HasField("backward")
        router, now = _router_id(session), self._clock()
        try:
            if inbound.refused is not None:
                raise inbound.refused
            layout = CallLayout.of_call(call, backward=backward)
            if backward:
                self.gradients.check(inbound.frame.backward)
            if payload is None or payload.numel() < layout.call_bytes:
                raise CallError(
                    f"payload: {layout.call_bytes} bytes were announced, but fewer have arrived"
                )
            check_slot(layout, session.slot_bytes)
            if checksum(call.seq, payload[: layout.call_bytes]) != call.checksum:
                raise Corrupted(f"call {call.seq}: its tensors do not match its checksum")
            if (router, call.seq) in self._pending:
                raise CallError(
                    f"seq: call {call.seq} is in progress already; give each call a new number"
                )
            _, ids_TK, _ = layout.call_tensors(payload)
            refusal = self._residency.admit(_queued(call, router, ids_TK, now, backward), now)
            if refusal is not None:
                raise refusal
        except MoesaicError as error:
            self._refuse(session, call.seq, error)
            return
        self._pending[router, call.seq] = PendingCall(session, inbound.frame, layout, payload, now)

    def _refuse(self, session: Session, seq: int, error: MoesaicError) -> None:
        self._refused += 1
        frame = Frame()
        frame.refusal.seq = seq
        frame.refusal.incarnation = self._residency.incarnation
        frame.refusal.code = error.code
        frame.refusal.message = str(error)[:2000]
        session.send(frame)

    # ---- computing ------------------------------------------------------------------------------

    def _work(self) -> None:
        now = self._clock()
        batch, expired = self._residency.next_batch(now)
        for queued, error in expired:
            self._answer_with(queued, error)
        # Sending a refusal above may have dropped a router, and its calls with it.
        batch = [queued for queued in batch if (queued.router, queued.seq) in self._pending]
        if not batch:
            return
        try:
            self._compute(batch, now)
        except Exception as error:
            # Whatever went wrong, only these calls fail; the host keeps running.
            log.exception(
                "host %s: computing %s failed",
                self.name,
                batch[0].key,
                extra={"host": self.name, "calls": self._calls_of(batch)},
            )
            why = error if isinstance(error, MoesaicError) else InternalError(describe_error(error))
            for queued in batch:
                if (queued.router, queued.seq) in self._pending:
                    self._answer_with(queued, why)

    def _answer_with(self, queued: QueuedCall, error: MoesaicError) -> None:
        pending = self._pending.pop((queued.router, queued.seq), None)
        if pending is None:
            return  # its router is gone
        try:
            self._refuse(pending.session, queued.seq, error)
        except HostLost as lost:
            self._drop(pending.session, lost)

    def _compute(self, batch: list[QueuedCall], now: float) -> None:
        pendings = [self._pending[queued.router, queued.seq] for queued in batch]
        lead = batch[0]
        alone = self.gradients.keeping(pendings[0]) if lead.keeps else None
        if lead.backward:
            alone = self.gradients.answer(pendings[0], exact=lead.exact)
        if alone is not None:
            answers = [alone]
        else:
            answers = self._compute_batch(self._store, lead.key, pendings, exact=lead.exact)
        batch_us = int(self._device.finish(batch, now) * 1e6)
        if batch_us > SLOW_BATCH_S * 1e6 or log.isEnabledFor(logging.DEBUG):
            self._log_batch(batch, batch_us, now)
        trace_batch(self.name, pendings, now, batch_us)
        parts = split_batch_time(batch_us, batch)
        for queued, pending, answer, busy_us in zip(batch, pendings, answers, parts, strict=True):
            self._reply(queued, pending, answer, now - pending.arrived, busy_us, batch_us)
        if self.gradients.owes:  # now that the trunk has its answer
            self._device.add_up(self.gradients.add_up)

    def _log_batch(self, batch: list[QueuedCall], batch_us: int, now: float) -> None:
        slow = batch_us > SLOW_BATCH_S * 1e6
        model, layer = batch[0].key
        pendings = [self._pending[queued.router, queued.seq] for queued in batch]
        log.log(
            logging.WARNING if slow else logging.DEBUG,
            "host %s has computed %d calls%s",
            self.name,
            len(batch),
            ", slowly" if slow else "",
            extra={
                "host": self.name,
                "calls": self._calls_of(batch),
                "model": model,
                "layer": layer,
                "rows": sum(queued.rows for queued in batch),
                "took_ms": batch_us / 1e3,
                "queued_ms": round(1e3 * max(now - one.arrived for one in pendings), 3),
            },
        )

    def _calls_of(self, batch: list[QueuedCall]) -> list[str]:
        """Return the calls' ids, as their routers log them."""
        found = []
        for queued in batch:
            pending = self._pending.get((queued.router, queued.seq))
            if pending is not None:
                call = call_of(pending.frame)
                found.append(call_id(pending.session.router, call.step, call.layer))
        return found

    def _reply(
        self,
        queued: QueuedCall,
        pending: PendingCall,
        answer: ReplyTensors,
        queued_s: float,
        busy_us: int,
        batch_us: int,
    ) -> None:
        if answer.bad:
            log.error(
                "host %s: the output of these experts has NaN or infinite values: %s",
                self.name,
                [str(queued.key.expert(e)) for e in answer.bad],
                extra={"host": self.name, "calls": self._calls_of([queued])},
            )
        frame = Frame()
        reply = frame.reply
        reply.seq = queued.seq
        reply.incarnation = self._residency.incarnation
        reply.payload_bytes = pending.layout.reply_bytes
        reply.bad_experts.extend(answer.bad)
        reply.queued_us = int(queued_s * 1e6)
        reply.busy_us, reply.batch_us = busy_us, batch_us
        reply.version = call_of(pending.frame).version
        reply.other_versions.extend(call_of(pending.frame).other_versions)
        reply.checksum = checksum(queued.seq, answer.buffer[: reply.payload_bytes])
        if self._pending.pop((queued.router, queued.seq), None) is None:
            return  # its router is gone
        self._device.answers(pending.layout)
        try:
            pending.session.send_reply(frame, answer.buffer)
        except HostLost as lost:
            self._drop(pending.session, lost)


def _router_id(session: Session) -> str:
    # Sequence numbers are per connection, so two connections of one router are told apart.
    return f"{session.router}#{session.fileno()}"


def _queued(call: Call, router: str, ids_TK: Tensor, now: float, backward: bool) -> QueuedCall:
    return QueuedCall(
        router=router,
        seq=call.seq,
        key=LayerKey(call.model, call.layer),
        rows=call.rows,
        hidden=call.hidden,
        dtype=_dtype_name(call),
        exact=call.exact,
        expires_at=now + call.timeout_us * 1e-6,
        incarnation=call.incarnation,
        version=call.version,
        other_versions=tuple((one.expert, one.version) for one in call.other_versions),
        attempt=call.attempt,
        backward=backward,
        keeps=call.keep and not backward,
        ids=ids_TK.cpu().numpy(),
    )


def check_fit(residency: Residency, call: Call) -> None:
    """Check the sizes of ``call`` before its tensors arrive. Raises CallError.

    See `Residency.misfit`.
    """
    error = residency.misfit(
        LayerKey(call.model, call.layer),
        rows=call.rows,
        hidden=call.hidden,
        dtype=_dtype_name(call),
    )
    if error is not None:
        raise error


def _dtype_name(call: Call) -> str:
    return {1: "float32", 2: "bfloat16", 3: "float16", 4: "float64"}[call.dtype]
