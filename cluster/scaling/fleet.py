"""The named hosts of a pool: which ones operators and the autoscaler want, and which are there.

`Fleet` only decides. A provisioner asks for `desired`, and starts and ends hosts accordingly.
A host that leaves stays desired until it is drained and no router knows it. If a group grows again,
hosts that are leaving are taken back before new ones are named. A new name has a number that was
never used before.

A group is known by its number, which stays, and operators call it by its place in the spec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..planner.capacity import capacity_shortage
from ..planner.plan import FleetGroup, PoolHost
from ..reports.scaling import HostGroupStatus, ScalingReport, ScalingStatus
from .autoscaler import Autoscaler, BusyMeter, GroupState, ScalePolicy
from .scale_events import ScaleEvent, ScaleHistory

if TYPE_CHECKING:
    from ..control.control import Control

# A regular expression for the name of a host.
HOST_NAME = r"host-\d+"
_SHOWN = 10


class Fleet:
    """The hosts of one `Control`."""

    def __init__(
        self,
        groups: Sequence[FleetGroup] | Mapping[int, FleetGroup],
        policy: ScalePolicy,
        *,
        pending_s: float,
        order: Sequence[int] | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        """Start with the groups' hosts, or with ``kept``, which `snapshot` gave another controller.

        ``order`` has the numbers of the spec's groups; the hosts of all others leave (`follow`).
        None: all groups are the spec's. A host that is not up after ``pending_s`` is shown as
        waiting for a machine.
        """
        self.groups = dict(groups if isinstance(groups, Mapping) else enumerate(groups))
        self.order = tuple(self.groups if order is None else order)
        self.autoscaler = Autoscaler(policy)
        self.scalings = ScaleHistory()
        self.version = 0  # grows when `snapshot` gives something new
        self.pending_s = pending_s
        self._meter = BusyMeter()
        self._group_of: dict[str, int] = {}
        self._retired: list[str] = []
        self._asked_at: dict[str, float] = {}  # hosts that are not up yet
        self._next = 0
        # What the spec said of each group's size when this fleet last followed it.
        self._asked = {number: _size(self.groups[number]) for number in self.order}
        if kept:
            self._group_of = {name: int(group) for name, group in kept["hosts"].items()}
            self._retired = list(kept["retired"])
            self._next = int(kept["next"])
            self._asked = {int(number): tuple(size) for number, size in kept["sizes"].items()}
        else:
            for number in self.order:
                for _ in range(self.groups[number].count):
                    self._group_of[self._name()] = number

    def pool_hosts(self) -> list[PoolHost]:
        """Return all hosts, for a new `Control`."""
        return [self.groups[group].pool_host(name) for name, group in self._group_of.items()]

    def take_over(self, control: Control) -> None:
        """Tell a new `Control` which of its hosts are leaving."""
        for name in self._retired:
            control.members.retire(name)

    def desired(self) -> dict[str, int]:
        """Return the hosts that should exist now, each with its group."""
        return dict(self._group_of)

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values, for a controller that starts anew."""
        return {
            "hosts": self._group_of,
            "retired": self._retired,
            "next": self._next,
            "sizes": self._asked,
        }

    def staying(self, group: int) -> list[str]:
        return [n for n, g in self._group_of.items() if g == group and n not in self._retired]

    @property
    def used_groups(self) -> set[int]:
        """The numbers of the groups that have hosts, also such as are leaving."""
        return set(self._group_of.values())

    # ---- another spec ---------------------------------------------------------------------------

    def follow(
        self,
        control: Control,
        groups: Mapping[int, FleetGroup],
        order: Sequence[int],
        *,
        who: str,
        now: float,
    ) -> None:
        """Follow what a spec says of groups; what it said before already changes nothing.

        A new group gets its hosts, and the hosts of a group that is not in ``order`` leave. Another
        count is taken as a request for that size; else the size stays, within bounds that are new.
        """
        gone = [number for number in self.order if number not in order]
        places = {number: place for place, number in enumerate(self.order)}
        self.groups = {**self.groups, **groups}
        self.order = tuple(order)
        for name, number in self._group_of.items():
            control.view.change(self.groups[number].pool_host(name))
        control.replan()
        for number in order:
            count = self._size_after(number, self.groups[number])
            if count != len(self.staying(number)):
                self._set(control, number, count, who, "the spec", now)
        for number in {*gone, *self.used_groups} - set(order):
            if self.staying(number):
                place = places.get(number, len(places))
                self._set(control, number, 0, who, "not in the spec any more", now, place=place)
        self._asked = {number: _size(self.groups[number]) for number in order}
        self.version += 1

    def hosts_after(self, groups: Mapping[int, FleetGroup], order: Sequence[int]) -> list[PoolHost]:
        """Return the hosts that stay and come if the fleet follows these groups."""
        return [
            groups[number].pool_host(f"{number}/{place}")
            for number in order
            for place in range(self._size_after(number, groups[number]))
        ]

    def _size_after(self, number: int, group: FleetGroup) -> int:
        count, *bounds = self._asked.get(number, (None,))
        if count != group.count:
            return group.count
        there = len(self.staying(number))
        if bounds == [group.min_count, group.max_count]:
            return there
        return min(max(there, group.min_count), group.max_count)

    # ---- one round ------------------------------------------------------------------------------

    def tick(self, control: Control, now: float) -> None:
        """Let the autoscaler decide, and remove drained hosts; call after a tick of ``control``."""
        for name in self._group_of:
            if name in control.view.observations:
                self._asked_at.pop(name, None)
            elif control.view.never_seen(name):
                self._asked_at.setdefault(name, now)
        up = {n: self._speed(n) for n in control.view.observations if n not in self._retired}
        load = self._meter.measure(control.loads.hosts, up, now, control.view.training_times.of)
        states = [] if load is None else self._states(control, now)
        step_s = 0.0 if control.training.alive is None else control.training.told.step_s
        for decision in self.autoscaler.decide(states, load, now, step_s=step_s):
            group = self.order[decision.group]
            self._set(control, group, decision.count, "autoscaler", decision.reason, now)
        for name in [n for n in self._retired if control.is_free(n, now)]:
            self._remove(control, name)
        self.scalings.advance(
            up=control.view.observations.keys(),
            there=self._group_of.keys(),
            late=[name for name in self._asked_at if self._is_stuck(name, now)],
            full=control.drain_blockers() if self._retired else (),
            now=now,
        )

    def scale(
        self, control: Control, group: int, count: int, *, who: str, now: float
    ) -> ScaleEvent:
        """Set the number of hosts of the group at a place in the spec.

        Raises ValueError that names what is wrong.
        """
        if not 0 <= group < len(self.order):
            raise ValueError(
                f"group: {group} does not exist; the spec's hosts are the groups 0 to "
                f"{len(self.order) - 1}"
            )
        number = self.order[group]
        most = self.groups[number].max_count
        if not 1 <= count <= most:
            raise ValueError(
                f"count: {count}; choose a number from 1 to {most}, hosts.{group}.max_count"
            )
        if self.groups[number].fixed:
            raise ValueError(
                f"group: {group} is a placement group of Ray, whose size cannot change; set "
                f"hosts.{group}.placement_group to none, and restart the cluster"
            )
        if count == len(self.staying(number)):
            return self.scalings.same(group, count, who, now)
        excess = len(self.staying(number)) - count
        if excess > 0:
            why = self._lack(control, self._leavers(control, number)[:excess])
            if why:
                raise ValueError(f"count: {count} hosts of group {group} are too few: {why}")
        self.autoscaler.rest(now)
        return self._set(control, number, count, who, "requested", now)

    # ---- what is shown --------------------------------------------------------------------------

    def waiting(self, name: str, now: float) -> str | None:
        """Return in words why a host is not up yet; None if it is or was."""
        since = self._asked_at.get(name)
        if since is None:
            return None
        words = f"requested {now - since:.0f} s ago"
        if self._is_stuck(name, now):
            needs = self.groups[self._group_of[name]].needs
            words += f"; no machine has had room for it yet ({needs})"
        return words

    def retired(self) -> list[str]:
        return list(self._retired)

    def report(
        self, control: Control, now: float, *, owner_age_s: float, problem: str | None
    ) -> ScalingStatus:
        """Return the status; ``problem`` is what keeps hosts from starting."""
        load = self.autoscaler.load
        return ScalingStatus(
            groups=[
                HostGroupStatus(
                    hosts=len(self.staying(number)),
                    min_hosts=group.min_count,
                    max_hosts=group.max_count,
                    cost_per_hour=group.cost_per_hour,
                )
                for number, group in ((one, self.groups[one]) for one in self.order)
            ],
            busy_fraction=None if load is None else round(load.busy, 3),
            wait_ratio=None if load is None else round(load.waiting, 3),
            leaving_hosts=list(self._retired),
            pause_reason=self.autoscaler.held or None,
            problem=problem,
            owner_age_s=round(owner_age_s, 1),
            recent=[self.scaling_report(one, control, now) for one in self.scalings.all[-_SHOWN:]],
        )

    def scaling_report(self, scaling: ScaleEvent, control: Control, now: float) -> ScalingReport:
        """Return the report on one scaling, with what is left on its leaving hosts."""
        seen = [control.view.observations.get(host) for host in scaling.leaving]
        awaited = scaling.waits_for
        leaving = control.drain_obstacles() if awaited else {}
        obstacles = {host: leaving.get(host) or self.waiting(host, now) for host in awaited}
        return scaling.report(
            now,
            remaining_replicas=sum(1 for one in seen if one is not None for _ in one.experts()),
            obstacles={host: words for host, words in obstacles.items() if words},
        )

    # ---- parts ----------------------------------------------------------------------------------

    def _set(
        self,
        control: Control,
        group: int,
        count: int,
        who: str,
        why: str,
        now: float,
        *,
        place: int | None = None,
    ) -> ScaleEvent:
        before = len(self.staying(group))
        # Hosts that are leaving may still have their experts, most likely the one retired last.
        back = [n for n in reversed(self._retired) if self._group_of[n] == group]
        back = back[: max(0, count - before)]
        for name in back:
            self._retired.remove(name)
            control.members.keep(name)
        fresh = [self._name() for _ in range(count - before - len(back))]
        for name in fresh:
            self._group_of[name] = group
            control.members.add(self.groups[group].pool_host(name))
        leavers = self._leavers(control, group)[: max(0, before - count)]
        for name in leavers:
            self._retired.append(name)
            control.members.retire(name)
        self.version += 1
        return self.scalings.begin(
            self.order.index(group) if place is None else place,
            before,
            count,
            who=who,
            why=why,
            coming=back + fresh,
            leaving=leavers,
            now=now,
        )

    def _remove(self, control: Control, name: str) -> None:
        control.members.remove(name)
        self._retired.remove(name)
        self._asked_at.pop(name, None)
        del self._group_of[name]
        self.version += 1

    def _leavers(self, control: Control, group: int) -> list[str]:
        """Return a group's hosts in the order in which they should leave, the cheapest first.

        First come hosts that are not up, then drained ones, then those with the fewest experts and
        trained tensors; among equals the newest.
        """
        ages = {name: age for age, name in enumerate(self._group_of)}

        def cost(name: str) -> tuple[bool, bool, int, int]:
            seen = control.view.observations.get(name)
            held = 0 if seen is None else sum(1 for _ in seen.experts()) + seen.owned
            drained = name in control.constraints.leaving
            return seen is not None, not drained, held, -ages[name]

        return sorted(self.staying(group), key=cost)

    def _lack(self, control: Control, leavers: Sequence[str]) -> str:
        """Return why these hosts cannot leave; empty if they can."""
        left = [
            host
            for name, host in control.view.hosts.items()
            if name not in (*leavers, *self._retired) and name not in control.constraints.leaving
        ]
        redundancy = control.policy.balance.redundancy
        lack = capacity_shortage(left, list(control.models.values()), redundancy=redundancy)
        return lack or control.members.training_shortage(control.training, leavers)

    def _states(self, control: Control, now: float) -> list[GroupState]:
        found = []
        for number in self.order:
            group, names = self.groups[number], self.staying(number)
            pending = [name for name in names if name in self._asked_at]
            found.append(
                GroupState(
                    min_count=group.min_count,
                    max_count=group.max_count,
                    cost_per_hour=group.cost_per_hour,
                    speed=group.speed,
                    up=len(names) - len(pending),
                    pending=len(pending),
                    stuck=sum(self._is_stuck(name, now) for name in pending),
                    leaving=sum(self._group_of[name] == number for name in self._retired),
                    keep=self._lack(control, self._leavers(control, number)[:1])
                    if group.min_count < group.max_count
                    else "",
                )
            )
        return found

    def _is_stuck(self, name: str, now: float) -> bool:
        return now - self._asked_at.get(name, now) >= self.pending_s

    def _speed(self, name: str) -> float:
        return self.groups[self._group_of[name]].speed

    def _name(self) -> str:
        self._next += 1
        return f"host-{self._next - 1}"


def _size(group: FleetGroup) -> tuple[int, int, int]:
    return group.count, group.min_count, group.max_count
