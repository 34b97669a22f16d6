"""A simulated controller process around the real `Control` and planner.

It takes the place of the shells `actors/controller/controller.py` and
`actors/store/durable_state.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...cluster.control.changes import Change
from ...cluster.control.commands import Evict, MakePlan, Publish
from ...cluster.control.control import Control
from ...cluster.control.loading import LoadExperts
from ...cluster.control.pool_view import Observation, without
from ...cluster.expert_keys import ExpertVersion
from ...cluster.load.meter import LoadReport
from ...cluster.placement import ModelShape, PlacementId
from ...cluster.planner.plan import OperatorConstraints
from ...cluster.scaling.fleet import Fleet
from ...proto.errors import MoesaicError, Superseded
from .clock import SimProcess
from .host import SimReport
from .network import Answered, Failed, Responder, Result, TimedOut
from .trace_events import Claimed, Published, Sized
from .traffic import take_over

if TYPE_CHECKING:
    from .router import SimRouter
    from .world import World


class SimSizing:
    """The real `Fleet` and autoscaler of one controller, and the state kept for its successor."""

    def __init__(self, controller: SimController) -> None:
        settings, registry = controller.world.settings, controller.world.registry
        self.fleet = Fleet(
            settings.groups,
            settings.scale,
            pending_s=settings.pending_s,
            kept=json.loads(registry.fleet) if registry.fleet else None,
        )
        self._controller = controller
        self._kept_version = -1

    def scale(self, control: Control, group: int, count: int) -> None:
        """Carry out an operator's request for a size. Raises ValueError."""
        now = self._controller.clock.now
        self.fleet.scale(control, group, count, who="operator", now=now)
        self._keep()

    def tick(self, control: Control, now: float) -> None:
        """Run after every tick of the controller."""
        before = self.fleet.desired().keys()
        self.fleet.tick(control, now)
        self._keep()
        registry = self._controller.world.registry
        for name in before - self.fleet.desired().keys():
            registry.constraints = control.constraints
            registry.let_go[name] = self._controller.asked_at

    def _keep(self) -> None:
        if self.fleet.version != self._kept_version:
            self._kept_version = self.fleet.version
            self._controller.world.registry.fleet = json.dumps(self.fleet.snapshot())
            self._controller.world.tell(Sized(self._controller))


@dataclass(slots=True)
class _Waiting:
    """A router's report, answered as soon as there is a newer placement or at ``until``."""

    after: PlacementId | None
    respond: Responder
    until: float


