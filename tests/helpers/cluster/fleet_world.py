"""Hosts that come and go as a `Fleet` wants them, around the controller's state machine."""

from __future__ import annotations

import json

from moesaic.cluster.control.control import Control
from moesaic.cluster.expert_keys import ExpertVersion
from moesaic.cluster.placement import ModelShape
from moesaic.cluster.planner.plan import FleetGroup
from moesaic.cluster.scaling.autoscaler import ScalePolicy
from moesaic.cluster.scaling.fleet import Fleet
from tests.helpers.cluster.control_world import POLICY, ControlWorld, SimHost, shape

# Only hands scale, where a test does not say otherwise.
BY_HAND = ScalePolicy(up_after_s=1e9, down_after_s=1e9)
PENDING_S = 60.0


class FleetWorld(ControlWorld):
    """Starts and ends hosts as a `Fleet` wants them."""

    def __init__(
        self,
        groups: list[FleetGroup],
        models: list[tuple[ModelShape, bool]],
        *,
        scale: ScalePolicy = BY_HAND,
    ) -> None:
        self.groups = groups
        self.scale_policy = scale
        self.kept: str | None = None
        self.machines_come = True
        self.started: list[str] = []
        self.late: frozenset[str] = frozenset()
        super().__init__(0, models)
        self.start_hosts()

    def new_control(self) -> Control:
        self.fleet = Fleet(
            self.groups,
            self.scale_policy,
            pending_s=PENDING_S,
            kept=json.loads(self.kept) if self.kept else None,
        )
        control = Control(self.fleet.pool_hosts(), term=self.term, policy=self.policy)
        self.fleet.take_over(control)
        return control

    def start_hosts(self) -> None:
        """What the cluster's owner does."""
        self.kept = json.dumps(self.fleet.snapshot())
        desired = self.fleet.desired()
        for name in self.hosts.keys() - desired.keys():
            self._end(name)
        for name in sorted(desired.keys() - self.hosts.keys()) if self.machines_come else ():
            assert name not in self.started, "a name is used again"
            self.started.append(name)
            self.hosts[name] = SimHost(name)

    def _end(self, name: str) -> None:
        host = self.hosts.pop(name)
        last = self.reported.pop(name, None)
        for key in last.experts() if last is not None else ():
            # As when it is frozen and cannot forget.
            assert any(seen.holds(ExpertVersion(key, 1)) for seen in self.reported.values()), (
                "the last replica"
            )
        if last == host.observe():
            assert self.late or not host.held, "ended with experts on it"
        for router in self.routers.values():
            if router.follows is not None and self.now - router.heard_at <= POLICY.lease_s:
                assert name not in router.follows.hosts, "ended under a router that knows it"

    def tick(self, late: frozenset[str] = frozenset(), seconds: float = 0.5) -> bool:
        size = self.fleet.version
        self.late = late
        acted = super().tick(late, seconds)
        self.fleet.tick(self.control, self.now)
        self.start_hosts()
        return acted or self.fleet.version != size

    def scale(self, count: int, group: int = 0) -> list[str]:
        """Gives the hosts that leave."""
        scaling = self.fleet.scale(self.control, group, count, who="test", now=self.now)
        self.start_hosts()
        return scaling.leaving

    def finish(self, rounds: int = 60) -> None:
        for _ in range(rounds):
            self.tick()
            for name in self.routers:
                self.report(name)
            for name, host in list(self.hosts.items()):
                while host.loading:
                    self.load_one(name)


def group(count: int = 2, **more: object) -> FleetGroup:
    values = {"count": count, "min_count": 1, "max_count": 6}
    return FleetGroup(**(values | more))  # pyright: ignore[reportArgumentType]


def started(*groups: FleetGroup, replicas: int = 1, **more: object) -> FleetWorld:
    models = [(shape("m", replicas=replicas), True)]
    world = FleetWorld(list(groups) or [group()], models, **more)  # pyright: ignore[reportArgumentType]
    world.finish()
    assert world.published
    return world


def stage(world: FleetWorld) -> str:
    return world.fleet.scalings.all[-1].phase
