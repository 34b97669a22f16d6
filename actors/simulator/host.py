"""A simulated expert host: the real loop of a host, its store and its memory.

Only what waits is rewritten here, with events in place of threads and Ray calls: loading, as in
`actors/host/host.py`, and the memory keeper's connections.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ...cluster.control.host_speed import Work
from ...cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion, LayerKey
from ...cluster.host.fence import Fence
from ...cluster.host.memory_keeping import Answer, Close, KeeperCommand, MemoryKeeping
from ...cluster.host.residency import HostPolicy, Residency
from ...cluster.placement import HostEntry, ModelShape
from ...proto.errors import CheckpointError, HostLost, MoesaicError
from ..host.adoption import Adoption, model_as_json
from ..host.compute import PendingCall, ReplyTensors, compute
from ..host.host_loop import HostLoop
from ..host.memory.expert_memory import ExpertMemory
from ..host.memory.kept_memory import LeftMemory
from ..host.weight_store import ExpertStore
from .channels import SimLendingSession, SimListener, SimPoller, SimSession, named_by
from .clock import SimProcess
from .experts import CHECKPOINT, content_of, ref_of, store_of, tensors_of
from .network import Connection, Parcel, Responder
from .trace_events import Computed, Loaded, Obeyed, Released

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
            try:
                if fails:
                    raise (CheckpointError if peer is None else HostLost)(f"{weights}: a fault")
                tensors = self._read(weights) if peer is None else host.world.fetch(peer, weights)
                host.put(weights, tensors)
            except MoesaicError as error:
                self._end(error)
                return
            self.missing -= 1
            self._next(wanted)

        host.reach(took_s, f"{host.name}: {weights} comes", came)

    def _read(self, weights: ExpertVersion) -> Mapping[str, Tensor]:
        """Read a version from the checkpoint, or from the file of its update."""
        if weights.version == FIRST_VERSION:
            return tensors_of(weights, CHECKPOINT)
        content = self._host.world.update_files.get(weights)
        if content is None:
            raise CheckpointError(f"{weights} is in no file")
        return tensors_of(weights, content)

    def _end(self, error: MoesaicError | None) -> None:
        self.missing = 0
        self._orders.popleft().respond(error)
        if self._orders:
            self._begin()


@dataclass(frozen=True, slots=True)
class SimReport:
    """The part of a `HostReport` on which the controller decides."""

    entry: HostEntry
    holdings: Mapping[LayerKey, Mapping[int, tuple[int, ...]]]
    models: tuple[ModelShape, ...]
    loading: int
    work: Work


class SimKeeper:
    """The memory keeper of a node: the real state machine, with descriptors of this process."""

    def __init__(self) -> None:
        self._keeping = MemoryKeeping()
        self._hosts: list[SimHost] = []

    def hello(self, host: SimHost, keep_s: float, now: float) -> list[LeftMemory]:
        """Return what the host's predecessor has left."""
        self._hosts.append(host)
        self._execute(self._keeping.advance(now))
        return self._execute(self._keeping.hello(host, host.host, keep_s))

    def keep(self, host: SimHost, model: str, descriptor: int) -> None:
        self._execute(self._keeping.keep(host, model, os.dup(descriptor)))

    def forget(self, host: SimHost, model: str) -> None:
        self._execute(self._keeping.forget(host, model))

    def leave(self, host: SimHost, now: float) -> None:
        self._execute(self._keeping.leave(host, now))

    def lost(self, host: SimHost, now: float) -> None:
        self._execute(self._keeping.lost(host, now))

    def close(self) -> None:
        """End, with everything that is kept."""
        for host in self._hosts:
            self._execute(self._keeping.leave(host, 0.0))
        self._execute(self._keeping.advance(math.inf))

    def _execute(self, commands: Iterable[KeeperCommand]) -> list[LeftMemory]:
        left: list[LeftMemory] = []
        for command in commands:
            match command:
                case Close(descriptor=descriptor):
                    os.close(descriptor)
                case Answer(kept=kept):
                    left = [LeftMemory(one.model, os.dup(one.descriptor)) for one in kept]
        return left


