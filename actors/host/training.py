"""The host's side of a training run: it carries out the orders of `cluster/training/orders.py`.

Every order may come again. One is carried out at a time; other processes read and put tensors
meanwhile, over the bulk path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ...cluster.expert_keys import SHARED, TRUNK, ExpertKey, ExpertVersion, LayerKey, is_shared
from ...cluster.host.residency import LayerShape, Residency
from ...cluster.placement import HostEntry
from ...cluster.training.contributions import Attempt
from ...cluster.training.orders import (
    Answer,
    Begin,
    BulkKey,
    CloseRun,
    Commit,
    Disown,
    Finish,
    Gather,
    Gathered,
    Inherited,
    NewlyOwned,
    Opened,
    OpenRun,
    Order,
    Own,
    Prepared,
    Reduce,
    Renew,
    RunId,
    Serve,
    Succeed,
)
from ...cluster.versions import WeightVersions
from ...proto.errors import BadInput, Busy, MoesaicError, NotHere, Superseded
from ..runtime.devices import machine_memory
from ..runtime.garbage import keep_freed_memory, return_freed_memory
from .gradients import HostGradients
from .run_tensors import RunTensors, check_shape
from .weight_store import ExpertStore, ServedWeights

# Time limit for fetching the tensors of one key from a peer.
FETCH_S = 60.0
# How long an order waits for the one before it, which may wait for a peer.
_ORDER_S = 2 * FETCH_S
# How long a new version waits until the controller has evicted the one before the served one.
ROOM_S = 30.0
_PAUSE_S = 0.02
# Keys that are fetched at the same time.
_AT_ONCE = 4
# Experts that begin to be served together: the loop's thread is interrupted once for them.
_TOGETHER = 16

T = TypeVar("T")


class PeerLinks(Protocol):
    """The bulk path to other hosts."""

    def get(
        self, entry: HostEntry, wanted: BulkKey, *, timeout_s: float
    ) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Return what a host has, which is valid inside of the block.

        Raises NotHere, HostLost and what else the host answers.
        """
        ...


class OnLoop(Protocol):
    def __call__(self, work: Callable[[HostGradients], T], /) -> T: ...


