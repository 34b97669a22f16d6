"""Which hosts a pool has, by name: what operators and the autoscaler want, and how far it is.

`Fleet` decides and never starts or ends a host itself: the process that owns the cluster asks for
`desired` and does it. A host that leaves stays desired until it is drained and no router knows it.
Growing again takes back hosts that are on their way out before it names new ones; the number in a
new name was never used before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..planner.capacity import lack
from ..planner.plan import FleetGroup, PoolHost
from .autoscaler import Autoscaler, BusyMeter, GroupState, ScalePolicy
from .scale_events import Scaling, Scalings

if TYPE_CHECKING:
    from ..control.control import Control

_SHOWN = 10


class Fleet:
    """The hosts of one `Control`."""

    def __init__(
        self,
        groups: Sequence[FleetGroup],
        policy: ScalePolicy,
        *,
        pending_s: float,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        """``kept`` is what `keep` gave another controller; a host that is not up after
        ``pending_s`` waits for room that nobody has, and is shown so."""
        self.groups = tuple(groups)
        self.autoscaler = Autoscaler(policy)
        self.scalings = Scalings()
        self.version = 0  # grows when `keep` gives something new
        self._pending_s = pending_s
        self._meter = BusyMeter()
        self._group_of: dict[str, int] = {}
        self._retired: list[str] = []
        self._asked_at: dict[str, float] = {}  # hosts that are not up yet
        self._next = 0
        if kept:
            self._group_of = {name: int(group) for name, group in kept["hosts"].items()}
            self._retired = list(kept["retired"])
            self._next = int(kept["next"])
        else:
            for index, group in enumerate(groups):
                for _ in range(group.count):
                    self._group_of[self._name()] = index

    def pool_hosts(self) -> list[PoolHost]:
        """All hosts, for a new `Control`."""
        return [self.groups[group].pool_host(name) for name, group in self._group_of.items()]

    def take_over(self, control: Control) -> None:
        """Tell a new `Control` which of its hosts are on their way out."""
        for name in self._retired:
            control.retire_host(name)

    def desired(self) -> dict[str, int]:
        """The group of every host that there should be now."""
        return dict(self._group_of)

    def keep(self) -> dict[str, Any]:
        """For a controller that starts anew, as plain values."""
        return {"hosts": self._group_of, "retired": self._retired, "next": self._next}

    def staying(self, group: int) -> list[str]:
        return [n for n, g in self._group_of.items() if g == group and n not in self._retired]

    # ---- one round ------------------------------------------------------------------------------

    def tick(self, control: Control, now: float) -> None:
        """Behind a tick of ``control``: let the autoscaler decide, and hosts go that are free."""
        for name in self._group_of:
            if name in control.view.seen:
                self._asked_at.pop(name, None)
            elif control.view.never_seen(name):
                self._asked_at.setdefault(name, now)
        up = {n: self._speed(n) for n in control.view.seen if n not in self._retired}
        load = self._meter.measure(control.loads.hosts, up, now)
        states = [] if load is None else self._states(control, now)
        for decision in self.autoscaler.decide(states, load, now):
            self._set(control, decision.group, decision.count, "autoscaler", decision.reason, now)
        for name in [n for n in self._retired if control.is_free(n, now)]:
            self._remove(control, name)
        self.scalings.advance(
            up=control.view.seen.keys(),
            there=self._group_of.keys(),
            late=[name for name in self._asked_at if self._is_stuck(name, now)],
            full=control.no_room() if self._retired else (),
            now=now,
        )

    def scale(self, control: Control, group: int, count: int, *, who: str, now: float) -> Scaling:
        """Give a group ``count`` hosts. Raises ValueError that names what is wrong."""
        if not 0 <= group < len(self.groups):
            raise ValueError(f"group: {group} is not in 0 to {len(self.groups) - 1}")
        most = self.groups[group].max_count
        if not 1 <= count <= most:
            raise ValueError(f"count: {count} is not in 1 to {most}, hosts.{group}.max_count")
        if self.groups[group].fixed:
            raise ValueError(f"group: {group} is a placement group (spread), which is fixed")
        if count == len(self.staying(group)):
            return self.scalings.same(group, count, who, now)
        excess = len(self.staying(group)) - count
        if excess > 0:
            why = self._lack(control, self._leavers(control, group)[:excess])
            if why:
                raise ValueError(f"count: {count} hosts of group {group} are too few: {why}")
        self.autoscaler.rest(now)
        return self._set(control, group, count, who, "asked for", now)

    # ---- what is shown --------------------------------------------------------------------------

    def waiting(self, name: str, now: float) -> str | None:
        """Why a host is not up yet, in words; None if it is, or was."""
        since = self._asked_at.get(name)
        if since is None:
            return None
        words = f"asked for {now - since:.0f} s ago"
        if self._is_stuck(name, now):
            needs = self.groups[self._group_of[name]].needs
            words += f"; no machine has had room for it yet ({needs})"
        return words

    def retired(self) -> list[str]:
        return list(self._retired)

    def describe(self, now: float) -> dict[str, Any]:
        """Plain values for people and JSON."""
        load = self.autoscaler.load
        return {
            "groups": [
                {
                    "hosts": len(self.staying(index)),
                    "min": group.min_count,
                    "max": group.max_count,
                    "cost_per_hour": group.cost_per_hour,
                }
                for index, group in enumerate(self.groups)
            ],
            "busy": None if load is None else round(load.busy, 3),
            "waiting": None if load is None else round(load.waiting, 3),
            "leaving": list(self._retired),
            "held": self.autoscaler.held,
            "events": [one.describe(now) for one in self.scalings.all[-_SHOWN:]],
        }

    # ---- parts ----------------------------------------------------------------------------------

    def _set(
        self, control: Control, group: int, count: int, who: str, why: str, now: float
    ) -> Scaling:
        before = len(self.staying(group))
        # Those taken back have their experts still: the last to be drained first.
        back = [n for n in reversed(self._retired) if self._group_of[n] == group]
        back = back[: max(0, count - before)]
        for name in back:
            self._retired.remove(name)
            control.keep_host(name)
        fresh = [self._name() for _ in range(count - before - len(back))]
        for name in fresh:
            self._group_of[name] = group
            control.add_host(self.groups[group].pool_host(name))
        leavers = self._leavers(control, group)[: max(0, before - count)]
        for name in leavers:
            self._retired.append(name)
            control.retire_host(name)
        self.version += 1
        return self.scalings.begin(
            group, before, count, who=who, why=why, coming=back + fresh, leaving=leavers, now=now
        )

    def _remove(self, control: Control, name: str) -> None:
        control.remove_host(name)
        self._retired.remove(name)
        self._asked_at.pop(name, None)
        del self._group_of[name]
        self.version += 1

    def _leavers(self, control: Control, group: int) -> list[str]:
        """A group's hosts, those first whose leaving costs least: not up, drained already, with
        the fewest experts; among equals the newest."""
        ages = {name: age for age, name in enumerate(self._group_of)}

        def cost(name: str) -> tuple[bool, bool, int, int]:
            seen = control.view.seen.get(name)
            experts = 0 if seen is None else sum(1 for _ in seen.experts())
            drained = name in control.wishes.leaving
            return seen is not None, not drained, experts, -ages[name]

        return sorted(self.staying(group), key=cost)

    def _lack(self, control: Control, leavers: Sequence[str]) -> str:
        """Why these cannot leave."""
        left = [
            host
            for name, host in control.view.hosts.items()
            if name not in (*leavers, *self._retired) and name not in control.wishes.leaving
        ]
        redundancy = control.policy.balance.redundancy
        return lack(left, list(control.models.values()), redundancy=redundancy)

    def _states(self, control: Control, now: float) -> list[GroupState]:
        found = []
        for index, group in enumerate(self.groups):
            names = self.staying(index)
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
                    leaving=sum(self._group_of[name] == index for name in self._retired),
                    keep=self._lack(control, self._leavers(control, index)[:1])
                    if group.min_count < group.max_count
                    else "",
                )
            )
        return found

    def _is_stuck(self, name: str, now: float) -> bool:
        return now - self._asked_at.get(name, now) >= self._pending_s

    def _speed(self, name: str) -> float:
        return self.groups[self._group_of[name]].speed

    def _name(self) -> str:
        self._next += 1
        return f"host-{self._next - 1}"