class SimController(SimProcess):
    """One start of the controller; a second one may run at the same time (`second_controller`)."""

    def __init__(self, name: str, world: World) -> None:
        super().__init__(name, world.clock)
        self.world = world
        self.term = 0
        self.control: Control | None = None  # once it has a term
        # When each router's last report came.
        self.heard: dict[str, float] = {}
        self._answers: dict[str, SimReport | str | None] = {}
        self.asked_at = 0.0  # when it asked for the reports on which it decides
        self._observed: dict[str, Observation | None] = {}
        self._loads: set[str] = set()
        self._evicts: dict[str, tuple[ExpertVersion, ...]] = {}
        self._evictions: dict[str, int] = defaultdict(int)  # number of the last that ended, by host
        self._asked: set[str] = set()
        self._waiting: list[_Waiting] = []
        self._early: list[Callable[[], None]] = []
        self._step(self._claim)

    # ---- its term -------------------------------------------------------------------------------

    def _step(self, act: Callable[[], None]) -> None:
        """Do one more operation on the key-value store."""
        self.reach(self.world.network.delay(), f"{self.name}: claims", act)

    def _claim(self) -> None:
        latest = self.world.registry.latest_term
        self._step(lambda: self._try_term(max(latest + 1, int(self.clock.now))))

    def _try_term(self, term: int) -> None:
        if self.world.registry.put_term(term):
            self._step(lambda: self._begin(term))
        else:
            self._step(lambda: self._try_term(term + 1))

    def _begin(self, term: int) -> None:
        self.world.registry.latest_term = self.term = term
        self.world.tell(Claimed(self, term))
        self.sizing = SimSizing(self)
        self.control = self.world.make_control(self.sizing.fleet, term)
        self.sizing.fleet.take_over(self.control)
        self.control.set_constraints(self.world.registry.constraints)
        take_over(self)
        for shape in self.world.settings.models:
            if shape.model not in self.world.settings.in_memory:
                self.control.add_model(shape, on_disk=True)
        for act in self._early:
            act()
        self._tick()

    # ---- remote calls ---------------------------------------------------------------------------

    def hear_report(
        self, router: SimRouter, report: LoadReport, wait_s: float, respond: Responder
    ) -> None:
        """Take a router's report; answer with a newer placement, or with None after ``wait_s``."""
        if self.control is None:
            self._early.append(lambda: self.hear_report(router, report, wait_s, respond))
            return
        now = self.clock.now
        self.heard[router.name] = now
        router.was_heard(now)
        self.control.hear(report, now)
        self._waiting.append(_Waiting(report.received, respond, now + wait_s))
        self.reach(wait_s, f"{self.name}: a report ends", self._answer_reports)
        self._answer_reports()

    def _answer_reports(self) -> None:
        assert self.control is not None
        still = []
        for waiting in self._waiting:
            news = self.control.publisher.news(waiting.after)
            if news is not None:
                waiting.respond(news)
            elif self.clock.now >= waiting.until:
                waiting.respond(None)
            else:
                still.append(waiting)
        self._waiting = still

    def constrain(self, change: Callable[[OperatorConstraints], OperatorConstraints]) -> None:
        """Carry out an operator's command, and keep it for later controllers. Raises ValueError."""
        assert self.control is not None
        self.world.registry.constraints = change(self.control.constraints)
        self.control.set_constraints(self.world.registry.constraints)

    def roll_back(self) -> Change | None:
        """Carry out an operator's rollback of the last change."""
        assert self.control is not None
        change = self.control.changes.find(None)
        if change is not None:
            self.control.roll_back(change, self.clock.now)
        return change

    def scale(self, group: int, count: int) -> None:
        """Carry out an operator's request for a size. Raises ValueError."""
        assert self.control is not None
        self.sizing.scale(self.control, group, count)

    def desired(self, respond: Responder) -> None:
        """Tell the owner which hosts there have to be."""
        if self.control is None:
            self._early.append(lambda: self.desired(respond))
        else:
            respond(tuple(sorted(self.sizing.fleet.desired())))

    # ---- the loop -------------------------------------------------------------------------------

    def _tick(self) -> None:
        # Step 1: ask all hosts at once.
        assert self.control is not None
        self._answers, self.asked_at = {}, self.clock.now
        self._asked = set(self.control.view.hosts)
        for host in sorted(self._asked):
            self._ask(host)

    def _ask(self, host: str) -> None:
        process, forgetting = self.world.hosts.get(host), self._evicts.get(host, ())
        given_up = self._evictions[host]

        def report(respond: Responder) -> None:
            assert process is not None
            process.report(self.term, given_up, respond)

        self.world.network.call(
            self,
            process,
            f"{self.name} asks {host}",
            report,
            lambda result: self._hear_host(host, result, forgetting),
            timeout_s=self.world.settings.report_timeout_s,
        )

    def _hear_host(self, host: str, result: Result, forgetting: tuple[ExpertVersion, ...]) -> None:
        match result:
            case Failed(error=Superseded()):
                self.leave()
                return
            case Answered(value=SimReport() as report):
                self._answers[host] = report
                loading = report.loading > 0 or host in self._loads or host in self._evicts
                self._observed[host] = Observation(
                    entry=report.entry,
                    holdings=without(report.holdings, forgetting),
                    loading=loading,
                    work=report.work,
                )
            case TimedOut():
                self._answers[host] = "late"
            case _ if self.control is not None and self.control.view.never_seen(host):
                self._answers[host] = "late"  # it is still starting
            case _:
                self._answers[host] = self._observed[host] = None
        if len(self._answers) == len(self._asked):
            self._decide()

    def _decide(self) -> None:
        control, now = self.control, self.clock.now
        assert control is not None
        # Step 2: adopt models that only the hosts still know.
        for report in self._answers.values():
            if isinstance(report, SimReport):
                for shape in report.models:
                    self.adopt(shape)
        # Step 3: decide, and carry out the commands.
        observed = {h: self._observed[h] for h, seen in self._answers.items() if seen != "late"}
        commands = control.tick(observed, now)
        self.sizing.tick(control, now)
        for command in commands:
            match command:
                case LoadExperts():
                    self._load(command)
                case Evict():
                    self._evict(command)
                case MakePlan():
                    delay_s = self.world.faults.plan(self.world.settings.plan_s)
                    self.reach(delay_s, f"{self.name}: plans", lambda c=command: self._plan(c))
                case Publish(placement=placement):
                    self.world.tell(Published(self, placement))
                    self._answer_reports()
        self.alarm("ticks", now + self.world.settings.tick_s, self._tick)

    def adopt(self, shape: ModelShape) -> None:
        assert self.control is not None
        if shape.model not in self.control.models:
            try:
                self.control.add_model(shape, on_disk=False)
            except ValueError:
                self.world.log(f"{self.name}: no room for {shape.model}")

    def _plan(self, command: MakePlan) -> None:
        assert self.control is not None
        found = None if self.world.faults.planner_fails() else command.run()
        self.control.planned(command, found, self.clock.now)

    def _load(self, command: LoadExperts) -> None:
        host = command.host
        if host in self._loads:
            return
        self._loads.add(host)
        assert self.control is not None
        shapes = [
            self.control.models[name] for name in sorted({key.model for key, _ in command.weights})
        ]
        process = self.world.hosts.get(host)

        def load(respond: Responder) -> None:
            assert process is not None
            process.load(shapes, command.weights, dict(command.peers), self.term, respond)

        self.world.network.call(
            self,
            process,
            f"{self.name} lets {host} load {_names(command.weights)}",
            load,
            lambda result: self._loaded(command, result),
            timeout_s=self.world.settings.load_timeout_s,
        )

    def _loaded(self, command: LoadExperts, result: Result) -> None:
        assert self.control is not None
        self._loads.discard(command.host)
        if isinstance(result, Failed) and isinstance(result.error, Superseded):
            self.leave()
        elif isinstance(result, TimedOut) or (
            isinstance(result, Failed) and isinstance(result.error, MoesaicError)
        ):
            error = "took too long" if isinstance(result, TimedOut) else str(result.error)
            self.control.load_failed(command.host, command.weights, error, self.clock.now)

    def _evict(self, command: Evict) -> None:
        host = command.host
        if host in self._evicts:
            return
        self._evicts[host] = command.weights
        number = self._evictions[host] + 1
        process = self.world.hosts.get(host)

        def release(respond: Responder) -> None:
            assert process is not None
            process.release(command.weights, self.term, number, self.asked_at, respond)

        def evicted(result: Result) -> None:
            del self._evicts[host]
            self._evictions[host] = number
            if isinstance(result, Failed) and isinstance(result.error, Superseded):
                self.leave()

        self.world.network.call(
            self,
            process,
            f"{self.name} lets {host} forget {_names(command.weights)}",
            release,
            evicted,
            timeout_s=self.world.settings.report_timeout_s,
        )

    def leave(self) -> None:
        """End this controller, because a newer one has taken over."""
        self.world.log(f"{self.name} leaves: a newer controller rules")
        self.world.controller_ends(self)


def _names(weights: Sequence[ExpertVersion]) -> str:
    """Name experts briefly and in their order, so that two logs of a seed can be compared."""
    return ", ".join(f"{k.model}/{k.layer}/{k.expert}/{version}" for k, version in weights)
