"""A host in training without tensors: integers are masters, versions of weights, and gradients.

It answers orders as their docstrings say (`cluster/training/orders.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.cluster.expert_keys import TRUNK, ExpertKey, is_shared
from moesaic.cluster.placement import HostEntry
from moesaic.cluster.training.contributions import Attempt, Contributions, Part
from moesaic.cluster.training.orders import (
    Answer,
    Begin,
    CloseRun,
    Commit,
    Disown,
    Finish,
    Gather,
    Gathered,
    Inherited,
    OpenRun,
    Order,
    Own,
    Prepared,
    Reduce,
    Renew,
    Serve,
    Succeed,
)
from moesaic.proto.errors import NotHere, Superseded

_PRIME = (1 << 61) - 1


class Owned(NamedTuple):
    """What an owner keeps of a key; no order of updates but the right one leads to it."""

    master: int
    moment: int = 0

    def updated(self, gradient: int | None) -> Owned:
        if gradient is None:
            return self
        moment = (3 * self.moment + gradient) % _PRIME
        return Owned((5 * self.master + moment + 1) % _PRIME, moment)


@dataclass
class Violation(Exception):
    """An invariant does not hold."""

    invariant: str
    message: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.message}"


def first_weights(key: ExpertKey) -> int:
    return 1000 + 100 * (key.layer % 97) + key.expert % 89


@dataclass
class TrainingHost:
    """One incarnation of a host.

    ``peer`` finds another one by its entry, or raises HostLost. ``commits`` are the attempts that
    any host has ever committed, by version.
    """

    entry: HostEntry
    peer: Callable[[HostEntry], TrainingHost]
    commits: dict[int, Attempt] = field(default_factory=dict)
    weights: dict[tuple[ExpertKey, int], int] = field(default_factory=dict)  # by version
    experts: set[ExpertKey] = field(default_factory=set)  # that it serves
    owned: dict[ExpertKey, Owned] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._newest = 0  # run
        self._open = False
        self._forget()

    # ---- backward calls and the bulk path -------------------------------------------------------

    def add(
        self, attempt: Attempt, part: Part, version: int, given: Mapping[ExpertKey, int]
    ) -> None:
        """Add a part's gradients up. Raises NotHere."""
        if self._closed:
            raise NotHere(f"{attempt} is closed")
        self._contributions.check(attempt)
        if any((key, version) not in self.weights for key in given if not is_shared(key)):
            raise NotHere(f"version {version} of an expert is not here")
        if self._contributions.admit(attempt, part):
            for key, gradient in given.items():
                self._sums[key] = self._sums.get(key, 0) + gradient

    def put(self, attempt: Attempt, key: ExpertKey, source: str, gradient: int) -> None:
        self._check(attempt.run)
        self._put[attempt, key, source] = gradient

    def put_weights(self, run: int, key: ExpertKey, given: int) -> None:
        self.put_state(run, key, Owned(given))

    def put_state(self, run: int, key: ExpertKey, given: Owned) -> None:
        self._check(run)
        self._given[key] = given

    def gradient(self, attempt: Attempt, key: ExpertKey) -> int:
        self._contributions.check(attempt)
        if not self._closed or key not in self._sums:
            raise NotHere(f"{attempt}: no gradient of {key}")
        return self._sums[key]

    def state(self, run: int, key: ExpertKey) -> Owned:
        self._check(run)
        if key not in self.owned:
            raise NotHere(f"{key} is not owned here")
        return self.owned[key]

    def committed(self, key: ExpertKey, version: int) -> int:
        if key in self.owned and version == self._versions[key]:
            return self.owned[key].master
        return self.served(key, version)

    def served(self, key: ExpertKey, version: int) -> int:
        if (key, version) not in self.weights:
            raise NotHere(f"version {version} of {key} is not here")
        return self.weights[key, version]

    # ---- orders ---------------------------------------------------------------------------------

    def order(self, order: Order) -> Answer:
        match order:
            case OpenRun(run=run):
                if run < self._newest:
                    raise Superseded(f"run {run} is over")
                if run > self._newest:
                    self._forget()
                self._newest, self._open = run, True
            case CloseRun(run=run):
                if run != self._newest:
                    self._check(run)
                self._forget()
            case Own():
                self._own(order)
            case Disown(run=run, keys=keys):
                self._check(run)
                for key in keys:
                    self.owned.pop(key, None)
                    self._given.pop(key, None)
                    self._versions.pop(key, None)
            case Begin(attempt=attempt):
                self._check(attempt.run)
                if self._contributions.begin(attempt):
                    self._sums, self._put, self._prepared = {}, {}, {}
                    self._closed = False
            case Gather(attempt=attempt):
                self._check(attempt.run)
                self._contributions.check(attempt)
                self._closed = True
                return Gathered(frozenset(self._sums))
            case Reduce():
                return self._reduce(order)
            case Commit():
                self._check(order.attempt.run)
                self._commit(order)
            case Succeed():
                return self._succeed(order)
            case Finish():
                self._check(order.run)
                self._commit(order.commit)
            case Serve(run=run, version=version):
                self._check(run)
                for key in self.experts & self.owned.keys():
                    self.weights.setdefault((key, version), self.owned[key].master)
            case Renew():
                self._renew(order)
        return None

    def _check(self, run: int) -> None:
        if run < self._newest:
            raise Superseded(f"run {run} is over")
        if run > self._newest or not self._open:
            raise NotHere(f"run {run} is not open")

    def _forget(self) -> None:
        self._open = False
        self._contributions = Contributions()
        self._closed = False
        self._sums: dict[ExpertKey, int] = {}
        self._put: dict[tuple[Attempt, ExpertKey, str], int] = {}
        self._given: dict[ExpertKey, Owned] = {}
        self._prepared: dict[ExpertKey, int | None] = {}
        self._committed: Attempt | None = None
        self._last: Commit | None = None
        self._versions: dict[ExpertKey, int] = {}  # of what is owned
        self._step = 0
        self.owned = {}

    def _own(self, order: Own) -> None:
        self._check(order.run)
        for key, new in order.keys.items():
            if key in self.owned:
                continue
            if new.source is not None:
                self.owned[key] = self.peer(new.source).state(order.run, key)
                self._given.pop(key, None)
            elif key in self._given:
                self.owned[key] = self._given.pop(key)
            elif is_shared(key):
                self._check_serves_some(key, order.versions.of(key))
                self.owned[key] = Owned(first_weights(key))
            else:
                self.owned[key] = Owned(self.served(key, order.versions.of(key)))
            self._versions[key], self._step = order.versions.of(key), order.step

    def _check_serves_some(self, shared: ExpertKey, version: int) -> None:
        """Raise NotHere unless an expert of the layer is here, with what its layer shares."""
        here = {(key.model, key.layer) for key, held in self.weights if held == version}
        if (shared.model, shared.layer) not in here:
            raise NotHere(f"no expert of the layer of {shared} is here")

    def _reduce(self, order: Reduce) -> Prepared:
        self._check(order.attempt.run)
        self._contributions.check(order.attempt)
        for key, sources in order.sources.items():
            if key not in self.owned:
                raise NotHere(f"{key} is not owned here")
            if key not in self._prepared:
                found = [self._gradient(order, key, source) for source in sources or ()]
                self._prepared[key] = None if sources is None else sum(found)
        return Prepared(
            {
                key: {"w": float(gradient**2)}
                for key in order.sources
                if (gradient := self._prepared[key]) is not None
            }
        )

    def _gradient(self, order: Reduce, key: ExpertKey, source: str) -> int:
        if key.layer == TRUNK:
            if (order.attempt, key, source) not in self._put:
                raise NotHere(f"no gradient of {key} was put here")
            return self._put[order.attempt, key, source]
        host = self if source == self.entry.host else self.peer(order.peers[source])
        return host.gradient(order.attempt, key)

    def _succeed(self, order: Succeed) -> Inherited:
        if order.run < self._newest:
            raise Superseded(f"run {order.run} is over")
        if not self._open or self._newest < order.since:
            raise NotHere(f"no run since {order.since} is open")
        self._newest = order.run
        self._given = {}
        whole = bool(self.owned) and not self.owned.keys() - self._prepared.keys()
        return Inherited(
            versions=dict(self._versions),
            groups={key: {"w": 0} for key in self._versions},
            step=self._step,
            committed=self._last,
            prepared=self._contributions.attempt if whole else None,
        )

    def _commit(self, order: Commit) -> None:
        if self._committed != order.attempt:
            self._contributions.check(order.attempt)
            if missing := self.owned.keys() - self._prepared.keys():
                raise NotHere(f"{min(missing)} is owned and not prepared")
            for key in self.owned:
                self.owned[key] = self.owned[key].updated(self._prepared[key])
            if (first := self.commits.setdefault(order.version, order.attempt)) != order.attempt:
                raise Violation("a number names one commit", f"{order.version}: not only {first}")
            self._committed, self._last = order.attempt, order
            self._versions, self._step = dict.fromkeys(self.owned, order.version), order.step
            self._prepared = {}
        for key, owned in self.owned.items():
            if key.layer == TRUNK or key in self.experts:
                self.weights[key, order.version] = owned.master

    def _renew(self, order: Renew) -> None:
        self._check(order.run)
        for key, owner in order.owners.items():
            if key not in self.experts:
                raise NotHere(f"{key} is not here")
            self.weights[key, order.version] = self.peer(owner).committed(key, order.version)

    def keep_versions(self, versions: Collection[int]) -> None:
        self.weights = {at: given for at, given in self.weights.items() if at[1] in versions}
