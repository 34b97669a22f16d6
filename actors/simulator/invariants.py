"""Invariants of a simulated pool: they hold after every event, whatever fails in whatever order.

Each check is a function of one kind of fact, or of the whole world. It returns what is wrong, or an
empty string. The first violation ends a run. `unsettled` says whether the pool has settled: every
call has ended, and every replica is where the target wants it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...cluster.control.control import Control
from ...cluster.expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion, LayerKey
from ...cluster.placement import Placement, PlacementId
from ...cluster.planner.capacity import capacity_shortage
from . import call_invariants as calls
from .controller import SimController
from .experts import CHECKPOINT
from .host import SimHost
from .trace_events import (
    Claimed,
    Computed,
    Ended,
    Fact,
    Followed,
    HostEnded,
    HostStarted,
    Loaded,
    Obeyed,
    Published,
    Released,
    Sent,
    Sized,
    Wrote,
)

if TYPE_CHECKING:
    from .router import SimRouter
    from .world import World


class Invariants:
    """The checks, with what they must remember of earlier events."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._terms: dict[int, SimController] = {}
        self._published: dict[int, PlacementId] = {}  # the last number of each term
        self._followed: dict[str, PlacementId] = {}
        self._seen_by_host: dict[tuple[str, str], PlacementId] = {}
        self._obeyed: dict[str, int] = {}
        self._names: set[str] = set()  # of all hosts that were ever started
        self._served: set[ExpertVersion] = set()  # what any placement ever named
        self._deaths: list[tuple[float, frozenset[ExpertVersion]]] = []  # (time, experts held)

    def died(self, host: SimHost) -> None:
        """Take note of a host that dies with what it holds."""
        self._deaths.append((self._world.clock.now, frozenset(host.weights)))

    def check(self, facts: Sequence[Fact]) -> tuple[str, str] | None:
        """Return (invariant, what is wrong) of the first violation; None if there is none."""
        for fact in facts:
            for name, wrong in self._of(fact):
                if wrong:
                    return name, wrong
        if wrong := calls.end_in_time(self._world):
            return "every call ends by its deadline", wrong
        return None

    def _of(self, fact: Fact) -> list[tuple[str, str]]:
        now = self._world.clock.now
        match fact:
            case Ended():
                return [
                    ("no token is lost before its time", calls.lost_late(fact, now)),
                    ("every token has the sum of its experts", calls.right_sums(fact, self._world)),
                ]
            case Sent():
                return [
                    ("no slot is reused while its answer can come", calls.slot_is_free(fact)),
                    ("placement numbers only grow", self.host_sees_growing(fact)),
                    ("only versions that a placement names are used", self.names_version(fact)),
                ]
            case Wrote():
                return [("no slot is reused while its answer can come", calls.wrote_own(fact))]
            case Computed():
                return [("an evicted replica never computes", self.computes_what_it_holds(fact))]
            case Obeyed():
                return [("no host obeys a superseded controller", self.obeys_the_newest(fact))]
            case Loaded():
                self._world.last_change = now
                return [("a version has the weights that it was served with", self.right(fact))]
            case Released():
                self._world.last_change = now
                return [
                    ("an eviction leaves a replica", self.leaves_one(fact)),
                    ("nothing is evicted under a live router", self.no_router_asks(fact)),
                ]
            case HostStarted():
                return [
                    ("no host's name is used twice", self.named_once(fact)),
                    ("the number of hosts is within its bounds", self.not_too_many(fact)),
                ]
            case HostEnded():
                return [("a host that leaves is not needed", self.left_free(fact))]
            case Sized():
                return [("the number of hosts is within its bounds", self.sized_within(fact))]
            case Claimed():
                return [("no two controllers share a term", self.claimed_alone(fact))]
            case Published():
                self._world.last_change = now
                versions = fact.placement.versions
                self._served |= {versions.served(key) for key, _ in _replicas(fact.placement)}
                return [
                    ("no two controllers share a term", self.publishes_alone(fact)),
                    ("placement numbers only grow", self.publishes_growing(fact)),
                    ("a placement names only ready replicas", self.names_ready(fact)),
                    ("a placement names every living expert", self.names_living(fact)),
                ]
            case Followed():
                return [("placement numbers only grow", self.follows_growing(fact))]

    # ---- replicas -------------------------------------------------------------------------------

    def computes_what_it_holds(self, fact: Computed) -> str:
        if not fact.lacking:
            return ""
        return f"{fact.host.name}: {', '.join(map(str, fact.lacking))}, without weights"

    def right(self, fact: Loaded) -> str:
        """Check that a host gets what an update brought, or what the checkpoint has."""
        one, content = fact.weights, fact.host.weights[fact.weights]
        if one.version == FIRST_VERSION:
            right: int | None = CHECKPOINT
        else:
            right = self._world.contents.get(one, content)
        if content == right:
            return ""
        return f"{fact.host.name}: {one} has content {content}, and {right} was served"

    def leaves_one(self, fact: Released) -> str:
        """Check that another host holds what was evicted, or died after the controller looked."""
        died = [held for when, held in self._deaths if when >= fact.seen]
        for one in fact.weights:
            others = [
                host.name
                for host in self._world.hosts.values()
                if host is not fact.host and host.alive and host.holds(one)
            ]
            served = self._world.registry.served_version(one.key) == one.version
            if served and not others and not any(one in held for held in died):
                return f"{fact.host.name}: {one} was the last replica (term {fact.by})"
        return ""

    def no_router_asks(self, fact: Released) -> str:
        """Check that no router with a valid lease follows a placement naming what was evicted."""
        now = self._world.clock.now
        for router, placement in self._leased(fact.seen):
            if placement.hosts.get(fact.host.host) != fact.host.entry:
                continue
            for one in fact.weights:
                if _names(placement, one, fact.host.host):
                    return (
                        f"term {fact.by} looked {now - fact.seen:.3f} s ago and evicts {one} from "
                        f"{fact.host.name}; {router.name}, heard {now - router.heard_at:.3f} s "
                        f"ago, follows {tuple(placement.id)}, which names it"
                    )
        return ""

    def names_version(self, fact: Sent) -> str:
        wrong = [one for one in fact.weights if one not in self._served]
        return f"{fact.router.name} asks for {wrong[0]}, which no placement names" if wrong else ""

    # ---- hosts ----------------------------------------------------------------------------------

    def named_once(self, fact: HostStarted) -> str:
        again = fact.name in self._names
        self._names.add(fact.name)
        return f"{fact.name} is started again" if again else ""

    def not_too_many(self, fact: HostStarted) -> str:
        most = sum(group.max_count for group in self._world.settings.groups)
        return "" if fact.there <= most else f"{fact.there} hosts, and at most {most} may be"

    def sized_within(self, fact: Sized) -> str:
        fleet = fact.controller.sizing.fleet
        for index, group in fleet.groups.items():
            count = len(fleet.staying(index))
            there = sum(of == index for of in fleet.desired().values())
            if not 1 <= count <= there <= group.max_count:
                return f"group {index}: {count} hosts that stay of {there}"
        last = fleet.scalings.all[-1:]
        for one in last:
            least = fleet.groups[one.group].min_count
            if one.who == "autoscaler" and one.count < min(least, one.before):
                return f"group {one.group}: the autoscaler goes to {one.count} of {least} hosts"
        return ""

    def left_free(self, fact: HostEnded) -> str:
        """Check that no router and no plan needs a host that was ended.

        Another host holds what it held, or has died since the controller looked. No router with a
        valid lease follows a placement that names it.
        """
        seen = self._world.registry.let_go.get(fact.host.host)
        if seen is None:
            return f"{fact.host.name} is ended, and no controller let it go"
        died = [held for when, held in self._deaths if when >= seen]
        for one in sorted(fact.weights - fact.host.found):
            served = self._world.registry.served_version(one.key) == one.version
            others = any(h.alive and h.holds(one) for h in self._world.hosts.values())
            if served and not others and not any(one in held for held in died):
                return f"{fact.host.name} is ended with the last replica of {one}"
        for router, placement in self._leased(seen):
            if placement.hosts.get(fact.host.host) == fact.host.entry:
                heard_s = self._world.clock.now - router.heard_at
                return (
                    f"{fact.host.name} is ended under {router.name}, heard {heard_s:.3f} s ago, "
                    "which knows it"
                )
        return ""

    def _leased(self, since: float) -> Iterator[tuple[SimRouter, Placement]]:
        """Yield the routers whose lease has been valid ever since then, and what each follows.

        A router that woke up after its lease had ended does not count: a controller may decide
        before it hears of it.
        """
        lease_s, now = self._world.settings.control.lease_s, self._world.clock.now
        for router in self._world.routers.values():
            placement = router.placement
            if placement is None or now - router.heard_at > lease_s or router.leased_since > since:
                continue
            yield router, placement

    # ---- controllers ----------------------------------------------------------------------------

    def claimed_alone(self, fact: Claimed) -> str:
        first = self._terms.setdefault(fact.term, fact.controller)
        if first is fact.controller:
            return ""
        return f"term {fact.term} of {fact.controller.name} is that of {first.name}"

    def publishes_alone(self, fact: Published) -> str:
        number = fact.placement.id
        first = self._terms.get(number.term)
        if first is fact.controller:
            return ""
        return f"{fact.controller.name} publishes {tuple(number)}, a term that it has not claimed"

    def publishes_growing(self, fact: Published) -> str:
        number = fact.placement.id
        last = self._published.get(number.term)
        self._published[number.term] = number
        if last is None or last < number:
            return ""
        return f"{fact.controller.name} publishes {tuple(number)} after {tuple(last)}"

    def obeys_the_newest(self, fact: Obeyed) -> str:
        newest = self._obeyed.get(fact.host.name, 0)
        self._obeyed[fact.host.name] = max(newest, fact.term)
        if fact.term >= newest:
            return ""
        return f"{fact.host.name}: {fact.order} of term {fact.term}, after term {newest}"

    def names_ready(self, fact: Published) -> str:
        """Check that each replica the newest controller names is there, or its host has died."""
        if fact.controller.term < max(self._terms):
            return ""
        for key, host in _replicas(fact.placement):
            process = self._world.hosts.get(host)
            entry = fact.placement.hosts.get(host)
            if entry is None:
                return f"{key} on {host}, which has no address"
            if process is None or not process.alive or process.incarnation != entry.incarnation:
                continue
            if not process.holds(fact.placement.versions.served(key)):
                return f"{tuple(fact.placement.id)}: {key} is not on {process.name}"
        return ""

    def names_living(self, fact: Published) -> str:
        """Check that every expert that the controller saw on a host is published with a replica."""
        control = fact.controller.control
        assert control is not None
        for key, layer in fact.placement.layers.items():
            for expert, replicas in enumerate(layer.replicas):
                if not replicas and control.view.holders(key.expert(expert)):
                    return f"{key.expert(expert)} has replicas, and none is named"
        return ""

    # ---- numbers --------------------------------------------------------------------------------

    def follows_growing(self, fact: Followed) -> str:
        last = self._followed.get(fact.router.name)
        self._followed[fact.router.name] = fact.placement_id
        if last is None or last <= fact.placement_id:
            return ""
        return f"{fact.router.name} goes from {tuple(last)} to {tuple(fact.placement_id)}"

    def host_sees_growing(self, fact: Sent) -> str:
        where = fact.router.name, fact.connection.host.name
        last = self._seen_by_host.get(where)
        self._seen_by_host[where] = fact.placement_id
        if last is None or last <= fact.placement_id:
            return ""
        return f"{where[1]} sees {tuple(fact.placement_id)} of {where[0]} after {tuple(last)}"


