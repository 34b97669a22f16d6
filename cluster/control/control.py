"""The controller's state machine: reports go in; loads, placements and evictions come out.

It has one *target*, the layers of a plan, and moves the pool to it in three ways:

- Replicas that the target names and no host holds are loaded.
- The replicas that are ready are published. Those that served before stay in the placement until
  the ones that replace them are ready.
- Replicas that neither the target nor the published placement names are evicted. This waits until
  each live router has acknowledged a placement without them, or its lease has ended.

It decides by what hosts report, never by what it asked for. So a new controller continues where the
last one ended, and a load that fails or hangs changes nothing in what is published.

It does not use Ray, and takes the time as an argument; `actors/controller/controller.py` is the
shell around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..expert_keys import ExpertKey, ExpertVersion, LayerKey
from ..load.meter import HostPath, LoadReport
from ..load.tracker import LoadTracker
from ..placement import LayerPlacement, ModelShape, Placement, PlacementId, every_expert
from ..planner.capacity import with_default_slots
from ..planner.plan import OperatorConstraints, Plan, PoolHost
from ..training.runs import TrainingRuns
from ..weight_safety import WeightSafety
from ..weight_updates import WeightUpdates
from .change_impact import ImpactMeter
from .changes import Change, ChangeHistory
from .commands import ControlCommand, EndRun, Evict, MakePlan, Publish
from .host_speed import SILENT, with_speed_factors
from .idle_models import IdleModels
from .loading import Loader
from .membership import Membership
from .policy import ControlPolicy, RebalanceTimer, filling, training_upkeep
from .pool_view import Observation, PoolView
from .publishing import Publisher
from .target import Target

# A plan without moves is adopted for its shares if the balancedness of a layer grows by this much.
_WORTH = 0.02
# A host that lacks a larger fraction of its wanted experts gets next to no traffic yet.
_LOADING = 0.5


class Control:
    """The only writer of placements."""

    def __init__(
        self, hosts: Sequence[PoolHost], *, term: int, policy: ControlPolicy | None = None
    ) -> None:
        self.policy = policy or ControlPolicy()
        self.view = PoolView(hosts, host_timeout_s=self.policy.host_timeout_s)
        self.publisher = Publisher(self.view, term=term, lease_s=self.policy.lease_s)
        self.loader = Loader(
            self.view,
            bytes_per_s=self.policy.bytes_per_s,
            batch_bytes=self.policy.batch_bytes,
            retry_s=self.policy.retry_s,
        )
        self.updates = WeightUpdates(self.view, self.loader.saved)
        self.weights = WeightSafety(self.view, self.loader.is_on_disk, self.loader.saved)
        self.training = TrainingRuns(self.view, self.updates)
        self.loads = LoadTracker()
        self.paths: dict[str, tuple[HostPath, ...]] = {}  # of each live router
        self.changes = ChangeHistory()
        self.impact_meter = ImpactMeter(self.policy.every_s, self.policy.balance.consolidate_below)
        self.target = Target()
        self.members = Membership(self.view, self.publisher, self.loader, self.target)
        self.models: dict[str, ModelShape] = {}
        self.idle_models = IdleModels()
        self.removed: set[str] = set()  # models whose experts may still be on hosts
        self._parts: dict[str, float] = {}
        self._parts_for: object = None
        self._asked: MakePlan | None = None
        self._published_for: object = None
        self.at_target = False  # whether hosts have all that the last plan gives them
        self._planned_for: object = None  # hosts, models and constraints of the target
        self._planned_windows = 0
        self.planned_at: float | None = None  # when the planner was last asked
        self._now: float | None = None
        self.rebalance_timer = RebalanceTimer(self.policy.every_s)

    # ---- input ----------------------------------------------------------------------------------

    def add_model(self, shape: ModelShape, *, on_disk: bool, fits: bool = False) -> None:
        """Serve a model from now on. Raises ValueError if it cannot be placed.

        With ``fits`` there is or will be room for it: hosts for it may still be starting.
        """
        if not 1 <= shape.replicas <= len(self.view.hosts):
            raise ValueError(
                f"models.{shape.model}.replicas: {shape.replicas} replicas of an expert need as "
                f"many hosts, but there are only {len(self.view.hosts)}; lower replicas, "
                "or add hosts"
            )
        before = dict(self.models)
        self.models[shape.model] = shape
        self.removed.discard(shape.model)
        if self.settled and self._now is not None and not fits:
            found = self.plan_for(self._now, budget=0).run()
            lacking = [key for key in found.unplaced if key.model == shape.model]
            if lacking:
                self.models = before
                raise ValueError(
                    f"models.{shape.model}: the hosts have no room for {len(lacking)} of its "
                    "experts; give hosts more slots or memory, or add hosts"
                )
            self._adopt(found, self._now)
        if on_disk:
            self.loader.on_disk.add(shape.model)

    def replan(self) -> None:
        """Let the next tick make a plan, because hosts or the policy are others now."""
        self._planned_for = None

    def hear(self, report: LoadReport, now: float) -> None:
        """Take note of a router's report: what it counted, and which placement it follows."""
        own = {key: n_E for key, n_E in report.counts.items() if self._is_own(key, n_E.size)}
        self.loads.hear(replace(report, counts=own))
        self.idle_models.hear(report, now)
        self.publisher.acknowledged(report.router, report.placement_id, now)
        live = self.publisher.routers(now)
        self.paths = {router: paths for router, paths in self.paths.items() if router in live}
        self.paths[report.router] = report.paths

    def set_constraints(self, constraints: OperatorConstraints) -> None:
        """Take what operators want; the next tick plans for it."""
        self.members.constraints = constraints

    def load_failed(
        self, host: str, weights: Sequence[ExpertVersion], error: str, now: float
    ) -> None:
        """Take note of a load that ended without all of its replicas.

        The next attempt uses another source. A replica that fails again leaves the target, unless
        no host holds its expert.
        """
        for key in self.loader.failed(host, weights, now):
            if self.view.holders(key):
                self.target.give_up(key, host, self.view.holders(key))
                self.rebalance_timer.pause(now)
                self.changes.failed(f"{key} on {host}: {error}", now)

    # ---- for later controllers ------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Return what a later controller must know of weights, as JSON values."""
        return self.updates.snapshot() | {"training": self.training.snapshot()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Take over what `snapshot` of an earlier controller returned."""
        self.updates.restore(kept)
        self.training.restore(kept["training"])

    # ---- queries --------------------------------------------------------------------------------

    @property
    def placement_id(self) -> PlacementId:
        return self.publisher.placement_id

    @property
    def placement(self) -> Placement | None:
        return self.publisher.placement

    @property
    def settled(self) -> bool:
        """Whether hosts have reported and a first plan was made."""
        return self.target.layers is not None

    @property
    def constraints(self) -> OperatorConstraints:
        """What operators want; `set_constraints` changes it."""
        return self.members.constraints

    @property
    def leaving(self) -> frozenset[str]:
        """Hosts that must become empty: drained by operators, or retired."""
        return self.members.leaving

    @property
    def unplaced(self) -> tuple[ExpertKey, ...]:
        """Experts for which no host had room in the last plan."""
        return self.target.unplaced

    @property
    def state(self) -> object:
        """A value that changes with the hosts seen, what they hold, the target and the models."""
        return self.view.version, self.target.version, tuple(self.models.values())

    def wanted(self, host: str) -> list[ExpertKey]:
        """Return the experts that the target places on a host."""
        return self.target.wanted(host)

    def missing(self) -> dict[ExpertKey, str]:
        """Return the experts that no host holds now, and why."""
        held = self.view.held_by()
        missing = [key for key in every_expert(self._awake()) if key not in held]
        return {key: self.loader.why_missing(self.view.versions.served(key)) for key in missing}

    def _saved_models(self) -> set[str]:
        """Return those that may sleep whose weights are all in files and stay as they are."""
        run, updating = self.training.alive, {key.model for key in self.updates.arriving()}
        steady = self.loader.on_disk - updating - ({run.model} if run is not None else set())
        may = [one for one in self.models.values() if one.idle_s and one.model in steady]
        return {shape.model for shape in may if not self.weights.volatile(shape)}

    def is_free(self, host: str, now: float) -> bool:
        """Return whether a retired host holds nothing, gets nothing, and no router uses it."""
        return self.members.is_free(host, now, experts_are_missing=bool(self.missing()))

    def drain_blockers(self) -> dict[str, str]:
        """Return the leaving hosts that cannot leave, with the reason as text."""
        return self.members.drain_blockers(self.models)

    def drain_obstacles(self) -> dict[str, str]:
        """Return the leaving hosts that cannot leave, or not yet, with the reason as text."""
        return self.members.owners(self.training.alive) | self.drain_blockers()

    def speed_factors(self) -> dict[str, float]:
        """Return the speed factor of each host that is planned with less than its full speed.

        It is below 1 for slow hosts, and near 0 for silent hosts and while a host still has to load
        most of its wanted experts, for example after a restart.
        """
        if self._parts_for != self.state:
            self._parts_for = self.state
            lacking = {
                host: len(self.loader.lacking(host, self.wanted(host))) / len(self.wanted(host))
                for host in self.view.observations
                if self.wanted(host)
            }
            loading = [host for host, part in lacking.items() if part > _LOADING]
            self._parts = dict.fromkeys(loading, SILENT) if len(loading) < len(lacking) else {}
        return self.view.speed_factors | self._parts

    def is_quiet(self, now: float) -> bool:
        """Return whether a tick without new reports would do nothing.

        Except for leases that end and for the periodic check of the balance.
        """
        at_rest = not self.updates.arriving() and self.training.alive is None
        settled = self.at_target and self._asked is None and at_rest
        return settled and self.state == self._published_for and self._planned_for == self._key(now)

    def unprotected(self) -> list[ExpertKey]:
        """Return the experts that would be lost with one failure domain."""
        held, hosts = self.view.held_by(), self.view.hosts
        domains = {key: {hosts[host].domain or host for host in of} for key, of in held.items()}
        return [key for key in every_expert(self._awake()) if len(domains.get(key, ())) == 1]

    def staying(self, now: float) -> list[PoolHost]:
        """Return the hosts that are usable and not leaving."""
        return [
            self.view.hosts[name] for name in sorted(self.view.usable(now) - self.members.leaving)
        ]

    def pending(self) -> int:
        """Return how many replicas of the target still have to be loaded."""
        return sum(len(self.loader.lacking(h, self.wanted(h))) for h in self.view.hosts)

    # ---- one round ------------------------------------------------------------------------------

    def tick(self, reports: Mapping[str, Observation | None], now: float) -> list[ControlCommand]:
        """Run one round: take in the hosts' reports, and return what has to be done.

        None stands for a host that Ray says is gone. A host that is missing from ``reports`` did
        not answer in time, and its last report stays valid: routers detect by themselves that it
        does not answer.
        """
        return self.note(reports, now) + self.decide(reports, now)

    def note(self, reports: Mapping[str, Observation | None], now: float) -> list[ControlCommand]:
        """Do the first part of a round, which takes no time even in a large pool.

        It publishes the version that a training run waits for, if its replicas have it.
        """
        self._now = now
        self.view.note(reports, now)
        placed = {} if self.placement is None else self.placement.layers
        served = self.training.advance(placed, now)
        placement = self.publisher.renumber() if served is not None and served.whole else None
        return [] if placement is None else [Publish(placement=placement)]

    def decide(self, reports: Mapping[str, Observation | None], now: float) -> list[ControlCommand]:
        """Do the second part of a round, with the reports of the first."""
        # Step 1: take note of the load, and of what its time has come for.
        self.loads.advance(now)
        self.updates.advance(now)
        self.idle_models.advance(
            self.models.values(),
            saved=self._saved_models(),
            appeared=self.publisher.has_published,
            now=now,
        )
        # Step 2: ask for a plan if the last one is outdated, or if the balance is due for a check.
        commands: list[ControlCommand] = self._replan(now)
        target = self.target.layers
        if target is None:
            target = self._held_placement()
        # Step 3: let idle hosts load what they lack.
        idle = [
            h for h, seen in self.view.observations.items() if h in reports and not seen.loading
        ]
        appeared = [model for model in self.models if self.publisher.has_published(model)]
        arriving = self.updates.arriving() | self.training.arriving(self.models.values())
        for host in idle:
            load = self.loader.next(
                host,
                self.wanted(host),
                models=self.models,
                appeared=appeared,
                now=now,
                arriving=arriving,
            )
            commands += [load] if load is not None else []
        # Step 4: publish what is ready, if that has changed.
        if self.state != self._published_for:
            # Before the first plan, some host may not have reported yet.
            lost = self.weights.is_lost if self.settled else lambda _: False
            placement = self.publisher.publish(target, self.models, lost)
            commands += [Publish(placement=placement)] if placement is not None else []
            self._published_for = self.state
            self.at_target = not self.pending()
        # Step 5: let hosts evict what no router can ask for any more.
        if self.settled:
            evictable = self.publisher.evictable(
                target,
                now,
                self.idle_models.asleep | self.removed,
                lambda one: arriving.get(one.key) == one.version or self.training.is_arriving(one),
            )
            for host in [host for host in idle if host in evictable]:
                commands.append(Evict(host=host, weights=tuple(evictable[host])))
                self.view.forget(host, evictable[host])
            if self.at_target:
                self.changes.done(now)
        # Step 6: let hosts forget training runs that do not live.
        for host, seen in self.view.observations.items():
            if host in reports and not self.training.is_alive(seen.run):
                commands.append(EndRun(host=host, run=seen.run))
        # Step 7: measure the effect of the last change.
        last = self.changes.find(None)
        self.impact_meter.tick(last, self.placement, self.loads, self.staying(now), now)
        return commands

    # ---- step 2: the target ---------------------------------------------------------------------

    def _replan(self, now: float) -> list[ControlCommand]:
        """Ask for a plan, if one is needed and none is being made."""
        usable = self.view.usable(now)
        started = self.settled or usable <= self.view.observations.keys()
        # Nothing to do while a plan is being made, before the first reports of all hosts, and while
        # all hosts are leaving.
        if self._asked is not None or not started or not usable - self.members.leaving:
            return []
        if self._planned_for != self._key(now):
            self._asked = self.plan_for_all(now)
        elif (
            self.policy.auto
            and self.at_target
            and self.rebalance_timer.is_due(now, self.loads.shifted_at)
        ):
            self.rebalance_timer.note_check(now)
            # Without new load since the last plan, the planner would find the same again.
            if self.loads.windows != self._planned_windows:
                self._planned_windows = self.loads.windows
                self._asked = self.plan_for(now)
        return [] if self._asked is None else [self._asked]

    def planned(self, asked: MakePlan, found: Plan | None, now: float) -> None:
        """Take the planner's answer to a `MakePlan`; None if it failed."""
        self._asked = None
        if found is None or not self.fits(asked, now):
            return  # the next tick asks again
        if asked.balance:
            gain = max((found.after[k] - found.before[k] for k in found.after), default=0.0)
            if found.moves or found.drops or gain > _WORTH:
                self.apply(found, now, who="balancer", why="load")
        elif self.settled and found.moves:
            self.apply(found, now, who="controller", why="hosts, models or constraints")
        else:
            self._adopt(found, now)

    def fits(self, asked: MakePlan, now: float) -> bool:
        """Return whether nothing has changed that a plan was made for, except the load."""
        return (asked.key, asked.version) == (self._key(now), self.target.version)

    def plan_for_all(self, now: float) -> MakePlan:
        """Make the command for a plan that meets all requirements and fills new hosts only.

        It contains no other moves for balance.
        """
        return self.plan_for(now, budget=0, fill=self._unused())

    def plan_for(self, now: float, *, budget: int | None = None, fill: int = 0) -> MakePlan:
        """Make the command for the best plan now.

        ``budget`` is the number of moves for balance; None: the policy's. With ``fill``, the plan
        gives so many new, empty hosts their part of the replicas, whether the moves pay or not.
        """
        self.planned_at = now
        backward_s = sum(self.view.training_times.backward_s.values())
        rate = self.loads.assignments_per_busy_s(backward_s)
        hosts = with_default_slots(
            [self.view.hosts[name] for name in sorted(self.view.usable(now))],
            self.models.values(),
            redundancy=self.policy.balance.redundancy,
            leaving=self.members.leaving,
            held={name: len(self.wanted(name)) for name in self.view.hosts},
        )
        self.loader.slots = {host.name: host.slots for host in hosts if host.slots is not None}
        most = self._budget() if budget is None else budget
        policy = replace(
            self.policy.balance,
            # Whether a move pays is unknown until hosts have been measured at work.
            budget=most if rate is not None else 0,
            loading_bytes_per_s=self.policy.bytes_per_s,
        )
        if fill:
            policy = filling(policy, fill, hosts=len(hosts), replicas=self.target.replicas())
        hosts = self.members.with_training_room(hosts, self.training, self.models)
        return MakePlan(
            models=self._awake(),
            hosts=[
                replace(host, speed=host.speed * (rate or 1.0))
                for host in with_speed_factors(hosts, self.speed_factors())
            ],
            current=self._held_placement()
            if self.target.layers is None
            else dict(self.target.layers),
            loads=self.loads.forecast(),
            policy=policy,
            constraints=replace(self.constraints, leaving=self.members.leaving),
            key=self._key(now),
            version=self.target.version,
            balance=budget is None,
            upkeep=training_upkeep(
                self.training, {seen.entry.node for seen in self.view.observations.values()}
            ),
        )

    def apply(self, found: Plan, now: float, *, who: str, why: str) -> Change:
        """Make a plan the target, and record it as a change."""
        change = self.changes.begin(found, self.target.layers or {}, now, who=who, why=why)
        self._adopt(found, now)
        return change

    def roll_back(self, change: Change, now: float) -> None:
        """Return to the target from before a change; the next tick plans what no longer fits."""
        before = change.layers_before.items()  # perhaps with models that have left since
        own = {key: one for key, one in before if self._is_own(key, len(one.replicas))}
        self.target.set_layers(own)
        self._planned_for = None
        self.rebalance_timer.pause(now)
        self.changes.rolled_back(change, now)

    def _adopt(self, found: Plan, now: float) -> None:
        # The key depends on what hosts have yet to load, so it is taken before the target changes.
        self._planned_for = self._key(now)
        self.target.set_layers(dict(found.layers))
        self.target.unplaced = found.unplaced
        self.loader.reset()

    def _key(self, now: float) -> object:
        """Return everything but the load that a plan depends on, to compare it with later."""
        usable, parts = self.view.usable(now), tuple(sorted(self.speed_factors().items()))
        return usable, parts, tuple(self._awake()), self.constraints, self.members.leaving

    def _unused(self) -> int:
        """Return how many hosts are present and empty, with nothing planned for them yet."""
        if not self.settled:
            return 0
        there = self.view.observations.keys() - self.members.leaving
        seen = self.view.observations
        return sum(seen[host].bare and not self.wanted(host) for host in there)

    def _awake(self) -> list[ModelShape]:
        return self.idle_models.awake(self.models.values())

    def _is_own(self, key: LayerKey, experts: int) -> bool:
        """Return whether a layer of so many experts is one of a model that is served."""
        shape = self.models.get(key.model)
        return shape is not None and shape.experts.get(key.layer) == experts

    def _budget(self) -> int:
        return self.policy.moves(self.target.replicas(), self._awake())

    def _held_placement(self) -> dict[LayerKey, LayerPlacement]:
        """Return what hosts hold, from which a new controller begins."""
        return self.view.held_placement(list(self.models.values()))
