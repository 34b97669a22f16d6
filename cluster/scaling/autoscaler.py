"""The autoscaler decides from how busy hosts are how many a pool should have.

It adds hosts when they are too busy, or when calls wait longer than they are computed. It removes a
host when the others could do the work and stay below the middle between ``low`` and
``scale_up_above``. This gap is the hysteresis: a decision cannot cause the opposite one. Both
conditions must last for a while, and a pause follows each decision.

A training run keeps hosts busy in a part of each step only. So what it asks for must last for whole
steps, and before the first step is done nothing is known of it.

The clock and all observations are arguments. `cluster/scaling/fleet.py` chooses which host leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..load.meter import HostTimes

# Routers report the hosts' times about once a second.
_WINDOW_S = 2.0
# Hosts are idle in a run if they are so for as long as so many of its steps take.
_IDLE_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePolicy:
    """When hosts are added and removed; "busy" is the fraction of time in which a host computes."""

    scale_up_above: float = 0.75
    scale_down_below: float = 0.35
    up_after_s: float = 15.0
    down_after_s: float = 120.0
    cooldown_s: float = 60.0
    max_cost_per_hour: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale_down_below < self.scale_up_above <= 1:
            raise ValueError(
                f"low, high: {self.scale_down_below}, {self.scale_up_above}; 0 < low < high <= 1"
            )

    @property
    def target_busy(self) -> float:
        """How busy hosts should be after a decision."""
        return (self.scale_down_below + self.scale_up_above) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """A group of identical hosts; those that leave count only in ``leaving``."""

    min_count: int
    max_count: int
    cost_per_hour: float
    speed: float
    up: int
    pending: int = 0
    stuck: int = 0  # pending hosts that no machine has had room for
    leaving: int = 0
    keep: str = ""  # why no host may leave; empty if one may

    @property
    def count(self) -> int:
        return self.up + self.pending

    @property
    def scales(self) -> bool:
        return self.min_count != self.max_count


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """The load of the hosts that are up, over the last seconds."""

    busy: float  # mean fraction of time in which they compute, weighted by speed
    waiting: float  # time that calls wait / time of the computations that they are part of


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of hosts that a group should have."""

    group: int
    count: int
    reason: str


class BusyMeter:
    """Computes from the sums that routers report how busy hosts are."""

    def __init__(self) -> None:
        self._before: dict[str, HostTimes] = {}
        self._since: float | None = None

    def measure(
        self,
        totals: Mapping[str, HostTimes],
        speeds: Mapping[str, float],
        now: float,
        trained_s: Callable[[str], float] = lambda _: 0.0,
    ) -> PoolLoad | None:
        """Return the load of the hosts in ``speeds`` since the last measurement.

        ``totals``, and ``trained_s`` of each host, are sums that only grow: what routers report,
        and how long hosts have worked for training runs besides. Returns None if the last
        measurement is too recent.
        """
        if self._since is not None and now - self._since < _WINDOW_S:
            return None
        before, since = self._before, self._since
        # Of all hosts: one that leaves now may be kept before the next look.
        hosts = totals.keys() | speeds.keys()
        self._before = {host: _reading(totals, host, trained_s) for host in hosts}
        self._since = now
        if since is None or not speeds:
            return None
        work = queued_s = batch_s = 0.0
        for host, speed in speeds.items():
            new, old = self._before[host], before.get(host, HostTimes())
            host_busy_s = max(0.0, new.busy_s - old.busy_s)
            # A report may contain computations from before this window, hence the limit of 1.
            work += speed * min(1.0, host_busy_s / (now - since))
            # Waits are compared with whole batches: a call that waits for one batch like its own
            # has a ratio of 1, however many calls share the batch.
            batch_s += max(0.0, new.batch_s - old.batch_s)
            queued_s += max(0.0, new.queued_s - old.queued_s)
        return PoolLoad(work / sum(speeds.values()), queued_s / batch_s if batch_s else 0.0)


def _reading(
    totals: Mapping[str, HostTimes], host: str, trained_s: Callable[[str], float]
) -> HostTimes:
    """Return a host's sums, with all that it has worked for training runs in ``busy_s``."""
    times = totals.get(host, HostTimes())
    busy_s = times.busy_s + times.lent_s + trained_s(host)
    return HostTimes(queued_s=times.queued_s, busy_s=busy_s, batch_s=times.batch_s)


@dataclass(slots=True)
class _Mark:
    """A smoothed value, and since when a condition on it holds without a break."""

    after_s: float
    value: float | None = None
    since: float | None = None
    _at: float = 0.0

    def note(self, value: float, now: float) -> float:
        if self.value is None or self.after_s <= 0:
            self.value = value
        else:
            # Exponential smoothing; half of `after_s` is its time constant.
            part = 1 - math.exp(-(now - self._at) / (self.after_s / 2))
            self.value += part * (value - self.value)
        self._at = now
        return self.value

    def lasts(self, true: bool, now: float, least_s: float = 0.0) -> bool:
        """Return whether a condition has held for ``after_s``, and for at least ``least_s``."""
        if not true:
            self.since = None
            return False
        self.since = now if self.since is None else self.since
        return now - self.since >= max(self.after_s, least_s)

    def reset(self) -> None:
        self.value = self.since = None


