"""The steps of a training run: who owns what, which attempt is under way, and what is committed.

The exchanges of `TrainingSteps` are generators. Each yields orders for hosts, gets their answers,
and returns when it is over; who runs it sends the orders (`actors/training/run.py`). A step is
`begin`, the backward calls of trunks, `reduce`, and `commit`. Until `commit` sends its first order
anything may fail: StepLost, and the next attempt begins with the weights of the last commit.

A decision to commit is final. A host that does not carry it out has lost what it owns; while each
key has another owner, nothing is lost. Otherwise the run is broken, and each exchange raises
StateLost but `close`, and those that go back to a checkpoint.

A host whose answer is missing may have carried out its order. So `begin` and `again` never use a
number of an attempt twice, and an attempt is lost if a host may take part in it that is not known
to. Orders of a run reach a host in the order in which they are sent, however late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from ...proto.errors import (
    BadInput,
    HostGone,
    MoesaicError,
    NotHere,
    StateLost,
    StepLost,
)
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
    Exchange,
    Finish,
    Gather,
    Gathered,
    GroupUpdate,
    Inherited,
    Prepared,
    Reduce,
    RunId,
    Serve,
    Succeed,
)
from .owners import Owners, ownerless, owners_of_shared
from .run_hosts import RunHosts, Standing, errors_of, raise_first
from .run_plan import PoolNow, RunPlan, check_room
from .succession import Inheritance

T = TypeVar("T")

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
        self._hosts = hosts = RunHosts(plan, pool)
        self.step = 0  # steps that were committed, up to the state of now
        self._turn = 0  # commits and checkpoints that were taken over: it never goes back
        self.versions = versions  # of the weights after the last commit
        self._next_version = next_version
        self._is_begun = False  # hosts may have something of the next version
        # A version that is never to be served, because some hosts may have something else by that
        # number than others; who runs the exchanges says so to the controller.
        self.skipped: int | None = None
        self.broken = ""  # why the run cannot go on
        self._number = 0  # of the attempt; each step's first one is 1
        self._lost = _NOT_BEGUN  # why the attempt cannot be committed
        self._reduction: _Reduction | None = None
        self.owners_stay = False  # what they are, until the attempt ends
        # The first owners alone; `own` copies what they own to the others.
        firsts = {key: names[:1] for key, names in hosts.dealt_anew(pool.entries).items()}
        hosts.owners = firsts | owners_of_shared(filter(is_shared, firsts), firsts, {})

    @property
    def attempt(self) -> Attempt:
        return Attempt(self.plan.run, self._turn, self._number)

    @property
    def members(self) -> set[tuple[str, int]]:
        """The hosts that know the run, with their incarnations."""
        return set(self._hosts.members.items())

    @property
    def owners(self) -> Owners:
        return self._hosts.owners

    @property
    def lost(self) -> str:
        """Why the attempt cannot be committed any more; empty if it can."""
        return self.broken or self._lost

    @property
    def unprotected(self) -> int:
        """How many keys have a single owner, whose loss would break the run."""
        return sum(len(hosts) < 2 for hosts in self.owners.values())

    def owning(self, key: ExpertKey) -> list[HostEntry]:
        """Return the owners of a key."""
        return self._hosts.owning(key)

    def having(self, key: ExpertKey) -> list[HostEntry]:
        """Return the hosts with the weights of a key; those that serve it have all tensors."""
        return self._hosts.having(key)

    def planned_memory(self, *, lent: bool = False) -> dict[str, HostMemory]:
        """Return what each host takes for the run; ``lent`` as in `memory_of_hosts`."""
        sizes = {key: one.memory for key, one in self.plan.tensors.items()}
        pool = self._hosts.pool
        owners = self._hosts.dealt(pool.entries)
        return memory_of_hosts(sizes, owners, pool.holders, lent=lent)

    # ---- the run's beginning and end ------------------------------------------------------------

    def open(self) -> Exchange[None]:
        """Let all hosts begin the run. Raises ClusterError, also if memory does not suffice."""
        pool = self._hosts.pool
        raise_first((yield from self._enter(pool.entries)), "begin the run")
        check_room(self.plan, self.planned_memory(), pool, self._hosts.free_bytes)

    def own(self) -> Exchange[None]:
        """Let owners take over what is trained, and begin the first attempt. Raises ClusterError.

        Before this, who runs the exchange puts what hosts do not have into `owning`: those of the
        first owners. The others copy it from them.
        """
        yield from self._let_own(self._stands)
        failed = yield from self._hosts.move(self._hosts.dealt(self._hosts.members), self._stands)
        raise_first(failed, "become another owner of what is trained")
        yield from self._begin()

    def succeed(self, since: RunId) -> Exchange[None]:
        """Go on with what run ``since`` began, in the place of its process, or of one after it.

        Called in the place of `open` and `own`; the first attempt begins. Afterwards `versions` may
        be newer than those that are served; otherwise one is `skipped`. If state is lost, the run
        is `broken`. Raises ClusterError.
        """
        hosts, plan, run = self._hosts, self.plan, self.plan.run
        order = Succeed(
            run=run,
            since=since,
            model=plan.model,
            optimizer=plan.optimizer,
            settings=plan.settings,
        )
        found = dict((yield dict.fromkeys(hosts.pool.entries, order)))
        if silent := errors_of(found):
            found |= yield dict.fromkeys(silent, order)
        raise_first({h: one for h, one in found.items() if isinstance(one, BadInput)}, "go on")
        there = Inheritance(
            found={h: one for h, one in found.items() if isinstance(one, Inherited)},
            served=self.versions,
            keys=self.plan.tensors.keys(),
        )
        there.check(plan)
        if (unfinished := there.unfinished()) is not None:
            commit, late = unfinished
            failed = errors_of((yield dict.fromkeys(late, Finish(run=run, commit=commit))))
            if failed:
                failed = errors_of((yield dict.fromkeys(failed, Finish(run=run, commit=commit))))
            there = there.finished(commit, [host for host in late if host not in failed])
        incarnations = hosts.pool.incarnations()
        hosts.members = {host: incarnations[host] for host in there.found}
        hosts.owners, hosts.left = there.owners(), there.left()
        self.step, version = there.step, there.newest
        if lost := ownerless(hosts.owners):
            self.broken = (
                f"no host that answers has the optimizer's state of {lost[0]} ({len(lost)} in "
                "all); go back to a checkpoint, or train with redundancy"
            )
        if there.is_published:
            self._skip_version()
        elif self.broken:
            self._next_version, self._is_begun = version, True
        else:
            self.versions = WeightVersions({self.plan.model: version})
            self._next_version = max(self._next_version, version + 1)
        if self.broken:
            return
        if not there.is_published:
            yield hosts.renewals(version)
        yield from self.follow(hosts.pool)
        yield from self._begin()

    def close(self) -> Exchange[None]:
        """Let all hosts forget the run; those that do not answer forget it with the next one."""
        yield dict.fromkeys(self._hosts.pool.entries, CloseRun(run=self.plan.run))

    def lose(self, why: str) -> StepLost:
        """End the attempt under way; return the error that says so."""
        self._lost = why
        return StepLost(f"{self.attempt} is lost: {why}; the weights are those of the last step")

    # ---- one step -------------------------------------------------------------------------------

    def again(self, pool: PoolNow) -> Exchange[None]:
        """Forget what was added up, and begin the next attempt at the step.

        If a host fails to begin it, it is `lost` from the beginning. One that is gone is left out;
        if it had the only state of something, the run is `broken`.
        """
        self.check()
        self._forget_gradients()
        # Others get what they are to own in `follow`, beside the attempt: that takes longer.
        yield from self._see(pool)
        yield from self._begin()

    def stay(self) -> None:
        """Let owners stay what they are: workers begin to put gradients into them.

        Raises StepLost if the attempt is lost.
        """
        self.check_attempt()
        self.owners_stay = True

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
        self.stay()
        # A host commits all that it owns, so it may own no more than it prepares.
        hosts = self._hosts
        yield from hosts.let_forget()
        if late := hosts.left.keys() & hosts.keys_by_host().keys():
            raise self.lose(f"{min(late)} may still own what others own by now")
        found = yield dict.fromkeys(hosts.members, Gather(attempt=self.attempt))
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

    def reduce_trunk(self, put: Mapping[ExpertKey, Sequence[str]]) -> Exchange[Squares]:
        """Sum up the gradients of the trunk's blocks; ``put`` says which workers have put some.

        The other blocks are not updated in this step. Raises StepLost.
        """
        self.check_attempt()
        assert self._reduction is not None, "experts come first"
        sources: dict[ExpertKey, tuple[str, ...] | None] = {
            key: tuple(put[key]) if put.get(key) else None
            for key in self.plan.tensors
            if key.layer == TRUNK
        }
        return (yield from self._reduce(self._reduction, sources))

    def commit(self, groups: Mapping[int, GroupUpdate]) -> Exchange[None]:
        """Apply what was summed up at all owners, and let replicas have the new weights.

        Afterwards `versions` can be served. Raises StepLost while nothing is applied, and
        StateLost if the state of some keys is.
        """
        self.check_attempt()
        assert self._reduction is not None, "nothing is summed up"
        missing = self.plan.tensors.keys() - self._reduction.keys
        assert not missing, f"{min(missing)} is not summed up"
        # If the exchange is abandoned, it is unknown which owners have applied it.
        self.broken = (
            f"the commit of {self.attempt} was interrupted, and some owners may have applied it; "
            "go back to a checkpoint"
        )
        self._is_begun = True
        order = Commit(
            attempt=self.attempt, version=self._next_version, step=self.step + 1, groups=groups
        )
        found = yield dict.fromkeys(self._hosts.keys_by_host(), order)
        # It may have been applied although no answer came, so it is asked for once more.
        gone = errors_of(found)
        if gone:
            gone = errors_of((yield dict.fromkeys(gone, order)))
        self._leave(gone, f"hosts did not commit {self.attempt}")
        self.broken = ""
        self.step, self._number = self.step + 1, 0
        self._forget_gradients()
        self._count_version()
        # A host that fails here lacks the version, and the controller lets it load it.
        yield self._hosts.renewals(self._next_version - 1)

    def begin(self) -> Exchange[None]:
        """Begin the first attempt at the next step, as `again` does."""
        self.check()
        yield from self._begin()

    # ---- checkpoints ----------------------------------------------------------------------------

    def skip(self) -> int | None:
        """Return the `skipped` version: the next one, if some hosts may have something of it."""
        if self._is_begun:
            self._skip_version()
        return self.skipped

    def forget(self, pool: PoolNow) -> Exchange[None]:
        """Let hosts forget what they own; a checkpoint's state comes in its place.

        Call `skip` before it. Who runs the exchange puts the state into `owning`, and goes on with
        `take_over`. Until that ends the run is broken. Raises ClusterError.
        """
        assert not self._is_begun, "a version has two contents"
        self._forget_gradients()
        hosts = self._hosts
        self.broken = "a checkpoint was taken over in part; take it over again"
        hosts.leave(hosts.look(pool))
        yield from self._enter(hosts.strangers)
        everything = tuple(sorted(self.plan.tensors))
        order = Disown(run=self.plan.run, keys=everything)
        raise_first((yield dict.fromkeys(hosts.members, order)), "forget what it owns")
        hosts.owners, hosts.left = {}, {}
        hosts.owners = hosts.dealt_anew(hosts.members)

    def take_over(self, step: int) -> Exchange[None]:
        """Go on from the state after ``step`` that owners were given, as a new version."""
        # Owners get the new version's number with the state: a host that has it and others that
        # lack it cannot be mistaken for a pool that has taken over the whole checkpoint.
        self._is_begun, version = True, self._next_version
        versions = WeightVersions({self.plan.model: version})
        yield from self._let_own(Standing(versions=versions, step=step))
        order = Serve(run=self.plan.run, version=version)
        raise_first((yield dict.fromkeys(self._hosts.keys_by_host(), order)), "serve what it owns")
        self.broken, self._lost = "", _NOT_BEGUN
        self.step, self._number = step, 0
        self._count_version()
        yield self._hosts.renewals(version)

    # ---- hosts that come and go -----------------------------------------------------------------

    def follow(self, pool: PoolNow) -> Exchange[dict[str, MoesaicError]]:
        """Take note of the pool's hosts; owners follow. An attempt under way may be lost by that.

        Returns the errors of hosts that could not do their part; they are asked again the next
        time. Raises StateLost if the run is broken.
        """
        assert not self.owners_stay, "workers put gradients into them"
        self.check()
        # A host owns nothing until it was seen again: when it began the run, it may have been
        # another incarnation already than the one of `pool`.
        hosts, before = self._hosts, self.members
        failed = yield from self._see(pool)
        known = {host for host, _ in before & self.members}
        failed |= yield from hosts.let_forget()
        failed |= yield from hosts.move(hosts.dealt(known), self._stands)
        failed |= yield from hosts.let_forget()
        return failed

    def renew(self, pool: PoolNow) -> Exchange[None]:
        """Let hosts that have come to serve what others own have its last version, too.

        That is for the time between a commit and the next attempt. Raises StateLost.
        """
        yield from self._see(pool)
        yield self._hosts.renewals(self.versions.models[self.plan.model])

    # ---- parts of these -------------------------------------------------------------------------

    def check(self) -> None:
        """Raise StateLost if the run is broken."""
        if self.broken:
            raise StateLost(self.broken)

    def _forget_gradients(self) -> None:
        self._lost, self._reduction, self.owners_stay = _NOT_BEGUN, None, False

    def check_attempt(self) -> None:
        """Raise StepLost if the attempt is lost, and StateLost if the run is broken."""
        self.check()
        if self._lost:
            raise self.lose(self._lost)

    def _or_lost(self, answer: Answer | MoesaicError, host: str, kind: type[T]) -> T:
        if isinstance(answer, MoesaicError):
            raise self.lose(f"{host}: {answer}") from answer
        assert isinstance(answer, kind), answer
        return answer

    def _see(self, pool: PoolNow) -> Exchange[dict[str, MoesaicError]]:
        """Go on with the pool's hosts; return the failures of those that have come."""
        self._leave(self._hosts.look(pool), "hosts were lost")
        return (yield from self._enter(self._hosts.strangers))

    def _leave(self, gone: Mapping[str, object], why: str) -> None:
        """Go on without hosts, or break off if they had the only state of something."""
        if not gone:
            return
        owners = self._hosts.leave(gone)
        host, error = next(iter(gone.items()))
        self._lost = self._lost or f"{host}: {error}"
        if lost := ownerless(owners):
            host = self.owners[lost[0]][0]
            self.broken = (
                f"{why} ({host}: {gone[host]}), and with them the optimizer's state of {lost[0]} "
                f"({len(lost)} in all); go back to a checkpoint, or train with redundancy"
            )
            raise StateLost(self.broken)
        self._hosts.owners = owners

    def _enter(self, entries: Mapping[str, HostEntry]) -> Exchange[dict[str, MoesaicError]]:
        """Let hosts begin the run, and the attempt that is under way; return the failures."""
        failed, doubt = yield from self._hosts.enter(entries, self.attempt)
        self._lost = self._lost or doubt
        return failed

    def _let_own(self, stands: Standing) -> Exchange[None]:
        """Let owners take over what they were given, or have themselves."""
        found = yield {
            host: self._hosts.own(keys, stands) for host, keys in self._hosts.keys_by_host().items()
        }
        raise_first(found, "become the owner of what is trained")

    @property
    def _stands(self) -> Standing:
        return Standing(versions=self.versions, step=self.step)

    def _begin(self) -> Exchange[None]:
        self._number, self._lost = self._number + 1, _NOT_BEGUN
        order = Begin(attempt=self.attempt, exact=self.plan.exact)
        failed = errors_of((yield dict.fromkeys(self._hosts.members, order)))
        # The pool says so a little later, and no attempt would succeed until then.
        gone = {h: one for h, one in failed.items() if isinstance(one, HostGone | NotHere)}
        with suppress(StateLost):  # `broken` says so
            self._leave(gone, "hosts were lost")
        doubt = (f"{host}: {error}" for host, error in failed.items() if host not in gone)
        self._lost = next(doubt, "")

    def _skip_version(self) -> None:
        self.skipped, self._is_begun = self._next_version, False
        self._next_version += 1

    def _count_version(self) -> None:
        """Take note that owners have the weights of the next version."""
        self.versions = WeightVersions({self.plan.model: self._next_version})
        self._next_version, self._is_begun = self._next_version + 1, False
        self._turn += 1

    def _reduce(
        self, reduction: _Reduction, sources: Mapping[ExpertKey, tuple[str, ...] | None]
    ) -> Exchange[Squares]:
        orders = {}
        for host, keys in self._hosts.keys_by_host().items():
            mine = {key: sources[key] for key in keys if key in sources}
            named = {name for found in mine.values() for name in found or ()}
            peers = {h: e for h, e in self._hosts.pool.entries.items() if h in named and h != host}
            orders[host] = Reduce(attempt=self.attempt, sources=mine, peers=peers)
        found = yield orders
        for host in sorted(found):
            answer = self._or_lost(found[host], host, Prepared)
            for key, squares in answer.squares.items():
                reduction.squares.setdefault(key, squares)
        reduction.keys |= sources.keys()
        return {key: reduction.squares[key] for key in sources if key in reduction.squares}
