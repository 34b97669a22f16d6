"""The controller's state machine: reports go in; loads, placements and evictions come out.

It keeps one *target*, a plan's layers, and takes the pool there: replicas that the target names and
nobody holds are loaded; what is ready is published, with what stood before in the place of what is
not; replicas that neither the target nor the published placement names are evicted once every live
router has acknowledged a placement without them, or its lease has ended.

It decides by what hosts really hold, never by what it asked for, so a controller that starts anew
picks up where the last one ended, and a load that fails or hangs changes nothing that is shown.

No Ray, and the clock is an argument: `actors/controller/controller.py` brings both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..load.meter import LoadReport
from ..load.tracker import LoadTracker
from ..placement import (
    ExpertKey,
    LayerKey,
    LayerPlacement,
    ModelShape,
    Number,
    Placement,
    every_expert,
)
from ..planner.capacity import with_room
from ..planner.plan import Plan, PoolHost, Wishes
from .change_impact import EffectMeter
from .changes import Change, Changes
from .commands import Command, Evict, MakePlan, Publish
from .host_speed import slowed
from .idle_models import Sleep
from .loading import Loader
from .membership import Members
from .policy import ControlPolicy, Rhythm
from .pool_view import Observation, View
from .publishing import Publisher

# A plan without moves is taken for its shares if some layer gains so much.
_WORTH = 0.02
# For how long a new host is taken to stay: what it loads pays.
_FOR_GOOD_S = 1e9


class Control(Members):
    """The one writer of placements."""

    def __init__(
        self, hosts: Sequence[PoolHost], *, term: int, policy: ControlPolicy | None = None
    ) -> None:
        self.policy = policy or ControlPolicy()
        self.view = View(hosts, gone_s=self.policy.gone_s)
        self.publisher = Publisher(self.view, term=term, lease_s=self.policy.lease_s)
        self.loader = Loader(
            self.view,
            bytes_per_s=self.policy.bytes_per_s,
            batch_bytes=self.policy.batch_bytes,
            retry_s=self.policy.retry_s,
        )
        self.loads = LoadTracker()
        self.changes = Changes()
        self.effects = EffectMeter(self.policy.every_s, self.policy.balance.fan_out)
        # What operators want; planned for at the next tick.
        self.wishes = Wishes()
        # Experts for which no host has room.
        self.unplaced: tuple[ExpertKey, ...] = ()
        self.models: dict[str, ModelShape] = {}
        self.sleep = Sleep()
        self._target: dict[LayerKey, LayerPlacement] | None = None
        self._target_version = 0
        self._wanted: dict[str, list[ExpertKey]] = {}
        self._parts: dict[str, float] = {}
        self._parts_for: object = None
        self._asked: MakePlan | None = None
        self._published_for: object = None
        self._nothing_pending = False
        self._planned_for: object = None  # hosts, models and wishes of the target
        self._planned_windows = 0
        self.planned_at: float | None = None  # when the planner last looked
        self._now: float | None = None
        self._rhythm = Rhythm(self.policy.every_s)

    # ---- what others say ------------------------------------------------------------------------

    def add_model(self, shape: ModelShape, *, on_disk: bool) -> None:
        """Serve a model from now on. Raises ValueError when it cannot be placed."""
        if not 1 <= shape.replicas <= len(self.view.hosts):
            raise ValueError(
                f"models.{shape.model}.replicas: {shape.replicas} replicas of an expert need as "
                f"many hosts, and there are {len(self.view.hosts)}"
            )
        before = dict(self.models)
        self.models[shape.model] = shape
        if self._target is not None and self._now is not None:
            found = self.plan_for(self._now, budget=0).run()
            lacking = [key for key in found.unplaced if key.model == shape.model]
            if lacking:
                self.models = before
                raise ValueError(
                    f"models.{shape.model}: {len(lacking)} of its experts find no room; give "
                    "hosts more slots or memory, or add hosts"
                )
            self._adopt(found, self._now)
        if on_disk:
            self.loader.on_disk.add(shape.model)

    def hear(self, report: LoadReport, now: float) -> None:
        """A router says what it counted and which placement it follows."""
        self.loads.hear(report)
        self.sleep.hear(report, now)
        self.publisher.acknowledged(report.router, report.number, now)

    def load_failed(self, host: str, keys: Sequence[ExpertKey], error: str, now: float) -> None:
        """A load ended without its replicas. Another source is tried next; a replica that fails
        again is taken back out of the target, if its expert can do without."""
        for key in self.loader.failed(host, keys, now):
            if self.view.holders(key):
                self._give_up(key, host)
                self._rhythm.rest(now)
                self.changes.failed(f"{key} on {host}: {error}", now)

    # ---- what others ask ------------------------------------------------------------------------

    @property
    def number(self) -> Number:
        return self.publisher.number

    @property
    def placement(self) -> Placement | None:
        return self.publisher.placement

    @property
    def settled(self) -> bool:
        """Whether hosts have reported and a first plan was made."""
        return self._target is not None

    def is_quiet(self, now: float) -> bool:
        """Whether a tick without new reports would do nothing, leases that end and the balancer's
        regular look aside."""
        settled = self._nothing_pending and self._asked is None
        return settled and self.state == self._published_for and self._planned_for == self._key(now)

    def unprotected(self) -> list[ExpertKey]:
        """Experts that the loss of one failure domain would take away."""
        return [key for key in every_expert(self._awake()) if len(self.view.domains(key)) == 1]

    def staying(self, now: float) -> list[PoolHost]:
        """Hosts that are to hold experts."""
        return [self.view.hosts[name] for name in sorted(self.view.usable(now) - self.leaving)]

    def pending(self) -> int:
        """Replicas that the target names and that are still to come."""
        return sum(len(self.loader.lacking(h, self.wanted(h))) for h in self.view.hosts)

    # ---- one round ------------------------------------------------------------------------------

    def tick(self, reports: Mapping[str, Observation | None], now: float) -> list[Command]:
        """One round. A host that is missing from ``reports`` did not answer in time and is left
        as it was, routers see for themselves; None stands for a host that Ray says is gone."""
        # Step 1: take note of who lives, and of the load.
        self._now = now
        self.view.note(reports, now)
        self.loads.advance(now)
        self.sleep.advance(
            self.models.values(),
            on_disk=self.loader.on_disk,
            appeared=self.publisher.appeared,
            now=now,
        )
        # Step 2: plan anew where the last plan does not fit any more, or balance.
        commands: list[Command] = self._replan(now)
        target = self._target if self._target is not None else self._standing()
        # Step 3: let hosts get what they lack.
        idle = [h for h, seen in self.view.seen.items() if h in reports and not seen.loading]
        appeared = [model for model in self.models if self.publisher.appeared(model)]
        for host in idle:
            load = self.loader.next(
                host, self.wanted(host), models=self.models, appeared=appeared, now=now
            )
            commands += [load] if load is not None else []
        # Step 4: publish what is ready, if it is not what was published last.
        if self.state != self._published_for:
            placement = self.publisher.publish(target, self.models)
            commands += [Publish(placement=placement)] if placement is not None else []
            self._published_for = self.state
            self._nothing_pending = not self.pending()
        # Step 5: let hosts forget what no router can ask for any more.
        if self._target is not None:
            evictable = self.publisher.evictable(target, now, self.sleep.asleep)
            for host in [host for host in idle if host in evictable]:
                commands.append(Evict(host=host, keys=tuple(evictable[host])))
                self.view.forget(host, evictable[host])
            if self._nothing_pending:
                self.changes.done(now)
        # Step 6: measure what the last change brought.
        last = self.changes.find(None)
        self.effects.tick(last, self.placement, self.loads, self.staying(now), now)
        return commands

    # ---- step 2: the target ---------------------------------------------------------------------

    def _replan(self, now: float) -> list[Command]:
        usable = self.view.usable(now)
        started = self._target is not None or usable <= self.view.seen.keys()
        if self._asked is not None or not started or not usable - self.leaving:
            return []  # a plan is being made, hosts are to come, or all leave: what stands goes on
        if self._planned_for != self._key(now):
            self._asked = self.plan_for_all(now)
        elif (
            self.policy.auto
            and self._nothing_pending
            and self._rhythm.is_due(now, self.loads.shifted_at)
        ):
            self._rhythm.looked(now)
            # Without any load since the last plan the same would be best again.
            if self.loads.windows != self._planned_windows:
                self._planned_windows = self.loads.windows
                self._asked = self.plan_for(now)
        return [] if self._asked is None else [self._asked]

    def planned(self, asked: MakePlan, found: Plan | None, now: float) -> None:
        """The planner's answer to a `MakePlan`; None if it failed."""
        self._asked = None
        if found is None or not self.fits(asked, now):
            return  # the next tick asks anew
        if asked.balance:
            gain = max((found.after[k] - found.before[k] for k in found.after), default=0.0)
            if found.moves or gain > _WORTH:
                self.apply(found, now, who="balancer", why="load")
        elif self._target is not None and found.moves:
            self.apply(found, now, who="controller", why="hosts, models or wishes")
        else:
            self._adopt(found, now)

    def fits(self, asked: MakePlan, now: float) -> bool:
        """Whether nothing has changed that a plan was asked for."""
        return (asked.key, asked.version) == (self._key(now), self._target_version)

    def plan_for_all(self, now: float) -> MakePlan:
        """The question how everything can be placed as it has to be, whatever the balance."""
        return self.plan_for(now, budget=0, fill=self._unused())

    def plan_for(self, now: float, *, budget: int | None = None, fill: int = 0) -> MakePlan:
        """The question what would be best now; ``budget`` is that of moves for balance, the
        policy's part of all replicas if it is not given. With ``fill``, so many new hosts are
        to get their part, whether it pays or not."""
        self.planned_at = now
        rate = self.loads.choices_per_busy_s()
        hosts = with_room(
            [self.view.hosts[name] for name in sorted(self.view.usable(now))],
            self.models.values(),
            redundancy=self.policy.balance.redundancy,
            leaving=self.leaving,
            held={name: len(self.wanted(name)) for name in self.view.hosts},
        )
        self.loader.slots = {host.name: host.slots for host in hosts if host.slots is not None}
        most = self._budget() if budget is None else budget
        policy = replace(
            self.policy.balance,
            # Without a measure of the hosts' work nothing can be said to pay.
            budget=most if rate is not None else 0,
            load_bytes_per_s=self.policy.bytes_per_s,
        )
        if fill:
            # Of many hosts an idle one costs little balance; it would be left as it is.
            even = max(policy.target, 1 - 0.25 / len(hosts))
            part = math.ceil(self._replicas() / len(hosts)) * fill
            policy = replace(policy, budget=part, enough=even, target=even, horizon_s=_FOR_GOOD_S)
        return MakePlan(
            models=self._awake(),
            hosts=[
                replace(host, speed=host.speed * (rate or 1.0))
                for host in slowed(hosts, self.parts())
            ],
            current=dict(self._target) if self._target is not None else self._standing(),
            loads=self.loads.forecast(),
            policy=policy,
            wishes=replace(self.wishes, leaving=self.leaving),
            key=self._key(now),
            version=self._target_version,
            balance=budget is None,
        )

    def apply(self, found: Plan, now: float, *, who: str, why: str) -> Change:
        """Take the pool to a plan."""
        change = self.changes.begin(found, self._target or {}, now, who=who, why=why)
        self._adopt(found, now)
        return change

    def roll_back(self, change: Change, now: float) -> None:
        """Back to the target from before a change; what does not fit any more is planned anew."""
        self._aim(dict(change.layers_before))
        self._planned_for = None
        self._rhythm.rest(now)
        self.changes.rolled_back(change, now)

    def _adopt(self, found: Plan, now: float) -> None:
        self._planned_for = self._key(now)  # before hosts have anything to load for it
        self._aim(dict(found.layers))
        self.unplaced = found.unplaced
        self.loader.reset()

    def _aim(self, target: dict[LayerKey, LayerPlacement]) -> None:
        self._target = target
        self._target_version += 1
        self._wanted.clear()

    def _key(self, now: float) -> object:
        usable, parts = self.view.usable(now), tuple(sorted(self.parts().items()))
        return usable, parts, tuple(self._awake()), self.wishes, self.leaving

    def _unused(self) -> int:
        """Hosts that are there and that nothing was planned for yet."""
        if self._target is None:
            return 0
        there = self.view.seen.keys() - self.leaving
        return sum(self.view.empty(host) and not self.wanted(host) for host in there)

    def _replicas(self) -> int:
        return sum(len(r) for layer in (self._target or {}).values() for r in layer.replicas)

    def _budget(self) -> int:
        return self.policy.moves(self._replicas(), self._awake())

    def _standing(self) -> dict[LayerKey, LayerPlacement]:
        """Where a controller that starts anew begins."""
        return self.view.standing(list(self.models.values()))

    def _give_up(self, key: ExpertKey, host: str) -> None:
        layer_key = LayerKey(key.model, key.layer)
        layer = (self._target or {}).get(layer_key)
        if self._target is None or layer is None or host not in layer.hosts(key.expert):
            return
        # Somebody must stay: who holds it now.
        left = layer.without(key.expert, host, otherwise=self.view.holders(key))
        self._aim({**self._target, layer_key: left})