class SimHost(SimProcess):
    """One incarnation of a host: a real `HostLoop` with its store, which takes no time itself.

    While it computes it does nothing else, and what it sends meanwhile leaves when it is done.
    """

    def __init__(self, host: str, incarnation: int, world: World) -> None:
        super().__init__(f"{host}/{incarnation}", world.clock)
        self.host = host
        self.incarnation = incarnation
        self.world = world
        self.slowness = 1.0
        self.weights: dict[ExpertVersion, int] = {}  # with their contents
        self.reported: set[ExpertVersion] = set()  # what any controller was told of
        # What its predecessor has left and no controller was ever told of.
        self.found: frozenset[ExpertVersion] = frozenset()
        self.residency = Residency(HostPolicy(max_queue_rows=64), incarnation=incarnation)
        self.store = store_of({shape.model: shape for shape in world.settings.models})
        self.entry = HostEntry(
            host=host,
            incarnation=incarnation,
            node=world.node_of(host),
            shm_address="",
            grpc_address=self.name,
        )
        self._free_at = 0.0  # when it has computed
        self._fence = Fence()
        self._models: dict[str, ModelShape] = {}
        self._fetching = Fetching(self)
        self._poller = SimPoller()
        self._listener = SimListener(world.network)
        self._poller.know(self._listener)
        self._loop = HostLoop(
            self.name,
            self.store,
            self.residency,
            [self._listener],
            self._now,
            lends=world.settings.lends,
            compute=self._compute,
            poller=self._poller,
        )
        self._sessions: dict[Connection, SimSession] = {}
        self._handed: dict[str, ExpertMemory] = {}
        self._adopt()

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
        if not self.alive:
            return
        super().kill()
        self._loop.close()
        # Its memory stays as it is, for those who have borrowed it and for the keeper.
        for _, memory in self.store.memories():
            if memory.descriptor is not None:
                os.close(memory.descriptor)
        self.world.keepers[self.entry.node].lost(self, self.clock.now)

    # ---- its memory -----------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over what the predecessor has left."""
        if not self.world.settings.lends:
            return
        keeper, keep_s = self.world.keepers[self.entry.node], self.world.settings.router.orphan_s
        adoption = Adoption(self.name, self.store)
        for model in adoption.take(keeper.hello(self, keep_s, self.clock.now)):
            keeper.forget(self, model)
        self._models = {ref.name: shape for ref, shape in adoption.models}
        for one, shape in adoption.held.items():
            self.residency.hold(one, shape)
            self.weights[one] = content_of(self.store.get(one))
            self.world.tell(Loaded(self, one))
        if adoption.held:
            self.world.network.tally.count("memory adopted")
            self.found = frozenset(adoption.held) - self.world.hosts[self.host].reported
        self.keep_memory()

    def keep_memory(self) -> None:
        """Hand the keeper what it lacks."""
        if self.world.settings.lends:
            for model, memory in self.store.memories():
                if memory.descriptor is not None and self._handed.get(model) is not memory:
                    self.world.keepers[self.entry.node].keep(self, model, memory.descriptor)
                    self._handed[model] = memory

    def keeper_died(self) -> None:
        """Start with a new keeper, which knows nothing."""
        self._handed.clear()
        keeper, keep_s = self.world.keepers[self.entry.node], self.world.settings.router.orphan_s
        keeper.hello(self, keep_s, self.clock.now)
        self.keep_memory()

    # ---- the loop's thread ----------------------------------------------------------------------

    def _now(self) -> float:
        """Return the time as the loop sees it: computing has taken some."""
        return max(self.clock.now, self._free_at)

    def hear(self, connection: Connection, parcel: Parcel) -> None:
        session = self._sessions.get(connection)
        if session is None:
            if not parcel.frame.HasField("hello"):
                return  # it was under way when the connection was cut
            near = connection.router.node == self.entry.node
            kind = SimLendingSession if near else SimSession
            session = self._sessions[connection] = kind(connection, self.world.network)
            self._poller.know(session)
            self._listener.put(session)
        session.put(parcel)
        self._turn()

    def ended(self, connection: Connection) -> None:
        session = self._sessions.pop(connection, None)
        if session is not None:
            session.end()
            self._turn()

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` between two batches."""
        self._loop.post(work)
        self._turn()

    def when_computed(self, act: Callable[[], None]) -> None:
        """Run ``act`` when what the loop computes now is done."""
        wait_s = self._free_at - self.clock.now
        if wait_s > 0:
            self.reach(wait_s, f"{self.name}: computed", act)
        else:
            act()

    def _turn(self) -> None:
        while self.clock.now >= self._free_at:
            waits = self._loop.turn(self._poller.wait(0.0))
            if not waits and not self._poller.readable:
                return
        self.alarm("goes on", self._free_at, self._turn)

    def _compute(
        self,
        store: ExpertStore,
        key: LayerKey,
        pendings: Sequence[PendingCall],
        *,
        exact: bool,
    ) -> list[ReplyTensors]:
        named: set[ExpertVersion] = set()
        for pending in pendings:
            _, ids_TK, _ = pending.layout.call_tensors(pending.payload)
            named.update(named_by(pending.frame.call, ids_TK))
        lacking = tuple(one for one in sorted(named) if one not in self.weights)
        self.world.tell(Computed(self, lacking))
        rows = sum(pending.layout.rows for pending in pendings)
        self._free_at = self.clock.now + self.world.settings.compute_s(rows) * self.slowness
        return compute(store, key, pendings, exact=exact)

    # ---- remote calls ---------------------------------------------------------------------------

    def report(self, term: int, given_up: int, respond: Responder) -> None:
        if not self._obeys(lambda: self._fence.look(term, given_up), term, "report", respond):
            return
        stats = self._loop.stats()
        self.reported.update(self.weights)
        respond(
            SimReport(
                entry=self.entry,
                holdings=self.residency.holdings(),
                models=tuple(self._models.values()),
                loading=self.loading,
                work=Work(stats.batches, stats.assignments, stats.busy_s),
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
        for shape in models:
            placed = ref_of(shape), shape
            self.store.add_model(placed[0], model_as_json(placed))
            self._models[shape.model] = shape

    def put(self, weights: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        """Take in the weights of an expert, and serve it. Raises Busy without room for it."""
        shape = self.store.put(weights, tensors)
        self.weights[weights] = content_of(tensors)
        self.keep_memory()
        self.world.tell(Loaded(self, weights))
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
            self._loop.release(weights)
            for one in weights:
                self.store.drop(one)
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