def _names(placement: Placement, weights: ExpertVersion, host: str) -> bool:
    key = weights.key
    layer = placement.layers.get(LayerKey(key.model, key.layer))
    if layer is None or placement.versions.of(key) != weights.version:
        return False
    return host in layer.hosts(key.expert)


def _replicas(placement: Placement) -> list[tuple[ExpertKey, str]]:
    return [
        (key.expert(expert), replica.host)
        for key, layer in placement.layers.items()
        for expert, replicas in enumerate(layer.replicas)
        for replica in replicas
    ]


# The pool can only count as settled if nothing was published, loaded or evicted for this many
# seconds.
_QUIET_S = 0.8


def unsettled(world: World) -> str:
    """Return why the pool has not settled yet; empty if it has."""
    controller = world.registry.controller
    if len(world.controllers) != 1 or controller is None or controller.control is None:
        return f"{len(world.controllers)} controllers"
    control = controller.control
    calling = [router.name for router in world.routers.values() if router.calls]
    if calling:
        return f"{calling} have calls in progress"
    loading = any(host.loading for host in world.hosts.values())
    if loading or world.clock.now - world.last_change < _QUIET_S:
        return "replicas are being moved"
    if not all(host.alive for host in world.hosts.values()):
        return "hosts are away"
    behind = [
        router.name
        for router in world.routers.values()
        if router.placement is None or router.placement.id != control.placement_id
    ]
    if behind or not world.routers:
        return f"{behind} do not follow placement {tuple(control.placement_id)}"
    return _size_lacks(world, controller) or _target_lacks(world, control)


