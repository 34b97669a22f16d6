"""Reports on the number of hosts."""

from __future__ import annotations

from .report import OpenEnum, Report


class ScalingPhase(OpenEnum):
    """How far a scaling is, or how it ended."""

    STARTING = "starting"  # new hosts are starting
    DRAINING = "draining"  # experts are moved off hosts that are to leave
    DONE = "done"
    # New hosts wait for machines, or experts of leaving hosts for room elsewhere.
    NO_ROOM = "no_room"
    SUPERSEDED = "superseded"  # the same group was scaled again before this was done


class ScalingReport(Report):
    """A change of the number of hosts of a group, with its progress."""

    id: int
    """The number of the scaling."""
    group: int
    """The index of the group in the spec's `hosts`."""
    initiator: str
    """Who began it: a user's name, or `autoscaler`."""
    reason: str
    """Why, in words."""
    hosts_before: int
    """Hosts of the group before."""
    target_hosts: int
    """Hosts that the group is to have."""
    arriving_hosts: list[str]
    """Hosts that it starts, or takes back."""
    leaving_hosts: list[str]
    """Hosts that it drains and ends."""
    awaited_hosts: list[str]
    """Those of both lists that have yet to arrive or leave."""
    phase: ScalingPhase
    """How far it is, or how it ended."""
    age_s: float
    """Time since the scaling began."""
    duration_s: float | None
    """How long the scaling took; null while it is under way."""
    remaining_replicas: int
    """Replicas that the leaving hosts still hold."""
    obstacles: dict[str, str]
    """What an awaited host waits for, in words, by host."""

    @property
    def under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self.phase in (ScalingPhase.STARTING, ScalingPhase.DRAINING)


class HostGroupStatus(Report):
    """A group of identical hosts, one of the spec's `hosts`."""

    hosts: int
    """Hosts now, without those that leave."""
    min_hosts: int
    """Smallest number of hosts that the autoscaler keeps."""
    max_hosts: int
    """Largest number of hosts that the group may have."""
    cost_per_hour: float
    """Cost of one host, from the spec."""


class ScalingStatus(Report):
    """The number of hosts, and the autoscaler."""

    groups: list[HostGroupStatus]
    """The groups, in the order of the spec."""
    busy_fraction: float | None
    """Mean fraction of time in which hosts compute, weighted by speed; null before it is known."""
    wait_ratio: float | None
    """Time that calls wait / time that their batches take; null before it is known."""
    leaving_hosts: list[str]
    """Hosts that end when they are empty."""
    pause_reason: str | None
    """Why the autoscaler does nothing although it would, in words."""
    problem: str | None
    """What keeps hosts from starting, in words."""
    owner_age_s: float
    """Time since the controller's thread that starts and ends hosts last asked which there should
    be."""
    recent: list[ScalingReport]
    """The last scalings, the newest at the end."""
