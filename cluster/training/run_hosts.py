"""The hosts of a training run: which know it, who owns what, and what they have to forget.

A host whose answer is missing may have carried out its order. So what a host was asked to own is
`left` with it until it says that it owns it, or has forgotten it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...proto.errors import ClusterError, MoesaicError, NotHere
from ..expert_keys import ExpertKey, is_shared
from ..placement import HostEntry
from ..versions import WeightVersions
from .contributions import Attempt
from .orders import (
    Answers,
    Begin,
    CloseRun,
    Disown,
    Exchange,
    NewlyOwned,
    Opened,
    OpenRun,
    Order,
    Own,
    Renew,
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
from .run_plan import PoolNow, RunPlan, kind_of_owners


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far a run has come."""

    versions: WeightVersions  # of the weights after the last commit
    step: int  # steps that have led to them


class RunHosts:
    """The hosts of one run, and their owners' part in it."""

    def __init__(self, plan: RunPlan, pool: PoolNow) -> None:
        """Start with hosts that do not know the run yet. Raises ClusterError."""
        self.plan = plan
        self.pool = pool
        self.owners: Owners = {}
        # Hosts that know the run, and in which incarnation they came to know it.
        self.members: dict[str, int] = {}
        self.free_bytes: dict[str, int | None] = {}  # when hosts came to know it
        # What hosts have to forget: others own it by now, or an order to own it may have failed.
        self.left: dict[str, set[ExpertKey]] = {}
        self._owners_on = kind_of_owners(plan, pool)  # devices of this kind; None: on any

    # ---- queries --------------------------------------------------------------------------------

    @property
    def strangers(self) -> dict[str, HostEntry]:
        """The pool's hosts that do not know the run."""
        return {h: entry for h, entry in self.pool.entries.items() if h not in self.members}

    def owning(self, key: ExpertKey) -> list[HostEntry]:
        """Return the owners of a key."""
        return [self.pool.entries[h] for h in self.owners.get(key, ()) if h in self.pool.entries]

    def having(self, key: ExpertKey) -> list[HostEntry]:
        """Return the hosts with the weights of a key; those that serve it have all tensors."""
        serving = [h for h in self.pool.holders.get(key, ()) if h in self.pool.entries]
        return [*(self.pool.entries[h] for h in serving), *self.owning(key)]

    def keys_by_host(self) -> dict[str, list[ExpertKey]]:
        return keys_by_host(self.owners)

    def dealt(self, hosts: Iterable[str]) -> dict[ExpertKey, tuple[str, ...]]:
        """Return who is to own what among ``hosts``, without those that may not."""
        pool, plan = self.pool, self.plan
        domains = pool.domains_of_owners(hosts, self._owners_on)
        return deal_owners(
            {key: one.nbytes for key, one in plan.tensors.items()},
            OwnerHosts(domains=domains, holders=lambda key: pool.holders.get(key, ())),
            copies=1 + plan.redundancy,
            before=self.owners,
        )

    def dealt_anew(self, hosts: Iterable[str]) -> dict[ExpertKey, tuple[str, ...]]:
        """Deal owners as `dealt` does. Raises ClusterError for a key that no host may own."""
        dealt = self.dealt(hosts)
        if none := ownerless(dealt):
            raise ClusterError(f"no host can own {none[0]}: no host of the pool stays")
        return dealt

    def own(
        self,
        keys: Iterable[ExpertKey],
        stands: Standing,
        sources: Mapping[ExpertKey, HostEntry] | None = None,
    ) -> Own:
        """Return the order to own keys."""
        taken = {
            key: NewlyOwned(self.plan.tensors[key].groups, (sources or {}).get(key)) for key in keys
        }
        return Own(run=self.plan.run, versions=stands.versions, step=stands.step, keys=taken)

    def renewals(self, version: int) -> dict[str, Order]:
        """Return orders for the hosts that serve experts which others own."""
        owners = first_owners(self.owners, self.plan.tensors)
        wanted: dict[str, dict[ExpertKey, HostEntry]] = {}
        for key, hosts in self.pool.holders.items():
            for host in hosts if key in owners else ():
                if host in self.members and host not in self.owners[key]:
                    wanted.setdefault(host, {})[key] = self.pool.entries[owners[key]]
        return {
            host: Renew(run=self.plan.run, version=version, owners=keys)
            for host, keys in wanted.items()
        }

    # ---- hosts that come and go -----------------------------------------------------------------

    def look(self, pool: PoolNow) -> dict[str, str]:
        """Take note of the pool's hosts; return those that are gone, and why."""
        self.pool, now = pool, pool.incarnations()
        members = self.members.items()
        return {host: "it is gone" for host, known in members if now.get(host) != known}

    def leave(self, gone: Iterable[str]) -> Owners:
        """Go on without hosts; return the owners that are left."""
        gone = set(gone)
        self.members = {h: known for h, known in self.members.items() if h not in gone}
        self.left = {h: keys for h, keys in self.left.items() if h not in gone}
        return without_hosts(self.owners, gone)

    def enter(
        self, entries: Mapping[str, HostEntry], attempt: Attempt
    ) -> Exchange[tuple[dict[str, MoesaicError], str]]:
        """Let hosts begin the run, and the attempt that is under way.

        Return the failures, and the first one of a host that may have begun the attempt.
        """
        plan, failed, doubt = self.plan, dict[str, MoesaicError](), ""
        orders: list[Order] = [
            # A host that did not carry out a commit may have state of before.
            CloseRun(run=plan.run),
            OpenRun(
                run=plan.run, model=plan.model, optimizer=plan.optimizer, settings=plan.settings
            ),
            Begin(attempt=attempt, exact=plan.exact),
        ]
        for order in orders if entries else ():
            asked = [host for host in entries if host not in failed]
            for host, answer in (yield dict.fromkeys(asked, order)).items():
                if isinstance(order, CloseRun) and isinstance(answer, NotHere):
                    continue  # it does not know the run
                if isinstance(answer, Opened):
                    self.free_bytes[host] = answer.free_bytes
                if isinstance(answer, MoesaicError):
                    failed[host] = answer
                    if isinstance(order, Begin):
                        # It may have begun, and would add up gradients that the run never gathers.
                        doubt = doubt or f"{host}: {answer}"
        self.members |= {h: e.incarnation for h, e in entries.items() if h not in failed}
        return failed, doubt

    def move(self, wanted: Owners, stands: Standing) -> Exchange[dict[str, MoesaicError]]:
        """Copy what has new owners to them; return the failures.

        What cannot be copied stays where it was, too.
        """
        new = {
            key: tuple(host for host in hosts if host not in self.owners[key])
            for key, hosts in wanted.items()
        }
        source = first_owners(self.owners, new)
        orders = {
            host: self.own(keys, stands, {key: self.pool.entries[source[key]] for key in keys})
            for host, keys in keys_by_host(new).items()
            if host not in self.left  # what it has of a key may be of an earlier step
        }
        for host, order in orders.items():
            self.left[host] = set(order.keys)
        failed = errors_of((yield orders) if orders else {})
        for host in orders.keys() - failed:
            del self.left[host]
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
                    self.left.setdefault(host, set()).add(key)
        self.owners = owners
        return failed

    def let_forget(self) -> Exchange[dict[str, MoesaicError]]:
        """Let hosts forget what they do not own any more; return the failures."""
        if not self.left:
            return {}
        run = self.plan.run
        orders = {h: Disown(run=run, keys=tuple(sorted(keys))) for h, keys in self.left.items()}
        failed = errors_of((yield orders))
        for host in orders.keys() - failed:
            del self.left[host]
        return failed


def errors_of(answers: Answers) -> dict[str, MoesaicError]:
    return {host: answer for host, answer in answers.items() if isinstance(answer, MoesaicError)}


def raise_first(answers: Answers, what: str) -> None:
    """Raise ClusterError if a host has failed at something."""
    for host, error in errors_of(answers).items():
        raise ClusterError(f"{host} could not {what}: {error}") from error
