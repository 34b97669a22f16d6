"""A simulated expert host around the real `Residency`.

It takes the place of the shells `actors/host/host.py` and `actors/host/host_loop.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...proto.errors import CallError, CheckpointError, Corrupted, HostLost, MoesaicError
from ..control.host_speed import Work
from ..expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion, LayerKey
from ..host.fence import Fence
from ..host.residency import HostPolicy, LayerShape, QueuedCall, Residency, split_batch_time
from ..placement import HostEntry, ModelShape
from ..versions import LayerVersions
from .clock import SimProcess
from .network import (
    CallFrame,
    CancelFrame,
    Connection,
    Frame,
    Hello,
    Ping,
    Pong,
    Refusal,
    Reply,
    Responder,
    Welcome,
)
from .trace_events import Computed, Loaded, Obeyed, Released, Wrote

if TYPE_CHECKING:
    from .world import World


class _Order(NamedTuple):
    """A controller's order to load experts."""

    wanted: Sequence[ExpertVersion]
    peers: Mapping[ExpertVersion, HostEntry]  # those without a peer are read from disk
    respond: Responder


class Fetching:
    """The load orders of one host, one after the other; each expert serves once it is loaded."""

    def __init__(self, host: SimHost) -> None:
        self.missing = 0  # experts that the current order still has to load
        self._host = host
        self._orders: deque[_Order] = deque()

    def order(
        self,
        wanted: Sequence[ExpertVersion],
        peers: Mapping[ExpertVersion, HostEntry],
        respond: Responder,
    ) -> None:
        self._orders.append(_Order(wanted, peers, respond))
        if len(self._orders) == 1:
            self._begin()

    def _begin(self) -> None:
        wanted = deque(one for one in self._orders[0].wanted if not self._host.holds(one))
        self.missing = len(wanted)
        self._next(wanted)

    def _next(self, wanted: deque[ExpertVersion]) -> None:
        if not wanted:
            self._end(None)
            return
        host, weights = self._host, wanted.popleft()
        took_s, fails = host.world.faults.load(host.world.settings.load_s)

        def came() -> None:
            peer = self._orders[0].peers.get(weights)
            content = self._read(weights) if peer is None else host.world.fetch(peer, weights)
            if content is None or fails:
                error, source = (HostLost, peer.host) if peer else (CheckpointError, "its file")
                self._end(error(f"{weights}: cannot be read from {source}"))
            else:
                host.put(weights, content)
                self.missing -= 1
                self._next(wanted)

        host.reach(took_s, f"{host.name}: {weights} comes", came)

    def _read(self, weights: ExpertVersion) -> int | None:
        """Return the content of a version in the checkpoint, or in the file of its update."""
        if weights.version == FIRST_VERSION:
            return CHECKPOINT
        return self._host.world.update_files.get(weights)

    def _end(self, error: MoesaicError | None) -> None:
        self.missing = 0
        self._orders.popleft().respond(error)
        if self._orders:
            self._begin()


_HIDDEN, _DTYPE = 4, "float32"
# What stands for the weights that the checkpoint has; each update brings others.
CHECKPOINT = 0


@dataclass(frozen=True, slots=True)
class SimReport:
    """The part of a `HostReport` on which the controller decides."""

    entry: HostEntry
    holdings: Mapping[LayerKey, Mapping[int, tuple[int, ...]]]
    models: tuple[ModelShape, ...]
    loading: int
    work: Work


@dataclass(slots=True)
class _Pending:
    """A call that was admitted and is not answered yet."""

    connection: Connection
    frame: CallFrame
    arrived: float