class Autoscaler:
    """Decides from observations how many hosts each group should have."""

    def __init__(self, policy: ScalePolicy) -> None:
        self.policy = policy
        self.held = ""  # why nothing is changed although the load asks for it
        self.load: PoolLoad | None = None
        self._up = _Mark(policy.up_after_s)
        self._down = _Mark(policy.down_after_s)
        self._waits = _Mark(policy.up_after_s)
        self._rest_until = -math.inf

    def follow(self, policy: ScalePolicy) -> None:
        """Decide by another policy from now on."""
        self.policy = policy
        self._up.after_s = self._waits.after_s = policy.up_after_s
        self._down.after_s = policy.down_after_s

    def rest(self, now: float) -> None:
        """Pause after any change of the number of hosts, to observe its effect first."""
        self._rest_until = now + self.policy.cooldown_s
        for mark in (self._up, self._down, self._waits):
            mark.reset()

    def decide(
        self,
        groups: Sequence[GroupState],
        load: PoolLoad | None,
        now: float,
        *,
        step_s: float | None = 0.0,
    ) -> list[Decision]:
        """Return what to change now, usually nothing; ``load`` is None if nothing was measured.

        ``step_s`` is how long a training step takes; None: it is unknown yet. 0: there is no run.
        """
        if load is None or not any(group.scales for group in groups):
            return []
        self.load = load
        if step_s is None:
            self.held = "the training run has not done a step yet"
            return []
        busy = self._up.note(load.busy, now)
        calm = self._down.note(load.busy, now)
        waiting = self._waits.note(load.waiting, now)
        # Waiting calls ask for hosts only if hosts are not nearly idle; a few calls that happen to
        # collide on an idle pool are no reason to grow.
        queues = waiting > 1 and busy > self.policy.scale_down_below
        # Calls that wait may be those of others than the run, which does not excuse them.
        queued = self._waits.lasts(queues, now)
        hot = self._up.lasts(busy >= self.policy.scale_up_above or queues, now, step_s) or queued
        idle = self._down.lasts(
            calm <= self.policy.scale_down_below and not queues, now, _IDLE_STEPS * step_s
        )
        self.held = ""
        if now < self._rest_until:
            return []
        decisions: list[Decision] = []
        if hot:
            why = (
                f"hosts are {busy:.0%} busy, above {self.policy.scale_up_above:.0%}"
                if busy >= self.policy.scale_up_above
                else f"calls wait {waiting:.1f} times as long as their computation takes"
            )
            decisions = self._grow(
                groups, busy, f"{why}, for {now - (self._up.since or now):.0f} s"
            )
        elif idle:
            why = f"hosts are {calm:.0%} busy, below {self.policy.scale_down_below:.0%}"
            why += f", for {now - (self._down.since or now):.0f} s"
            decisions = self._shrink(groups, calm, why)
        if decisions:
            self.rest(now)
        return decisions

    def _grow(self, groups: Sequence[GroupState], busy: float, why: str) -> list[Decision]:
        counts = [group.count for group in groups]
        # Speeds: `capacity` is that of hosts that are up or coming, `needed` is what makes them
        # `aim` busy. Stuck hosts do not count, so that another group can grow in their place.
        capacity = sum((g.count - g.stuck) * g.speed for g in groups)
        needed = busy * sum(g.up * g.speed for g in groups) / self.policy.target_busy
        if capacity >= needed and any(g.pending > g.stuck for g in groups):
            self.held = "enough hosts are already starting"
            return []
        cost = sum((g.count + g.leaving) * g.cost_per_hour for g in groups)
        limit = self.policy.max_cost_per_hour
        added = 0
        for index in sorted(range(len(groups)), key=lambda i: _cost(groups[i])):
            group = groups[index]
            # At most double the pool in one decision: saturated hosts measure as 100 % busy, which
            # does not show how many more are needed.
            while group.scales and counts[index] < group.max_count and not group.stuck:
                if added and (capacity >= needed or added >= sum(g.count for g in groups)):
                    break
                if limit is not None and cost + group.cost_per_hour > limit:
                    break
                counts[index] += 1
                added += 1
                capacity += group.speed
                cost += group.cost_per_hour
        if not added:
            dear = "" if limit is None else f", or one more host costs more than {limit:g} an hour"
            self.held = f"{why}; all groups are at their max_count or wait for machines{dear}"
        return [
            Decision(index, count, why)
            for index, count in enumerate(counts)
            if count != groups[index].count
        ]

    def _shrink(self, groups: Sequence[GroupState], busy: float, why: str) -> list[Decision]:
        if any(group.leaving for group in groups):
            return []  # one host at a time, so that the effect of each drain is seen
        capacity = sum(g.up * g.speed for g in groups)
        kept = ""
        for index in sorted(range(len(groups)), key=lambda i: -_cost(groups[i])):
            group = groups[index]
            if not group.scales or group.count <= group.min_count:
                continue
            if group.keep:
                kept = group.keep
                continue
            # Hosts that are not up leave first, and `capacity` does not contain them.
            left = capacity - (group.speed if not group.pending else 0.0)
            if left <= 0 or busy * capacity / left > self.policy.target_busy:
                continue
            return [Decision(index, group.count - 1, why)]
        self.held = f"{why}; {kept}" if kept else ""
        return []


def _cost(group: GroupState) -> float:
    return group.cost_per_hour / group.speed
