"""The steps of a training run: who owns what, which attempt is under way, and what is committed.

The exchanges of `TrainingSteps` are generators. Each yields orders for hosts, gets their answers,
and returns when it is over; who runs it sends the orders (`actors/training/run.py`). A step is
`begin`, the backward calls of trunks, `reduce`, and `commit`. Until `commit` sends its first order
anything may fail: StepLost, and the next attempt begins with the weights of the last commit.

A decision to commit is final. A host that does not carry it out has lost what it owns; while each
key has another owner, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ...proto.errors import ClusterError, MoesaicError, StepLost
from ..expert_keys import TRUNK, ExpertKey
from ..placement import HostEntry
from .contributions import Attempt
from .orders import (
    Answer,
    Begin,
    CloseRun,
    Commit,
    Disown,
    Gather,
    Gathered,
    GroupUpdate,
    NewlyOwned,
    OpenRun,
    Order,
    Own,
    Prepared,
    Reduce,
    Renew,
    Serve,
)
from .owners import (
    OwnerHosts,
    Owners,
    deal_owners,
    first_owners,
    keys_by_host,
    ownerless,
    without_hosts,
)

Answers = Mapping[str, Answer | MoesaicError]
T = TypeVar("T")
Exchange = Generator[Mapping[str, Order], Answers, T]

Squares = dict[ExpertKey, Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolNow:
    """The hosts of a pool as a run sees them at one moment."""

    entries: Mapping[str, HostEntry]
    domains: Mapping[str, str]  # of the hosts in `entries`
    # The hosts that serve each expert of the model. A host that has just begun may be missing.
    holders: Mapping[ExpertKey, tuple[str, ...]]
    leaving: frozenset[str] = frozenset()  # they are drained, and own nothing new

    def incarnations(self) -> dict[str, int]:
        return {host: entry.incarnation for host, entry in self.entries.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained under one key."""

    groups: Mapping[str, int]  # name -> the group of its hyperparameters
    nbytes: int  # of its master


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run trains, and how."""

    run: int
    model: str
    optimizer: str
    settings: Mapping[str, object]
    tensors: Mapping[ExpertKey, Trained]
    redundancy: int = 0  # owners of a key besides the first
    exact: bool = False


@dataclass(slots=True)
class _Reduction:
    """The gradients of an attempt, from the first order to sum them up until its end."""

    sources: dict[ExpertKey, tuple[str, ...]] = field(default_factory=dict)
    squares: Squares = field(default_factory=dict)


class TrainingSteps:
    """The state of one run. It is used by one thread at a time."""

    def __init__(self, plan: RunPlan, pool: PoolNow, *, version: int) -> None:
        """Begin with the weights of ``version``, which are served. Raises ClusterError."""
        self.plan = plan
        self.step = 0  # steps that were committed
        self.version = version  # of the weights after the last commit
        self.broken = ""  # why the run cannot go on
        self._pool = pool
        self._number = 0
        self._lost = ""  # why the attempt under way cannot be committed
        self._reduction: _Reduction | None = None
        # Hosts that know the run, and in which incarnation they came to know it.
        self._members: dict[str, int] = {}
        # What hosts still have to forget, because others own it by now.
        self._left: dict[str, set[ExpertKey]] = {}
        self.owners: Owners = self._dealt(None)
        if none := ownerless(self.owners):
            raise ClusterError(f"no host can own {none[0]}: no host of the pool stays")

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.plan.run, self.step, self._number)

    def owning(self, key: ExpertKey) -> list[HostEntry]:
        """Return the owners of a key."""
        return [self._pool.entries[h] for h in self.owners.get(key, ()) if h in self._pool.entries]

    def having(self, key: ExpertKey) -> list[HostEntry]:
        """Return the hosts with the weights of a key; those that serve it have all tensors."""
        serving = [h for h in self._pool.holders.get(key, ()) if h in self._pool.entries]
        return [*(self._pool.entries[h] for h in serving), *self.owning(key)]

    # ---- the run's beginning and end ------------------------------------------------------------

    def open(self) -> Exchange[None]:
        """Let all hosts begin the run. Raises ClusterError."""
        failed = yield from self._enter(self._pool.entries)
        _raise_first(failed, "begin the run")

    def own(self) -> Exchange[None]:
        """Let owners take over what is trained, and begin the first attempt. Raises ClusterError.

        Before this, who runs the exchange puts what hosts do not have into `owning`.
        """
        found = yield {host: self._own(keys) for host, keys in keys_by_host(self.owners).items()}
        _raise_first(found, "become the owner of what is trained")
        yield from self._begin()

    def close(self) -> Exchange[None]:
        """Let all hosts forget the run; those that do not answer forget it with the next one."""
        yield dict.fromkeys(self._members, CloseRun(run=self.plan.run))

    def lose(self, why: str) -> StepLost:
        """End the attempt under way; return the error that says so."""
        return self._is_lost(why)

    # ---- one step -------------------------------------------------------------------------------

    def again(self, pool: PoolNow) -> Exchange[None]:
        """Forget what was added up, and begin the next attempt at the step.

        Raises StepLost if that fails, and if the run cannot go on.
        """
        self._check()
        self._number += 1
        self._reduction = None
        yield from self.follow(pool)
        yield from self._begin()

    def reduce_experts(self, without: Collection[int] = ()) -> Exchange[Squares]:
        """End the backward calls, and sum the experts' gradients up; return sums of squares.

        Experts of layers in ``without`` are not updated in this step. Raises StepLost.
        """
        self._check_attempt()
        found = yield dict.fromkeys(self._members, Gather(attempt=self.attempt))
        sources: dict[ExpertKey, tuple[str, ...] | None] = {
            key: None if key.layer in without else ()
            for key in self.plan.tensors
            if key.layer != TRUNK
        }
        reduction = _Reduction()
        for host in sorted(found):
            answer = self._or_lost(found[host], host, Gathered)
            for key in answer.keys & sources.keys():
                have = sources[key]
                if have is None:
                    raise self._is_lost(f"{key} has gradients from {host}, and is to be left out")
                sources[key] = (*have, host)
        self._reduction = reduction
        return (yield from self._reduce(reduction, sources))

    def reduce_trunk(self, blocks: Collection[ExpertKey], worker: str) -> Exchange[Squares]:
        """Sum up the gradients of the trunk's ``blocks``, which ``worker`` has put into owners.

        The other blocks are not updated in this step. Raises StepLost.
        """
        self._check_attempt()
        assert self._reduction is not None, "experts come first"
        sources: dict[ExpertKey, tuple[str, ...] | None] = {
            key: (worker,) if key in blocks else None
            for key in self.plan.tensors
            if key.layer == TRUNK
        }
        return (yield from self._reduce(self._reduction, sources))

    def commit(self, groups: Mapping[int, GroupUpdate]) -> Exchange[None]:
        """Apply what was summed up at all owners, and let replicas have the new weights.

        Afterwards `version` can be served. Raises StepLost if what some keys were is lost.
        """
        self._check_attempt()
        assert self._reduction is not None, "nothing is summed up"
        order = Commit(attempt=self.attempt, version=self.version + 1, groups=groups)
        found = yield dict.fromkeys(keys_by_host(self.owners), order)
        # It may have been applied although no answer came, so it is asked for once more.
        failed = [host for host, answer in found.items() if isinstance(answer, MoesaicError)]
        if failed:
            found = {**found, **(yield dict.fromkeys(failed, order))}
        gone = {host: answer for host, answer in found.items() if isinstance(answer, MoesaicError)}
        self._leave(gone, f"{self.attempt} could not be committed")
        self.step, self.version, self._number = self.step + 1, self.version + 1, 0
        self._reduction = None
        # A host that fails here lacks the version, and the controller lets it load it.
        yield self._renewals()

    def begin(self) -> Exchange[None]:
        """Begin the first attempt at the next step. Raises StepLost."""
        self._check()
        yield from self._begin()

    # ---- checkpoints ----------------------------------------------------------------------------

    def forget(self, pool: PoolNow) -> Exchange[None]:
        """Let owners forget what they own; a checkpoint's state comes in its place.

        Who runs the exchange puts it into `owning`, and goes on with `take_over`. Raises StepLost.
        """
        self._reduction = None
        yield from self.follow(pool)
        found = yield {
            host: Disown(run=self.plan.run, keys=tuple(keys))
            for host, keys in keys_by_host(self.owners).items()
        }
        _raise_first(found, "forget what it owns")

    def take_over(self, step: int) -> Exchange[None]:
        """Go on from the state after ``step`` that owners were given, as a new version."""
        self._reduction = None
        found = yield {host: self._own(keys) for host, keys in keys_by_host(self.owners).items()}
        _raise_first(found, "become the owner of what is trained")
        self.step, self.version, self._number = step, self.version + 1, 0
        order = Serve(run=self.plan.run, version=self.version)
        _raise_first((yield dict.fromkeys(keys_by_host(self.owners), order)), "serve what it owns")
        yield self._renewals()

    # ---- hosts that come and go -----------------------------------------------------------------

    @property
    def is_reducing(self) -> bool:
        """Whether owners have begun to sum up; they stay what they are until the attempt ends."""
        return self._reduction is not None

    def follow(self, pool: PoolNow) -> Exchange[None]:
        """Take note of the pool's hosts; owners follow. An attempt under way may be lost by that.

        Raises StepLost if the run cannot go on.
        """
        assert not self.is_reducing, "owners are summing up"
        self._check()
        before, self._pool = self._members, pool
        now = pool.incarnations()
        gone = {host: "it is gone" for host, known in before.items() if now.get(host) != known}
        self._leave(gone, "hosts were lost")
        # One that fails to begin is asked again the next time, and owns nothing until then.
        yield from self._enter({h: e for h, e in pool.entries.items() if h not in self._members})
        yield from self._move(self._dealt(self.owners))
        yield from self._let_forget()

    def _move(self, wanted: Owners) -> Exchange[None]:
        """Copy what has new owners to them; if that fails, what was stays."""
        wanted = {key: hosts or self.owners[key] for key, hosts in wanted.items()}
        new = {key: tuple(set(hosts) - set(self.owners[key])) for key, hosts in wanted.items()}
        source = first_owners(self.owners, (key for key, hosts in new.items() if hosts))
        orders = {
            host: self._own(keys, {key: self._pool.entries[source[key]] for key in keys})
            for host, keys in keys_by_host(new).items()
        }
        if orders:
            failed = {h for h, a in (yield orders).items() if isinstance(a, MoesaicError)}
            for host in failed:  # it may have taken some over
                self._left.setdefault(host, set()).update(orders[host].keys)
            found = without_hosts(new, failed)
            wanted = {
                key: tuple(h for h in hosts if h in found[key] or h in self.owners[key])
                if new[key] == found[key]
                else self.owners[key]
                for key, hosts in wanted.items()
            }
        for host, keys in keys_by_host(self.owners).items():
            gone = {key for key in keys if host not in wanted[key]}
            self._left.setdefault(host, set()).update(gone)
        for host, keys in keys_by_host(wanted).items():
            self._left.get(host, set()).difference_update(keys)
        self.owners = wanted

    def _let_forget(self) -> Exchange[None]:
        self._left = {h: keys for h, keys in self._left.items() if keys and h in self._members}
        orders = {h: Disown(run=self.plan.run, keys=tuple(k)) for h, k in self._left.items()}
        for host, answer in (yield orders).items():
            if not isinstance(answer, MoesaicError):
                del self._left[host]

    # ---- parts of these -------------------------------------------------------------------------

    def _check(self) -> None:
        if self.broken:
            raise StepLost(self.broken)

    def _check_attempt(self) -> None:
        self._check()
        if self._lost:
            raise self._is_lost(self._lost)

    def _is_lost(self, why: str) -> StepLost:
        self._lost = why
        return StepLost(f"{self.attempt} is lost: {why}; the weights are those of the last step")

    def _or_lost(self, answer: Answer | MoesaicError, host: str, kind: type[T]) -> T:
        if isinstance(answer, MoesaicError):
            raise self._is_lost(f"{host}: {answer}") from answer
        assert isinstance(answer, kind), answer
        return answer

    def _leave(self, gone: Mapping[str, object], why: str) -> None:
        """Go on without hosts, or break off if they had the only state of something."""
        if not gone:
            return
        self._members = {h: known for h, known in self._members.items() if h not in gone}
        owners = without_hosts(self.owners, gone)
        host, error = next(iter(gone.items()))
        self._lost = self._lost or f"{host}: {error}"
        if lost := ownerless(owners):
            self.broken = (
                f"{why} ({host}: {error}), and with them the optimizer's state of {lost[0]} "
                f"({len(lost)} in all); go back to a checkpoint, or train with redundancy"
            )
            raise StepLost(self.broken)
        self.owners = owners

    def _enter(self, entries: Mapping[str, HostEntry]) -> Exchange[Answers]:
        """Let hosts begin the run, and the attempt that is under way; return the failures."""
        plan, failed = self.plan, dict[str, Answer | MoesaicError]()
        # A host that did not carry out a commit may have state of before.
        orders: list[Order] = [
            CloseRun(run=plan.run),
            OpenRun(
                run=plan.run, model=plan.model, optimizer=plan.optimizer, settings=plan.settings
            ),
            Begin(attempt=self.attempt, exact=plan.exact),
        ]
        for order in orders:
            found = yield dict.fromkeys(entries.keys() - failed, order)
            if not isinstance(order, CloseRun):
                failed |= {h: one for h, one in found.items() if isinstance(one, MoesaicError)}
        self._members |= {h: e.incarnation for h, e in entries.items() if h not in failed}
        return failed

    def _begin(self) -> Exchange[None]:
        self._lost = ""
        order = Begin(attempt=self.attempt, exact=self.plan.exact)
        for host, answer in (yield dict.fromkeys(self._members, order)).items():
            if isinstance(answer, MoesaicError):
                raise self._is_lost(f"{host}: {answer}") from answer

    def _own(
        self, keys: Iterable[ExpertKey], sources: Mapping[ExpertKey, HostEntry] | None = None
    ) -> Own:
        taken = {
            key: NewlyOwned(self.plan.tensors[key].groups, (sources or {}).get(key)) for key in keys
        }
        return Own(run=self.plan.run, version=self.version, keys=taken)

    def _dealt(self, before: Owners | None) -> dict[ExpertKey, tuple[str, ...]]:
        pool, plan = self._pool, self.plan
        staying = {
            host: pool.domains.get(host) or host
            for host in (pool.entries if before is None else self._members)
            if host not in pool.leaving
        }
        return deal_owners(
            {key: one.nbytes for key, one in plan.tensors.items()},
            OwnerHosts(domains=staying, holders=lambda key: pool.holders.get(key, ())),
            copies=1 + plan.redundancy,
            before=before,
        )

    def _reduce(
        self, reduction: _Reduction, sources: Mapping[ExpertKey, tuple[str, ...] | None]
    ) -> Exchange[Squares]:
        orders = {}
        for host, keys in keys_by_host(self.owners).items():
            mine = {key: sources[key] for key in keys if key in sources}
            named = {name for found in mine.values() for name in found or ()}
            peers = {h: e for h, e in self._pool.entries.items() if h in named and h != host}
            orders[host] = Reduce(attempt=self.attempt, sources=mine, peers=peers)
        found = yield orders
        for host in sorted(found):
            answer = self._or_lost(found[host], host, Prepared)
            for key, squares in answer.squares.items():
                reduction.squares.setdefault(key, squares)
        return {key: reduction.squares[key] for key in sources if key in reduction.squares}

    def _renewals(self) -> dict[str, Order]:
        """Return orders for the hosts that serve experts which others own."""
        owners = first_owners(self.owners, self.plan.tensors)
        wanted: dict[str, dict[ExpertKey, HostEntry]] = {}
        for key, hosts in self._pool.holders.items():
            for host in hosts if key in owners else ():
                if host in self._members and host not in self.owners[key]:
                    wanted.setdefault(host, {})[key] = self._pool.entries[owners[key]]
        return {
            host: Renew(run=self.plan.run, version=self.version, owners=keys)
            for host, keys in wanted.items()
        }


def _raise_first(answers: Answers, what: str) -> None:
    for host, answer in answers.items():
        if isinstance(answer, MoesaicError):
            raise ClusterError(f"{host} could not {what}: {answer}") from answer