class SimHost(SimProcess):
    """One incarnation of a host."""

    def __init__(self, host: str, incarnation: int, world: World) -> None:
        super().__init__(f"{host}/{incarnation}", world.clock)
        self.host = host
        self.incarnation = incarnation
        self.world = world
        self.slowness = 1.0
        self._batches = self._assignments = 0
        self._busy_s = 0.0
        self.weights: dict[ExpertVersion, int] = {}  # with their contents
        self.residency = Residency(HostPolicy(max_queue_rows=64), incarnation=incarnation)
        self.entry = HostEntry(
            host=host,
            incarnation=incarnation,
            node="n",
            shm_address="",
            grpc_address=self.name,
        )
        self.sessions: dict[str, Connection] = {}
        self._arrived: deque[Callable[[], None]] = deque()
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._computing = False
        self._fence = Fence()
        self._models: dict[str, ModelShape] = {}
        self._fetching = Fetching(self)

    @property
    def process(self) -> SimProcess:
        return self

    @property
    def loading(self) -> int:
        """Experts that its current order still has to load."""
        return self._fetching.missing

    def holds(self, weights: ExpertVersion) -> bool:
        return self.residency.serves(weights)

    def versions(self, key: ExpertKey) -> tuple[int, ...]:
        """Return the versions of an expert whose weights it has."""
        return tuple(version for known, version in sorted(self.weights) if known == key)

    def kill(self) -> None:
        super().kill()
        for connection in list(self.sessions.values()):
            connection.close(by=self)

    # ---- the loop's thread ----------------------------------------------------------------------

    def hear(self, connection: Connection, frame: Frame) -> None:
        self.post(lambda: self._on_frame(connection, frame))

    def ended(self, connection: Connection) -> None:
        self.post(lambda: self._drop(connection))

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` between two batches."""
        self._arrived.append(work)
        self._turn()

    def _turn(self) -> None:
        if self._computing:
            return
        while self._arrived:
            self._arrived.popleft()()
        self._work()

    def _drop(self, connection: Connection) -> None:
        self.sessions.pop(connection.name, None)
        self.residency.router_gone(connection.name)
        for key in [k for k, p in self._pending.items() if p.connection is connection]:
            del self._pending[key]
        connection.unanswered.clear()

    def _on_frame(self, connection: Connection, frame: Frame) -> None:
        session = connection.name
        match frame:
            case Hello():
                self.sessions[session] = connection
                connection.send(connection.router, Welcome(self.incarnation))
            case _ if session not in self.sessions:
                pass  # it was under way when the connection was cut
            case CallFrame():
                self._on_call(connection, frame)
            case CancelFrame(seq):
                self.residency.cancel(session, seq)
                if self._pending.pop((session, seq), None) is not None:
                    error = HostLost(f"call {seq}: cancelled by its router")
                    self._refuse(connection, seq, error)
            case Ping(number):
                connection.send(connection.router, Pong(number))

    def _on_call(self, connection: Connection, frame: CallFrame) -> None:
        now, session = self.clock.now, connection.name
        if not frame.sound:
            error = Corrupted(f"call {frame.seq}: its tensors have another checksum")
            self._refuse(connection, frame.seq, error)
            return
        if (session, frame.seq) in self._pending:
            self._refuse(connection, frame.seq, CallError(f"seq: {frame.seq} is in use"))
            return
        queued = QueuedCall(
            router=session,
            seq=frame.seq,
            key=frame.key,
            rows=frame.rows,
            hidden=_HIDDEN,
            dtype=_DTYPE,
            exact=False,
            expires_at=now + frame.timeout_s,
            incarnation=frame.incarnation,
            version=frame.version,
            other_versions=frame.other_versions,
            attempt=frame.attempt,
            ids=frame.ids_n,
        )
        refusal = self.residency.admit(queued, now)
        if refusal is not None:
            self._refuse(connection, frame.seq, refusal)
        else:
            self._pending[session, frame.seq] = _Pending(connection, frame, now)

    def _refuse(self, connection: Connection, seq: int, error: MoesaicError) -> None:
        connection.unanswered.pop(seq, None)
        connection.send(connection.router, Refusal(seq, error.code, str(error)))

    def _refuse_queued(self, queued: QueuedCall, error: MoesaicError) -> None:
        pending = self._pending.pop((queued.router, queued.seq), None)
        if pending is not None:
            self._refuse(pending.connection, queued.seq, error)

    def _work(self) -> None:
        batch, expired = self.residency.next_batch(self.clock.now)
        for queued, error in expired:
            self._refuse_queued(queued, error)
        batch = [queued for queued in batch if (queued.router, queued.seq) in self._pending]
        if not batch:
            return
        experts = sorted({int(e) for queued in batch for e in queued.ids if e >= 0})
        key = batch[0].key
        versions = LayerVersions(batch[0].version, dict(batch[0].other_versions))
        named = [ExpertVersion(key.expert(e), versions.of(e)) for e in experts]
        lacking = tuple(one for one in named if one not in self.weights)
        contents = tuple((one, self.weights[one]) for one in named if one in self.weights)
        self.world.tell(Computed(self, lacking, contents))
        began, rows = self.clock.now, sum(queued.rows for queued in batch)
        busy_s = self.world.settings.compute_s(rows) * self.slowness
        self._computing = True
        self.reach(busy_s, f"{self.name}: computed", lambda: self._computed(batch, began))

    def _computed(self, batch: list[QueuedCall], began: float) -> None:
        self._computing = False
        batch_us = max(1, int(1e6 * (self.clock.now - began)))
        self._batches += 1
        self._assignments += sum(int((queued.ids >= 0).sum()) for queued in batch)
        self._busy_s += self.clock.now - began
        for queued, busy_us in zip(batch, split_batch_time(batch_us, batch), strict=True):
            pending = self._pending.pop((queued.router, queued.seq))
            connection, frame = pending.connection, pending.frame
            connection.slots[frame.slot] = (connection.number, queued.seq)
            used_for = self.world.slot_used_for(connection, frame.slot)
            self.world.tell(Wrote(self, connection, queued.seq, frame.slot, used_for))
            connection.unanswered.pop(queued.seq, None)
            queued_us = int((began - pending.arrived) * 1e6)
            connection.send(connection.router, Reply(queued.seq, queued_us, busy_us, batch_us))
        self._turn()

    # ---- remote calls ---------------------------------------------------------------------------

    def report(self, term: int, given_up: int, respond: Responder) -> None:
        if not self._obeys(lambda: self._fence.look(term, given_up), term, "report", respond):
            return
        respond(
            SimReport(
                entry=self.entry,
                holdings=self.residency.holdings(),
                models=tuple(self._models.values()),
                loading=self.loading,
                work=Work(self._batches, self._assignments, self._busy_s),
            )
        )

    def load(
        self,
        models: Sequence[ModelShape],
        wanted: Sequence[ExpertVersion],
        peers: Mapping[ExpertVersion, HostEntry],
        term: int,
        respond: Responder,
    ) -> None:
        if not self._obeys(lambda: self._fence.obey(term), term, "load", respond):
            return
        self.add_models(models)
        self._fetching.order(wanted, peers, respond)

    def add_models(self, models: Sequence[ModelShape]) -> None:
        self._models |= {shape.model: shape for shape in models}

    def put(self, weights: ExpertVersion, content: int) -> None:
        """Take in the weights of an expert, and serve it."""
        key = weights.key
        self.weights[weights] = content
        self.world.tell(Loaded(self, weights))
        experts = self._models[key.model].experts[key.layer]
        shape = LayerShape(num_experts=experts, hidden_size=_HIDDEN, dtype=_DTYPE)
        self.post(lambda: self.residency.hold(weights, shape))

    def release(
        self,
        weights: Sequence[ExpertVersion],
        term: int,
        number: int,
        seen: float,
        respond: Responder,
    ) -> None:
        def forget() -> None:
            if not self._obeys(lambda: self._fence.evict(term, number), term, "release", respond):
                return
            gone = tuple(one for one in weights if self.holds(one))
            for queued, error in self.residency.release(weights):
                self._refuse_queued(queued, error)
            for one in weights:
                self.weights.pop(one, None)
            self.world.tell(Released(self, gone, term, seen))
            respond(None)

        self.post(forget)

    def _obeys(self, ask: Callable[[], None], term: int, order: str, respond: Responder) -> bool:
        """Return whether the fence lets an order of this term pass; else respond with its error."""
        try:
            ask()
        except MoesaicError as error:
            respond(error)
            return False
        self.world.tell(Obeyed(self, term, order))
        return True
