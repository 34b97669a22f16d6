"""The steps of a training run: who owns what, which attempt is under way, and what is committed.

The exchanges of `TrainingSteps` are generators. Each yields orders for hosts, gets their answers,
and returns when it is over; who runs it sends the orders (`actors/training/run.py`). A step is
`begin`, the backward calls of trunks, `reduce`, and `commit`. Until `commit` sends its first order
anything may fail: StepLost, and the next attempt begins with the weights of the last commit.

A decision to commit is final. A host that does not carry it out has lost what it owns; while each
key has another owner, nothing is lost. Otherwise the run is broken, and each exchange but `close`
raises ClusterError.

A host whose answer is missing may have carried out its order. So `begin` and `again` never use a
number of an attempt twice; an attempt is lost if a host may take part in it that is not known to;
and what a host was asked to own is `_left` with it until it says that it owns it, or has forgotten
it. Orders of a run reach a host in the order in which they are sent, however late.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from ...proto.errors import ClusterError, MoesaicError, NotHere, StepLost
from ..expert_keys import TRUNK, ExpertKey, is_shared
from ..placement import HostEntry
from ..versions import WeightVersions
from .contributions import Attempt
from .host_memory import HostMemory, memory_of_hosts
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
    Opened,
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
    owners_of_shared,
    without_hosts,
)
from .run_plan import PoolNow, RunPlan, check_room, kind_of_owners

Answers = Mapping[str, Answer | MoesaicError]
T = TypeVar("T")
Exchange = Generator[Mapping[str, Order], Answers, T]

Squares = dict[ExpertKey, Mapping[str, float]]

_NOT_BEGUN = "not all hosts have begun it"


@dataclass(slots=True)
class _Reduction:
    """The gradients of an attempt, from the first order to sum them up until its end."""

    keys: set[ExpertKey] = field(default_factory=set)  # that owners have prepared
    squares: Squares = field(default_factory=dict)


class TrainingSteps:
    """The state of one run. It is used by one thread at a time."""

    def __init__(
        self, plan: RunPlan, pool: PoolNow, *, versions: WeightVersions, next_version: int
    ) -> None:
        """Begin with the weights that are served, which have ``versions``.

        The first commit has ``next_version``. Raises ClusterError.
        """
        self.plan = plan
        self._owners_on = kind_of_owners(plan, pool)  # devices of this kind; None: on any
        self.step = 0  # steps that were committed, up to the state of now
        self._turn = 0  # commits and checkpoints that were taken over: it never goes back
        self.versions = versions  # of the weights after the last commit
        self._next_version = next_version
        self.broken = ""  # why the run cannot go on
        self._pool = pool
        self._number = 0  # of the attempt; each step's first one is 1
        self._lost = _NOT_BEGUN  # why the attempt cannot be committed
        self._reduction: _Reduction | None = None
        # Hosts that know the run, and in which incarnation they came to know it.
        self._members: dict[str, int] = {}
        self._free_bytes: dict[str, int | None] = {}  # when hosts came to know it
        # What hosts have to forget: others own it by now, or an order to own it may have failed.
        self._left: dict[str, set[ExpertKey]] = {}
        # The first owners alone; `own` copies what they own to the others.
        self.owners: Owners = {}
        firsts = {key: hosts[:1] for key, hosts in self._dealt(pool.entries).items()}
        self.owners = firsts | owners_of_shared(filter(is_shared, firsts), firsts, {})
        if none := ownerless(self.owners):
            raise ClusterError(f"no host can own {none[0]}: no host of the pool stays")

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.plan.run, self._turn, self._number)

    @property
    def members(self) -> set[tuple[str, int]]:
        """The hosts that know the run, with their incarnations."""
        return set(self._members.items())

    @property
    def lost(self) -> str:
        """Why the attempt cannot be committed any more; empty if it can."""
        return self.broken or self._lost

    def owning(self, key: ExpertKey) -> list[HostEntry]:
        """Return the owners of a key."""
        return [self._pool.entries[h] for h in self.owners.get(key, ()) if h in self._pool.entries]

    def having(self, key: ExpertKey) -> list[HostEntry]:
        """Return the hosts with the weights of a key; those that serve it have all tensors."""
        serving = [h for h in self._pool.holders.get(key, ()) if h in self._pool.entries]
        return [*(self._pool.entries[h] for h in serving), *self.owning(key)]

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        """Return what each host takes for the run; ``lent`` as in `memory_of_hosts`."""
        sizes = {key: one.memory for key, one in self.plan.tensors.items()}
        owners = self._dealt(self._pool.entries)
        return memory_of_hosts(sizes, owners, self._pool.holders, lent=lent)

    # ---- the run's beginning and end ------------------------------------------------------------

    def open(self) -> Exchange[None]:
        """Let all hosts begin the run. Raises ClusterError, also if memory does not suffice."""
        failed = yield from self._enter(self._pool.entries)
        _raise_first(failed, "begin the run")
        check_room(self.plan, self.planned_memory(), self._pool, self._free_bytes)

    def own(self) -> Exchange[None]:
        """Let owners take over what is trained, and begin the first attempt. Raises ClusterError.

        Before this, who runs the exchange puts what hosts do not have into `owning`: those of the
        first owners. The others copy it from them.
        """
        found = yield {host: self._own(keys) for host, keys in keys_by_host(self.owners).items()}
        _raise_first(found, "become the owner of what is trained")
        failed = yield from self._move(self._dealt(self._members))
        _raise_first(failed, "become another owner of what is trained")
        yield from self._begin()

    def close(self) -> Exchange[None]:
        """Let all hosts forget the run; those that do not answer forget it with the next one."""
        yield dict.fromkeys(self._pool.entries, CloseRun(run=self.plan.run))

    def lose(self, why: str) -> StepLost:
        """End the attempt under way; return the error that says so."""
        self._lost = why
        return StepLost(f"{self.attempt} is lost: {why}; the weights are those of the last step")

    # ---- one step -------------------------------------------------------------------------------

    def again(self, pool: PoolNow) -> Exchange[None]:
        """Forget what was added up, and begin the next attempt at the step.

        If a host fails to begin it, it is `lost` from the beginning.
        """
        self._check()
        self._lost, self._reduction = _NOT_BEGUN, None
        yield from self.follow(pool)
        yield from self._begin()

    def reduce_experts(
        self,
        without: Collection[int] = (),
        *,
        put: Mapping[str, Collection[ExpertKey]] | None = None,
    ) -> Exchange[Squares]:
        """End the backward calls, and sum the experts' gradients up; return sums of squares.

        Experts of layers in ``without`` are not updated in this step. ``put`` says of which experts
        a worker has put gradients of its own into the owners. Raises StepLost.
        """
        self._check_attempt()
        # A host commits all that it owns, so it may own no more than it prepares.
        yield from self._let_forget()
        if late := self._left.keys() & keys_by_host(self.owners).keys():
            raise self.lose(f"{min(late)} may still own what others own by now")
        found = yield dict.fromkeys(self._members, Gather(attempt=self.attempt))
        sources: dict[ExpertKey, tuple[str, ...] | None] = {
            key: None if key.layer in without else ()
            for key in self.plan.tensors
            if key.layer != TRUNK
        }
        trained = {key for key in sources if self.plan.tensors[key].groups}
        reduction = _Reduction()
        given: dict[str, Collection[ExpertKey]] = {
            host: self._or_lost(answer, host, Gathered).keys for host, answer in found.items()
        }
        for source, keys in sorted((given | dict(put or {})).items()):
            for key in trained.intersection(keys):
                have = sources[key]
                if have is None:
                    raise self.lose(f"{key} has gradients from {source}, and is to be left out")
                sources[key] = (*have, source)
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

        Afterwards `versions` can be served. Raises StepLost while nothing is applied, and
        ClusterError if the state of some keys is lost.
        """
        self._check_attempt()
        assert self._reduction is not None, "nothing is summed up"
        missing = self.plan.tensors.keys() - self._reduction.keys
        assert not missing, f"{min(missing)} is not summed up"
        # If the exchange is abandoned, it is unknown which owners have applied it.
        self.broken = (
            f"the commit of {self.attempt} was interrupted, and some owners may have applied it; "
            "go back to a checkpoint"
        )
        order = Commit(attempt=self.attempt, version=self._next_version, groups=groups)
        found = yield dict.fromkeys(keys_by_host(self.owners), order)
        # It may have been applied although no answer came, so it is asked for once more.
        gone = _errors(found)
        if gone:
            gone = _errors((yield dict.fromkeys(gone, order)))
        self._leave(gone, f"hosts did not commit {self.attempt}")
        self.broken = ""
        self.step, self._number = self.step + 1, 0
        self._lost, self._reduction = _NOT_BEGUN, None
        self._count_version()
        # A host that fails here lacks the version, and the controller lets it load it.
        yield self._renewals()

    def begin(self) -> Exchange[None]:
        """Begin the first attempt at the next step; if a host fails to, it is `lost`."""
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
        self.step, self._number, self._lost = step, 0, _NOT_BEGUN
        order = Serve(run=self.plan.run, version=self._next_version)
        self._count_version()
        _raise_first((yield dict.fromkeys(keys_by_host(self.owners), order)), "serve what it owns")
        yield self._renewals()

    # ---- hosts that come and go -----------------------------------------------------------------

    @property
    def is_reducing(self) -> bool:
        """Whether owners have begun to sum up; they stay what they are until the attempt ends."""
        return self._reduction is not None

    def follow(self, pool: PoolNow) -> Exchange[dict[str, MoesaicError]]:
        """Take note of the pool's hosts; owners follow. An attempt under way may be lost by that.

        Returns the errors of hosts that could not do their part; they are asked again the next
        time. Raises ClusterError if the run cannot go on.
        """
        assert not self.is_reducing, "owners are summing up"
        self._check()
        before, self._pool = self._members, pool
        now = pool.incarnations()
        gone = {host: "it is gone" for host, known in before.items() if now.get(host) != known}
        self._leave(gone, "hosts were lost")
        # A host owns nothing until it was seen again: when it began the run, it may have been
        # another incarnation already than the one of `pool`.
        known = set(self._members)
        new = {h: e for h, e in pool.entries.items() if h not in self._members}
        failed = yield from self._enter(new)
        failed |= yield from self._let_forget()
        failed |= yield from self._move(self._dealt(known))
        failed |= yield from self._let_forget()
        return failed

    def _move(self, wanted: Owners) -> Exchange[dict[str, MoesaicError]]:
        """Copy what has new owners to them; return the failures.

        What cannot be copied stays where it was, too.
        """
        new = {
            key: tuple(host for host in hosts if host not in self.owners[key])
            for key, hosts in wanted.items()
        }
        source = first_owners(self.owners, new)
        orders = {
            host: self._own(keys, {key: self._pool.entries[source[key]] for key in keys})
            for host, keys in keys_by_host(new).items()
            if host not in self._left  # what it has of a key may be of an earlier step
        }
        for host, order in orders.items():
            self._left[host] = set(order.keys)
        failed = _errors((yield orders) if orders else {})
        for host in orders.keys() - failed:
            del self._left[host]
        owners: dict[ExpertKey, tuple[str, ...]] = {}
        for key, hosts in wanted.items():
            old = self.owners[key]
            took = [h for h in hosts if h in old or (h in orders and h not in failed)]
            if len(took) < len(hosts) or not hosts:
                took += [host for host in old if host not in took]
            owners[key] = tuple(took)
        # Where experts stayed, what they share with others has to stay, too.
        shared = {key: (*owners[key], *self.owners[key]) for key in filter(is_shared, owners)}
        owners |= owners_of_shared(shared, owners, shared)
        for key, took in owners.items():
            for host in self.owners[key]:
                if host not in took:
                    self._left.setdefault(host, set()).add(key)
        self.owners = owners
        return failed

    def _let_forget(self) -> Exchange[dict[str, MoesaicError]]:
        """Let hosts forget what they do not own any more; return the failures."""
        if not self._left:
            return {}
        run = self.plan.run
        orders = {h: Disown(run=run, keys=tuple(sorted(keys))) for h, keys in self._left.items()}
        failed = _errors((yield orders))
        for host in orders.keys() - failed:
            del self._left[host]
        return failed

    # ---- parts of these -------------------------------------------------------------------------

    def _check(self) -> None:
        if self.broken:
            raise ClusterError(self.broken)

    def _check_attempt(self) -> None:
        self._check()
        if self._lost:
            raise self.lose(self._lost)

    def _or_lost(self, answer: Answer | MoesaicError, host: str, kind: type[T]) -> T:
        if isinstance(answer, MoesaicError):
            raise self.lose(f"{host}: {answer}") from answer
        assert isinstance(answer, kind), answer
        return answer

    def _leave(self, gone: Mapping[str, object], why: str) -> None:
        """Go on without hosts, or break off if they had the only state of something."""
        if not gone:
            return
        self._members = {h: known for h, known in self._members.items() if h not in gone}
        self._left = {h: keys for h, keys in self._left.items() if h not in gone}
        owners = without_hosts(self.owners, gone)
        host, error = next(iter(gone.items()))
        self._lost = self._lost or f"{host}: {error}"
        if lost := ownerless(owners):
            host = self.owners[lost[0]][0]
            self.broken = (
                f"{why} ({host}: {gone[host]}), and with them the optimizer's state of {lost[0]} "
                f"({len(lost)} in all); go back to a checkpoint, or train with redundancy"
            )
            raise ClusterError(self.broken)
        self.owners = owners

    def _enter(self, entries: Mapping[str, HostEntry]) -> Exchange[dict[str, MoesaicError]]:
        """Let hosts begin the run, and the attempt that is under way; return the failures."""
        plan, failed = self.plan, dict[str, MoesaicError]()
        orders: list[Order] = [
            # A host that did not carry out a commit may have state of before.
            CloseRun(run=plan.run),
            OpenRun(
                run=plan.run, model=plan.model, optimizer=plan.optimizer, settings=plan.settings
            ),
            Begin(attempt=self.attempt, exact=plan.exact),
        ]
        for order in orders if entries else ():
            asked = [host for host in entries if host not in failed]
            for host, answer in (yield dict.fromkeys(asked, order)).items():
                if isinstance(order, CloseRun) and isinstance(answer, NotHere):
                    continue  # it does not know the run
                if isinstance(answer, Opened):
                    self._free_bytes[host] = answer.free_bytes
                if isinstance(answer, MoesaicError):
                    failed[host] = answer
                    if isinstance(order, Begin):
                        # It may have begun, and would add up gradients that the run never gathers.
                        self._lost = self._lost or f"{host}: {answer}"
        self._members |= {h: e.incarnation for h, e in entries.items() if h not in failed}
        return failed

    def _begin(self) -> Exchange[None]:
        self._number, self._lost = self._number + 1, _NOT_BEGUN
        order = Begin(attempt=self.attempt, exact=self.plan.exact)
        found = yield dict.fromkeys(self._members, order)
        self._lost = next((f"{host}: {error}" for host, error in _errors(found).items()), "")

    def _count_version(self) -> None:
        """Take note that owners have the weights of the next version."""
        self.versions = WeightVersions({self.plan.model: self._next_version})
        self._next_version += 1
        self._turn += 1

    def _own(
        self, keys: Iterable[ExpertKey], sources: Mapping[ExpertKey, HostEntry] | None = None
    ) -> Own:
        taken = {
            key: NewlyOwned(self.plan.tensors[key].groups, (sources or {}).get(key)) for key in keys
        }
        return Own(run=self.plan.run, versions=self.versions, keys=taken)

    def _dealt(self, hosts: Iterable[str]) -> dict[ExpertKey, tuple[str, ...]]:
        """Return who is to own what among ``hosts``, without those that may not."""
        pool, plan = self._pool, self.plan
        domains = pool.domains_of_owners(hosts, self._owners_on)
        return deal_owners(
            {key: one.nbytes for key, one in plan.tensors.items()},
            OwnerHosts(domains=domains, holders=lambda key: pool.holders.get(key, ())),
            copies=1 + plan.redundancy,
            before=self.owners,
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
        reduction.keys |= sources.keys()
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
            host: Renew(run=self.plan.run, version=self._next_version - 1, owners=keys)
            for host, keys in wanted.items()
        }


def _errors(answers: Answers) -> dict[str, MoesaicError]:
    return {host: answer for host, answer in answers.items() if isinstance(answer, MoesaicError)}


def _raise_first(answers: Answers, what: str) -> None:
    for host, error in _errors(answers).items():
        raise ClusterError(f"{host} could not {what}: {error}") from error