def _size_lacks(world: World, controller: SimController) -> str:
    fleet, control = controller.sizing.fleet, controller.control
    assert control is not None
    desired = fleet.desired()
    if world.hosts.keys() != desired.keys():
        return f"hosts {sorted(world.hosts)} live, and {sorted(desired)} are wanted"
    left = [h for n, h in control.view.hosts.items() if n not in control.leaving]
    no_room = capacity_shortage(
        left, list(control.models.values()), redundancy=control.policy.balance.redundancy
    )
    # If too many hosts are drained, the others have no room for the experts of those that leave.
    if fleet.retired() and not no_room:
        return f"{fleet.retired()} are still to leave"
    return ""


def _target_lacks(world: World, control: Control) -> str:
    if control.updates.arriving():
        return "an update of weights is under way"
    for host in world.hosts:
        for key in control.wanted(host):
            wanted = control.view.versions.served(key)
            if not world.hosts[host].holds(wanted) and not _gone_for_good(world, control, wanted):
                return f"{wanted} is wanted on {host} and not there"
    for shape in control.models.values():
        for layer, experts in shape.experts.items():
            for expert in range(experts):
                key = ExpertKey(shape.model, layer, expert)
                served = control.view.versions.served(key)
                alive = any(host.holds(served) for host in world.hosts.values())
                # The controller names experts for which there is no room (`unplaced`), for example
                # while too many hosts are drained.
                lost = _gone_for_good(world, control, served)
                if not alive and key not in control.unplaced and not lost:
                    return f"no host holds {served}"
    last = control.changes.all[-1] if control.changes.all else None
    if last is not None and last.ended is None:
        return f"change {last.id} ({last.why}) is still under way"
    return ""


def _gone_for_good(world: World, control: Control, weights: ExpertVersion) -> bool:
    """Return whether an expert is lost: it is in no file, and no host holds it."""
    if weights.version == FIRST_VERSION:
        on_disk = weights.key.model not in world.settings.in_memory
    else:
        on_disk = weights in control.loader.saved
    return not on_disk and not any(host.holds(weights) for host in world.hosts.values())
