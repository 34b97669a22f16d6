"""An expert host: memory for some replicas, one device, one dispatch endpoint.

`ExpertHost` is a plain class, so that tests and benchmarks can run one in their own process;
`host_actor.py` makes a Ray actor of it. Ray calls it for control only: tokens arrive through the
transports.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from ...cluster.card_memory import CardShare
from ...cluster.expert_keys import ExpertKey, ExpertVersion
from ...cluster.host.emulation import Emulation
from ...cluster.host.fence import Fence
from ...cluster.host.probes import PROBE_TIMEOUT_S
from ...cluster.host.questions import HostQuestions
from ...cluster.host.residency import HostLimits, LayerShape, Residency
from ...cluster.host_answers import HostAnswers
from ...cluster.placement import HostEntry, ModelRef
from ...cluster.routing.transports import TransportChoice, groups_of
from ...cluster.training.orders import Answer, Order
from ...proto.errors import Forbidden
from ...proto.keys import ClusterSecret, Grant, secret_of_process, target
from ..runtime.devices import (
    check_packages,
    device_name,
    machine_memory,
    pick_device,
    pinned_numa_node,
)
from ..runtime.garbage import return_freed_memory
from ..transport.base import Listener
from ..transport.bulk.links import BulkLinks
from ..transport.bulk.server import BulkServer
from ..transport.grpc.health import probe
from ..transport.grpc.stream import GrpcListener
from ..transport.grpc.weights import get_weights
from ..transport.shm import ShmListener
from .adoption import Adoption, model_as_json
from .device import HostCard
from .gradients import HostGradients
from .host_loop import HostLoop, check_fit
from .memory.kept_memory import KeptMemory
from .report import HostReport, PlacedModel, Revision
from .training import HostTraining
from .weight_store import ExpertStore, ServedWeights, open_model

# Time limit for fetching one expert from a peer.
FETCH_TIMEOUT_S = 60.0


# How often a waiting report checks for new batches: the loop does not signal them.
_LOOK_S = 0.2

log = logging.getLogger(__name__)

T = TypeVar("T")


class ExpertHost:
    """One incarnation of a host."""

    def __init__(
        self,
        name: str,
        *,
        node: str,
        device: str = "auto",
        bind: str = "127.0.0.1",
        limits: HostLimits | None = None,
        threads: int | None = None,
        transport: TransportChoice = "auto",
        secret: ClusterSecret | None = None,
        clock: Callable[[], float] = time.monotonic,
        lends: bool = False,
        kept: KeptMemory | None = None,
        share: CardShare | None = None,
    ) -> None:
        """Start the host, without any expert but those that its predecessor has left.

        ``bind`` is the address that gRPC listens on. ``threads`` is the number of threads of one
        computation. ``transport`` is the value in the spec; it decides which process groups routers
        may ask for. ``secret`` is the cluster's secret (None: that of this process). ``lends``:
        routers of this machine may compute with the memory of its experts. A host that emulates
        another device lends nothing. ``kept`` is its side of the memory keeper, which this object
        closes; without it nothing outlives the process. ``share`` is the part of its GPU that it
        may take (None: no limit). Raises ClusterError if it cannot work on ``device``.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.name = name
        self.incarnation = time.time_ns()
        self._node = node
        where = pick_device(device)
        check_packages(where)
        self._card = HostCard(where, share or CardShare()) if where.type == "cuda" else None
        budget = None if self._card is None else self._card.budget
        self._store = ExpertStore(where, partial(open_model, budget=budget))
        policy = (limits or HostLimits()).policy(gpu=where.type != "cpu")
        self._residency = Residency(policy, incarnation=self.incarnation)
        self._served = ServedWeights(name, self._store, self._residency, self._hold)
        self._loading = 0
        self._models: dict[str, PlacedModel] = {}
        self._kept = kept
        self._changes = 0
        self._changed = threading.Condition()
        self._load_lock = threading.Lock()
        self._fence = Fence()
        self._fence_lock = threading.Lock()
        self.questions = HostQuestions(clock)
        self._secret = secret or secret_of_process()
        meant = target(name, self.incarnation)
        self._links = BulkLinks(node, self._secret)
        self.training = HostTraining(
            name, self._store, self._residency, self._served, self._with_gradients, self._links
        )
        self._bulk = BulkServer(self.training, secret=self._secret, target=meant)
        shm = ShmListener(secret=self._secret, target=meant, device_memory=transport == "device")
        grpc = GrpcListener(
            f"{bind}:0",
            weights=_Weights(self),
            bulk=self.training,
            health=self.questions,
            device=self._store.device,
            groups=groups_of(transport, device_name(self._store.device)),
            fits=partial(check_fit, self._residency),
            secret=self._secret,
            target=meant,
        )
        self._entry = HostEntry(
            host=name,
            incarnation=self.incarnation,
            node=node,
            shm_address=shm.address,
            grpc_address=grpc.address,
            device=device_name(self._store.device),
            numa=pinned_numa_node(),
            bulk_address=self._bulk.address,
        )
        listeners: list[Listener] = [shm, grpc]
        self._adoption = Adoption(name, self._store)
        self._adopt()
        lends = lends and self._residency.policy.emulate is None
        self._loop = HostLoop(name, self._store, self._residency, listeners, clock, lends=lends)
        self._loop.start()
        self.questions.started(lambda: self._loop.turned_at)
        self._adoption.check(self._drop_unsound)
        log.info(
            "host %s is ready for calls",
            name,
            extra={
                "host": name,
                "incarnation": self.incarnation,
                "address": grpc.address,
                "device": self._entry.device,
            },
        )

    def entry(self) -> HostEntry:
        return self._entry

    def probe(self) -> HostAnswers:
        """Call this host's own listener, and return what it answers. Raises MoesaicError."""
        proof = self._secret.proof("health", self._entry.target)
        return probe(self._entry.grpc_address, proof, PROBE_TIMEOUT_S).result()

    def load(
        self,
        models: Sequence[PlacedModel],
        wanted: Sequence[ExpertVersion],
        peers: Mapping[ExpertVersion, HostEntry] | None = None,
        term: int = 0,
    ) -> None:
        """Load experts, and begin to serve each of them as soon as it is ready.

        One in ``peers`` is fetched from that host; any other one is read from its model's
        checkpoint. ``term`` is the term of the controller that asks. Raises CheckpointError,
        UnsupportedModel and HostLost, and Superseded for an old controller; experts that were
        loaded before the error stay.
        """
        with self._fence_lock:
            self._fence.obey(term)
        with self._load_lock:
            self.add_models(models)
            lacking = [one for one in wanted if not self._residency.serves(one)]
            self._loading = len(lacking)
            self._note_change()
            began = time.monotonic()
            try:
                for one in lacking:
                    peer = (peers or {}).get(one)
                    shape = self._fetch(one, peer) if peer else self._store.load(one)
                    self._hold({one: shape})
                    self._loading -= 1
                if lacking:
                    log.info(
                        "host %s has loaded %d experts in %.1f s",
                        self.name,
                        len(lacking),
                        time.monotonic() - began,
                        extra={"host": self.name},
                    )
            finally:
                self._loading = 0
                self._keep_memory()
                self._note_change()
                return_freed_memory()

    def add_models(self, models: Sequence[PlacedModel]) -> None:
        """Register models whose weights will be loaded or put."""
        for placed in models:
            ref, _ = placed
            self._store.add_model(ref, model_as_json(placed))
            self._models[ref.name] = placed
        self._keep_memory()
        self._note_change()

    def forget_model(self, ref: ModelRef, term: int = 0) -> None:
        """Forget a model with all its experts, unless it is another one of this name by now.

        Raises Superseded for an old controller.
        """
        with self._load_lock:
            if self._models.get(ref.name, (None,))[0] != ref:
                return
            held = [
                ExpertVersion(key.expert(expert), version)
                for key, experts in self._residency.holdings().items()
                if key.model == ref.name
                for expert, versions in experts.items()
                for version in versions
            ]

            def forget() -> None:
                with self._fence_lock:
                    self._fence.obey(term)
                    self._loop.release(held)

            self._loop.call(forget)
            self._store.remove_model(ref.name)
            del self._models[ref.name]
            if self._kept is not None:
                self._kept.forget(ref.name)
        self._note_change()
        log.info("host %s has forgotten model %s", self.name, ref.name, extra={"host": self.name})
        return_freed_memory()

    def release(self, gone: Sequence[ExpertVersion], term: int = 0, eviction: int = 1) -> None:
        """Stop serving experts, refuse queued calls for them and free their memory.

        Raises Superseded for an old controller, and Expired for an eviction that the controller
        has given up.
        """

        def forget() -> None:
            with self._fence_lock:
                self._fence.evict(term, eviction)
                self._loop.release(gone)

        self._loop.call(forget)
        self._note_change()
        for one in gone:
            self._store.drop(one)
        self._keep_memory()
        log.info("host %s has released %d experts", self.name, len(gone), extra={"host": self.name})
        return_freed_memory()

    def train(self, order: Order) -> Answer:
        """Carry out an order of a training run. See `HostTraining.order`."""
        owned = self.training.owned
        try:
            return self.training.order(order)
        finally:
            if self.training.owned != owned:
                self._note_change()

    def emulate(self, device: Emulation | None) -> None:
        """Emulate the speed of another device from now on, e.g. a host that becomes slow."""
        self._loop.emulate(device)

    def report(
        self,
        term: int | None = None,
        given_up: int = 0,
        *,
        known: Revision | None = None,
        wait_s: float = 0.0,
    ) -> HostReport:
        """Return the state of this host, for a controller or for `status`.

        A controller gives its ``term`` and the number of evictions that it has ``given_up``
        waiting for. The host refuses these from then on, so the report stays true until the
        controller orders something else. While the revision is ``known``, the answer waits for
        another one, at most ``wait_s``. Raises Superseded.
        """
        if known is not None and wait_s > 0:
            self._wait_for_change(known, wait_s)
        self.check_health()
        revision = self._revision()
        with self._fence_lock:
            if term is not None:
                self._fence.look(term, given_up)
                self.questions.listed()
            holdings = self._residency.holdings()
        return HostReport(
            entry=self._entry,
            revision=revision,
            pid=os.getpid(),
            device=str(self._store.device),
            holdings=holdings,
            models=list(self._models.values()),
            loading=self._loading,
            weight_bytes=self._store.nbytes,
            rss_bytes=psutil.Process().memory_info().rss,
            machine_bytes=machine_memory(),
            adopted=len(self._adoption.held),
            card=None if self._card is None else self._card.report(),
            loop=self._loop.stats(),
            owned=self.training.owned,
            owner_s=self.training.owner_s,
        )

    def check_health(self) -> None:
        """End the process if its loop has failed; Ray then restarts it."""
        if self._loop.failure is not None:
            log.critical(
                "host %s: its loop failed (%r), so the process ends and Ray restarts it",
                self.name,
                self._loop.failure,
                extra={"host": self.name},
            )
            os._exit(1)

    def leave(self) -> None:
        """Let the memory end with this process: no successor will come for it."""
        self.questions.left()
        if self._kept is not None:
            self._kept.close()

    def close(self) -> None:
        self.leave()
        self._adoption.close()
        self._bulk.close()
        self._links.close()
        self._loop.close()
        self._store.close()

    def _adopt(self) -> None:
        """Take over what the predecessor has left, before any call arrives."""
        if self._kept is None:
            return
        adoption = self._adoption
        for model in adoption.take(self._kept.left):
            self._kept.forget(model)
        for ref, shape in adoption.models:
            self._models[ref.name] = (ref, shape)
        for one, shape in adoption.held.items():
            self._residency.hold(one, shape)
        self._keep_memory()

    def _drop_unsound(self, one: ExpertVersion) -> None:
        self._loop.call(lambda: self._loop.release([one]))
        with self._load_lock:
            if not self._residency.serves(one):  # it may have been loaded again meanwhile
                self._store.drop(one)
                self._keep_memory()
        self._note_change()

    def _keep_memory(self) -> None:
        """Hand the keeper the memory that it lacks, and let it free what has gone."""
        if self._kept is not None:
            for model, memory in self._store.memories():
                self._kept.keep(model, memory)

    def _fetch(self, wanted: ExpertVersion, peer: HostEntry) -> LayerShape:
        tensors = get_weights(
            peer.grpc_address,
            wanted,
            timeout_s=FETCH_TIMEOUT_S,
            max_bytes=self._store.most_bytes(wanted.key),
            proof=self._secret.proof("weights", peer.target),
        )
        return self._store.put(wanted, tensors)

    def _hold(self, kept: Mapping[ExpertVersion, LayerShape]) -> None:
        """Admit calls for experts that are in the store."""

        def hold() -> None:
            for one, shape in kept.items():
                self._residency.hold(one, shape)

        self._keep_memory()
        self._loop.call(hold)
        self._note_change()

    def _with_gradients(self, work: Callable[[HostGradients], T]) -> T:
        found: list[T] = []
        self._loop.call(lambda: found.append(work(self._loop.gradients)))
        return found[0]

    def _note_change(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def _revision(self) -> Revision:
        return self.incarnation, self._changes, self._loop.stats().batches

    def _wait_for_change(self, known: Revision, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        with self._changed:
            while self._revision() == known and (left_s := until - time.monotonic()) > 0:
                self.check_health()
                self._changed.wait(min(left_s, _LOOK_S))


class _Weights:
    """The weights channel's view of a host."""

    def __init__(self, host: ExpertHost) -> None:
        self._host = host

    def most_bytes(self, key: ExpertKey) -> int:
        return self._host._store.most_bytes(key)

    def check_grant(self, given: ExpertVersion, grant: Grant | None) -> None:
        host = self._host
        if grant is None or not host._secret.grants(
            grant.proof, host.name, host.incarnation, *given, grant.term
        ):
            raise Forbidden(
                f"{given}: the controller did not grant this put into "
                f"incarnation {host.incarnation} of {host.name}"
            )
        with host._fence_lock:
            host._fence.obey(grant.term)

    def get(self, wanted: ExpertVersion) -> dict[str, Tensor]:
        return self._host._store.get(wanted)

    def put(self, given: ExpertVersion, tensors: Mapping[str, Tensor]) -> None:
        self._host._served.check(given, tensors)
        self._host._served.serve([(given, tensors)])


@contextlib.contextmanager
def local_hosts(count: int, *, node: str = "here", device: str = "cpu", **options: object):
    """Run hosts as threads of this process, with real transports; close them at the end."""
    hosts: list[ExpertHost] = []
    try:
        for index in range(count):
            hosts.append(ExpertHost(f"host-{index}", node=node, device=device, **options))  # pyright: ignore[reportArgumentType]
        yield hosts
    finally:
        for host in hosts:
            host.close()