class HostTraining:
    """One host's part in the run that is open; a `BulkStore`, too."""

    def __init__(
        self,
        host: str,
        store: ExpertStore,
        residency: Residency,
        served: ServedWeights,
        on_loop: OnLoop,
        links: PeerLinks,
    ) -> None:
        """``host`` is the host's name. ``on_loop`` runs work with its gradients, in its thread."""
        self._host = host
        self._store = store
        self._residency = residency
        self._served = served
        self._on_loop = on_loop
        self._links = links
        self.owner_s = 0.0  # in which it has summed up and applied gradients of what it owns
        self._ordering = threading.Lock()
        self._newest: RunId | None = None
        self._run: RunTensors | None = None  # of the newest run, while it is open
        # What was renewed last, so that an order that comes again fetches what it lacks.
        self._renewed: tuple[int, set[ExpertKey]] = 0, set()

    @property
    def owned(self) -> int:
        """How many keys this host owns."""
        run = self._run
        return 0 if run is None else len(run.owned)

    def order(self, order: Order) -> Answer:
        """Carry out an order. Raises what its docstring says, and Busy while another one runs."""
        if not self._ordering.acquire(timeout=_ORDER_S):
            raise Busy(f"{self._host} is at another order for {_ORDER_S} s; send it again")
        try:
            match order:
                case OpenRun():
                    return self._open(order)
                case CloseRun():
                    return self._close(order.run)
                case Succeed():
                    return self._succeed(order)
                case Own():
                    return self._own(order)
                case Disown():
                    return self._disown(order)
                case Begin():
                    return self._begin(order)
                case Gather():
                    return self._gather(order)
                case Reduce():
                    return self._reduce(order)
                case Commit():
                    return self._commit(self._run_of(order.attempt.run), order)
                case Finish():
                    return self._commit(self._run_of(order.run), order.commit)
                case Serve():
                    return self._serve_owned(self._run_of(order.run), order.version)
                case Renew():
                    return self._renew(order)
        finally:
            self._ordering.release()

    # ---- runs -----------------------------------------------------------------------------------

    def _open(self, order: OpenRun) -> Opened:
        if self._run is not None and self._run.opened.run == order.run:
            if self._run.opened != order:
                raise BadInput(f"run {order.run} was opened as {self._run.opened}, not {order}")
            return self._opened()
        self._check_newest(order.run)
        self._store.check_trainable(order.model)
        run = RunTensors(self._host, self._store, order)
        self._forget()
        keep_freed_memory(True)
        self._store.keep_spare(order.model, True)
        self._run, self._newest = run, order.run
        return self._opened()

    def _opened(self) -> Opened:
        # Elsewhere training takes another memory than this machine's.
        return Opened(machine_memory()[1] if self._store.device.type == "cpu" else None)

    def _close(self, number: RunId) -> None:
        if number != self._newest:
            self._run_of(number)  # raises
        self._forget()

    def _succeed(self, order: Succeed) -> Inherited:
        self._check_newest(order.run)
        run = self._run
        if run is None or not order.since <= run.opened.run <= order.run:
            raise NotHere(f"no run from {order.since} to {order.run} is open on {self._host}")
        asked = replace(run.opened, model=order.model, optimizer=order.optimizer)
        if replace(asked, settings=order.settings) != run.opened:
            raise BadInput(
                f"run {run.opened.run} trains {run.opened.model!r} with {run.opened.optimizer} and "
                f"{run.opened.settings}; go on with the same"
            )
        self._newest = order.run
        return run.succeed(order.run)

    def _forget(self) -> None:
        self._on_loop(HostGradients.forget)
        if self._run is not None:
            self._store.keep_spare(self._run.opened.model, False)
        self._run = None
        self._renewed = 0, set()
        keep_freed_memory(False)
        return_freed_memory()  # before anybody looks how much is free

    def _run_of(self, number: RunId) -> RunTensors:
        """Return an open run. Raises Superseded and NotHere."""
        self._check_newest(number)
        if self._run is None or number != self._newest:
            raise NotHere(f"run {number} is not open on {self._host}")
        return self._run

    def _check_newest(self, number: RunId) -> None:
        if self._newest is not None and number < self._newest:
            raise Superseded(f"run {number} is over: {self._host} knows run {self._newest}")

    def _run_at(self, attempt: Attempt) -> RunTensors:
        run = self._run_of(attempt.run)
        run.check_attempt(attempt)
        return run

    # ---- owning ---------------------------------------------------------------------------------

    def _own(self, order: Own) -> None:
        run = self._run_of(order.run)
        for key, new in order.keys.items():
            run.check_key(key)
            if not run.owns(key, new.groups):
                self._become_owner(run, key, new, order)

    def _become_owner(self, run: RunTensors, key: ExpertKey, new: NewlyOwned, order: Own) -> None:
        versions = order.versions
        at = versions.of(key), order.step
        if new.source is not None:
            wanted = BulkKey("state", key, run=run.opened.run)
            with self._links.get(new.source, wanted, timeout_s=FETCH_S) as found:
                state = {name: tensor.clone() for name, tensor in found.items()}
            run.restore(key, state, new.groups, at)
        elif (state := run.given(key, "state")) is not None:
            run.restore(key, state, new.groups, at)
        elif (weights := run.given(key, "weights")) is not None:
            run.own(key, weights, new.groups, at)
        elif key.layer != TRUNK:
            held = self._with_shared(key, versions) if key.expert == SHARED else key
            # What is read from a slab is a copy.
            run.own(key, self._store.get(versions.served(held)), new.groups, at)
        else:
            raise NotHere(f"{key}: neither its state nor its weights were put into {self._host}")

    def _with_shared(self, shared: ExpertKey, versions: WeightVersions) -> ExpertKey:
        """Return an expert that this host serves, with what its layer shares. Raises NotHere."""
        layer = LayerKey(shared.model, shared.layer)
        for expert in map(layer.expert, range(self._store.count_experts(layer))):
            if self._residency.serves(versions.served(expert)):
                return expert
        raise NotHere(f"{shared}: no expert of the layer is served on {self._host}")

    def _disown(self, order: Disown) -> None:
        run = self._run_of(order.run)
        for key in order.keys:
            run.disown(key)

    # ---- a step ---------------------------------------------------------------------------------

    def _begin(self, order: Begin) -> None:
        run = self._run_of(order.attempt.run)
        self._on_loop(lambda gradients: gradients.begin(order.attempt, exact=order.exact))
        run.begin(order.attempt, exact=order.exact)

    def _gather(self, order: Gather) -> Gathered:
        run = self._run_at(order.attempt)
        if run.gathered is None:
            return Gathered(run.gather(self._on_loop(lambda one: one.close(order.attempt))))
        return Gathered(run.gathered)

    def _reduce(self, order: Reduce) -> Prepared:
        run = self._run_at(order.attempt)
        for key, sources in order.sources.items():
            if sources is not None and len(set(sources)) < len(sources):
                raise BadInput(f"{key}: a source is named twice: {sources}")
        lacking = [key for key in order.sources if not run.is_prepared(key)]
        with self._owning(), _fetching(self._host) as pool:
            sums = pool.map(lambda key: self._sum(run, order, key), lacking)
            squares = {
                key: run.prepare(order.attempt, key, summed)
                for key, summed in zip(lacking, sums, strict=True)
            }
        for key in order.sources:
            if key not in squares:  # it was prepared by this order when it came before
                squares[key] = run.prepare(order.attempt, key, None)
        return Prepared(squares)

    def _sum(self, run: RunTensors, order: Reduce, key: ExpertKey) -> dict[str, Tensor] | None:
        """Return the sum of a key's gradients over its sources, in their order.

        It is taken in the widest type that one of them has, and rounded once to the masters'.
        """
        sources, sums = order.sources[key], dict[str, Tensor]()
        if not sources:
            return sums if sources is None else None
        masters = run.owned.masters(key)
        for source in sources:
            if source not in order.peers:
                # It stays unchanged until the commit, so a single source needs no copy.
                kept = run.kept_gradient(key, source)
                _add(sums, key, masters, kept, copy=len(sources) > 1)
                continue
            wanted = BulkKey("gradient", key, attempt=order.attempt, source=source)
            with self._links.get(order.peers[source], wanted, timeout_s=FETCH_S) as found:
                _add(sums, key, masters, found, copy=True)
        return {name: one.to(masters[name].dtype) for name, one in sums.items()}

    def _commit(self, run: RunTensors, order: Commit) -> None:
        with self._owning():
            run.commit(order)
        self._serve_owned(run, order.version)

    @contextmanager
    def _owning(self) -> Iterator[None]:
        """Count the time that an owner's work takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.owner_s += time.monotonic() - began

    def _serve_owned(self, run: RunTensors, version: int) -> None:
        """Serve the owned experts that are served here as ``version``, too."""
        due = [
            ExpertVersion(key, max(held))
            for key in run.owned
            if not is_shared(key)
            and (held := self._residency.versions(key))
            and version not in held
        ]
        for some in _parts(due):
            self._serve(
                [
                    (
                        ExpertVersion(held.key, version),
                        self._whole(held, run.weights(held.key)),
                    )
                    for held in some
                ]
            )

    def _renew(self, order: Renew) -> None:
        run = self._run_of(order.run)
        if self._renewed[0] != order.version:
            self._renewed = order.version, set()
        done, due = self._renewed[1], list[ExpertVersion]()  # with the version that is held now
        failures: list[MoesaicError] = []  # of some, whereas all others are renewed
        for key in [key for key in order.owners if key not in done]:
            run.check_key(key)
            if held := [v for v in self._residency.versions(key) if v <= order.version]:
                due.append(ExpertVersion(key, max(held)))
            else:
                failures.append(NotHere(f"{key} is not on {self._host}: it has nothing to renew"))

        def fetch(held: ExpertVersion) -> Mapping[ExpertVersion, LayerShape] | None:
            try:
                return self._fetch(order, held)
            except MoesaicError as error:
                failures.append(error)
                return None

        with _fetching(self._host) as pool:
            for some in _parts(due):
                found = zip(some, pool.map(fetch, some), strict=True)
                kept = {held.key: one for held, one in found if one is not None}
                new = {one: shape for of_key in kept.values() for one, shape in of_key.items()}
                if new:
                    self._served.admit(new)
                done.update(kept)
        if failures:
            raise failures[0]

    def _fetch(self, order: Renew, held: ExpertVersion) -> Mapping[ExpertVersion, LayerShape]:
        """Keep an expert's new version as its owner has it."""
        new = ExpertVersion(held.key, order.version)
        wanted = BulkKey("weights", new.key, version=new.version)
        with self._links.get(order.owners[new.key], wanted, timeout_s=FETCH_S) as found:
            tensors = self._whole(held, dict(found))
            self._served.check(new, tensors)
            return self._until_room(lambda: self._served.keep(new, tensors))

    def _serve(self, given: list[tuple[ExpertVersion, dict[str, Tensor]]]) -> None:
        """Serve versions; wait while the controller still evicts older ones. Raises Busy."""

        def serve() -> None:
            self._served.serve(
                [(one, tensors) for one, tensors in given if not self._residency.serves(one)]
            )

        self._until_room(serve)

    def _until_room(self, act: Callable[[], T]) -> T:
        """Do something again while it raises Busy, for ROOM_S."""
        until = time.monotonic() + ROOM_S
        while True:
            try:
                return act()
            except Busy:
                if time.monotonic() >= until:
                    raise
            time.sleep(_PAUSE_S)

    def _whole(self, held: ExpertVersion, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return an expert's tensors; those that are not trained are the same in all versions."""
        shapes, _ = self._store.expert_forms(held.key)
        return trained if trained.keys() >= shapes.keys() else self._store.get(held) | trained

    # ---- the bulk path --------------------------------------------------------------------------

    @contextmanager
    def reading(self, wanted: BulkKey) -> Iterator[Mapping[str, Tensor]]:
        """Return the tensors that a key names. Raises NotHere and CallError."""
        served = ExpertVersion(wanted.key, wanted.version)
        if wanted.kind == "weights" and self._residency.serves(served):
            with self._store.reading(served) as tensors:
                yield tensors
        else:
            with self._open_run(wanted.key).reading(wanted) as tensors:
                yield tensors

    def put(self, given: BulkKey, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a run puts here. Raises NotHere, CallError and Busy."""
        self._open_run(given.key).put(given, tensors)

    def most_bytes(self, key: BulkKey) -> int:
        """Return the largest size of what a key names. Raises NotHere and CallError."""
        if key.kind == "weights" and key.key.layer != TRUNK:
            return self._store.most_bytes(key.key)
        return self._open_run(key.key).most_bytes(key)

    def _open_run(self, key: ExpertKey) -> RunTensors:
        run = self._run
        if run is None:
            raise NotHere(f"{key}: no training run is open on {self._host}")
        return run


def _add(
    sums: dict[str, Tensor],
    key: ExpertKey,
    masters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    *,
    copy: bool,
) -> None:
    """Add the gradients of owned tensors up, where their masters are."""
    for name, master in masters.items():
        if name not in gradients:
            continue
        given = gradients[name]
        check_shape(key, name, given, master)
        before = sums.get(name)
        wide = torch.promote_types(given.dtype, master.dtype if before is None else before.dtype)
        given = given.to(master.device, wide, copy=copy and before is None)
        sums[name] = given if before is None else before.to(wide).add_(given)


@contextmanager
def _fetching(host: str) -> Iterator[ThreadPoolExecutor]:
    """Return threads that fetch; after an error they end what they are at."""
    pool = ThreadPoolExecutor(_AT_ONCE, f"fetch-{host}")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _parts(given: Sequence[T]) -> Iterator[Sequence[T]]:
    return (given[at : at + _TOGETHER] for at in range(0, len(given), _TOGETHER))
