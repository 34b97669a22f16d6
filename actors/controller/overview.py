"""The controller as observers see it: status, live view, totals and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...cluster.control.control import Control
from ...cluster.control.status_views import HostCounters, HostRates, expert_views, hottest
from ...cluster.control.watchdog import Vitals, Watchdog
from ...cluster.expert_keys import FIRST_VERSION
from ...cluster.load.meter import HostPath
from ...cluster.load.trace import LoadTotals
from ...cluster.metrics.snapshot import MetricsSnapshot, ModelFigures, PathCounts
from ...cluster.page_feed.timeline import SeenHost, Timeline
from ...cluster.placement import ModelRef, ModelShape, PlacementId
from ...cluster.planner.constraints import check_layer, check_model
from ...cluster.reports.activity import Activity, ExpertReport, HostActivity, ModelActivity
from ...cluster.reports.report import PlacementNumber
from ...cluster.reports.status import (
    BalancingStatus,
    CardStatus,
    ClusterStatus,
    ControllerStatus,
    HostStatus,
    MissingExpert,
    ModelStatus,
    NodeStatus,
    PathStatus,
    RouterStatus,
)
from ...proto.errors import ClusterError, describe_error
from ..host.report import HostReport
from ..router_service.service_actor import ServiceWatch
from .host_actors import HostActors
from .host_orders import HostOrders
from .host_probing import HostProbing
from .sizing import Sizing
from .training import Training

log = logging.getLogger(__name__)

WATCH_S = 1.0
QUIET_WATCH_S = 5.0
# Missing experts that `status` names.
_EXAMPLES = 10


@dataclass(slots=True)
class LoopState:
    """How the controller's loop is doing; empty errors mean that all is well."""

    ticks: int = 0
    tick_error: str = ""
    plan_error: str = ""
    watch_error: str = ""

    @property
    def error(self) -> str:
        return self.tick_error or self.plan_error or self.watch_error


@dataclass(slots=True, kw_only=True)
class Overview:
    """Answers `status`, `top`, recordings and scrapes of metrics."""

    control: Control
    hosts: HostActors
    orders: HostOrders
    probing: HostProbing
    sizing: Sizing
    training: Training
    watchdog: Watchdog
    service: ServiceWatch | None
    models: Mapping[str, tuple[ModelRef, ModelShape]]
    loop: LoopState
    term: int
    rates: HostRates = field(default_factory=HostRates)
    timeline: Timeline = field(default_factory=Timeline)
    clock: Callable[[], float] = time.monotonic

    def status(self) -> ClusterStatus:
        """Return the whole status."""
        control = self.control
        return self._status(
            [
                RouterStatus(
                    name=name,
                    placement=_number(number),
                    paths=[_path(one) for one in control.paths.get(name, ())],
                )
                for name, number in control.publisher.routers(self.clock()).items()
            ]
        )

    def metrics(self, hot_experts: int) -> MetricsSnapshot:
        """Return what metrics are made of; hundreds of routers are told of as sums."""
        control, hosts = self.control, self.control.view.hosts
        times, routers = control.loads.hosts, control.publisher.routers(self.clock())
        return MetricsSnapshot(
            status=self._status([]),
            activity=self.top(hot_experts),
            routers=control.loads.routers,
            router_count=len(routers),
            paths=PathCounts.of(path for name in routers for path in control.paths.get(name, ())),
            host_queued_s={host: times[host].queued_s if host in times else 0.0 for host in hosts},
            models={
                name: ModelFigures(
                    assignments=sum(
                        int(counts.sum())
                        for key, counts in control.loads.totals.items()
                        if key.model == name
                    ),
                    version=control.view.versions.models.get(name, FIRST_VERSION),
                    wanted_replicas=max(shape.replicas, control.policy.balance.redundancy + 1),
                    unprotected_experts=self.watchdog.unprotected[name],
                    loads=self.orders.loads[name],
                )
                for name, (_, shape) in self.models.items()
            },
            plans=self.watchdog.plans,
            last_change=0 if (last := control.changes.find(None)) is None else last.id,
        )

    def _status(self, routers: list[RouterStatus]) -> ClusterStatus:
        now, control = self.clock(), self.control
        vitals = self._vitals(now)
        missing, obstacles = control.missing(), control.drain_obstacles()
        return ClusterStatus(
            placement=_number(self._number()),
            controller=ControllerStatus(
                term=self.term,
                ticks=self.loop.ticks,
                tick_age_s=round(vitals.tick_age_s, 3),
                failing=vitals.failing,
                error=self.loop.error or None,
            ),
            warnings=vitals.warnings(),
            balancing=self._balancing(vitals, now),
            scaling=self.sizing.status(now),
            routers=routers,
            router_service=None if self.service is None else self.service.status(),
            hosts=[self._host_status(host, obstacles, now) for host in control.view.hosts],
            models=[
                ModelStatus(
                    name=name,
                    path=None if ref.path is None else str(ref.path),
                    dtype=ref.dtype,
                    min_replicas=shape.replicas,
                    exact=shape.exact,
                    layers=len(shape.experts),
                    experts=sum(shape.experts.values()),
                    asleep=name in control.idle_models.asleep,
                    missing_experts=sum(1 for key in missing if key.model == name),
                    updated_experts=len(control.weights.updated(shape)),
                    volatile_experts=len(control.weights.volatile(shape)),
                    routing=self.watchdog.routing.layers(name),
                )
                for name, (ref, shape) in self.models.items()
            ],
            balancedness=self.watchdog.overall_balancedness,
            missing_experts=len(missing),
            missing_examples=[
                MissingExpert(**key._asdict(), reason=why)
                for key, why in list(missing.items())[:_EXAMPLES]
            ],
            unprotected_experts=len(control.unprotected()),
            nodes=_nodes(self.hosts.reports),
            cards=_cards(self.hosts.reports),
            training=self.training.status(self.watchdog.balancedness),
        )

    def top(self, count: int) -> Activity:
        """Return the current load and the ``count`` hottest experts."""
        now = self.clock()
        control, vitals = self.control, self._vitals(now)
        placement = control.placement
        layers = {} if placement is None else placement.layers
        rates = {key: rate for key in layers if (rate := control.loads.rate(key)) is not None}
        return Activity(
            placement=_number(self._number()),
            router_count=len(control.publisher.routers(now)),
            pending_moves=vitals.moves_pending,
            missing_experts=vitals.missing_experts,
            unprotected_experts=vitals.unprotected_experts,
            warnings=vitals.warnings(),
            error=self.loop.error or None,
            models=[
                ModelActivity(
                    name=model,
                    assignments_per_s=round(
                        sum(float(r.sum()) for key, r in rates.items() if key.model == model), 1
                    ),
                    balancedness=self.watchdog.balancedness.get(model),
                    worst_routing=self.watchdog.routing.worst(model),
                )
                for model in sorted(control.models)
            ],
            hosts=[self._host_activity(host) for host in control.view.hosts],
            hottest_experts=hottest(rates, layers, count),
            training=self.training.status(self.watchdog.balancedness),
        )

    def experts(self, model: str | None, layer: int | None, hot: int | None) -> list[ExpertReport]:
        """Return all experts, those of a model or a layer, or the ``hot`` hottest ones."""
        control = self.control
        try:
            shapes = (
                control.models.values() if model is None else [check_model(control.models, model)]
            )
            if layer is not None:
                for shape in shapes:
                    check_layer(shape, layer)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        layers = {} if control.placement is None else control.placement.layers
        return expert_views(
            layers, control.loads, control.constraints, model=model, layer=layer, hot=hot
        )

    def totals(self) -> LoadTotals:
        """Return all counts since this controller's start."""
        loads = self.control.loads
        return LoadTotals(term=self.term, counts=loads.totals, hosts=loads.hosts)

    # ---- watching -------------------------------------------------------------------------------

    async def watch(self, is_quiet: Callable[[], bool]) -> None:
        """Take readings in a task of its own, so that they show a stuck loop."""
        watched_at = -QUIET_WATCH_S
        while True:
            now = self.clock()
            try:
                self.probing.look()
                if not is_quiet() or now - watched_at >= QUIET_WATCH_S:
                    watched_at = now
                    self._take_readings(now)
                self.loop.watch_error = ""
            except Exception as error:
                # A failure here must not stop the controller. `status` shows it; try again.
                self.loop.watch_error = f"watchdog: {describe_error(error)}"
                log.exception("the controller's watchdog failed, and tries again")
            await asyncio.sleep(WATCH_S)

    def _take_readings(self, now: float) -> None:
        counters = {host: _counters(report) for host, report in self.hosts.reports.items()}
        self.rates.note(counters, now)
        self._vitals(now)
        self._note_events()

    def _vitals(self, now: float) -> Vitals:
        hosts = self.control.view.hosts
        return self.watchdog.vitals([self.hosts.state(host) for host in hosts], now)

    def _note_events(self) -> None:
        control, reports = self.control, self.hosts.reports
        run = control.training.alive
        self.timeline.note(
            time.time(),
            {
                host: SeenHost(
                    state=self.hosts.state(host),
                    incarnation=reports[host].entry.incarnation if host in reports else None,
                    draining=host in control.leaving,
                )
                for host in control.view.hosts
            },
            asleep=control.idle_models.asleep,
            run=None if run is None else str(run),
            error=self.loop.error,
        )

    # ---- parts ----------------------------------------------------------------------------------

    def _number(self) -> PlacementId | None:
        placement = self.control.placement
        return None if placement is None else placement.id

    def _host_activity(self, host: str) -> HostActivity:
        report = self.hosts.reports.get(host)
        return HostActivity(
            name=host,
            state=self.hosts.state(host),
            replicas=0 if report is None else sum(map(len, report.holdings.values())),
            queued_rows=0 if report is None else report.loop.queued_rows,
            throughput=self.rates.of(host),
        )

    def _balancing(self, vitals: Vitals, now: float) -> BalancingStatus:
        control = self.control
        pending = control.pending()
        told = control.changes.reports(now, pending_moves=pending)
        return BalancingStatus(
            automatic=control.policy.auto,
            plan_age_s=_rounded(vitals.plan_age_s),
            planning_s=round(vitals.planning_s, 1),
            failed_plans=vitals.plan_failures,
            arrival_age_s=_rounded(vitals.move_age_s),
            pending_moves=pending,
            draining_hosts=sorted(control.leaving),
            last_change=told[-1] if told else None,
        )

    def _host_status(self, host: str, obstacles: Mapping[str, str], now: float) -> HostStatus:
        obstacle = self.sizing.waiting(host, now)
        if host in obstacles:
            obstacle = f"draining; {obstacles[host]}"
        report, known = self.hosts.reports.get(host), self.control.view.hosts[host]
        unready = self.probing.obstacle(host)
        return HostStatus(
            name=host,
            state=self.hosts.state(host),
            obstacle=obstacle,
            error=self.hosts.errors.get(host) or None,
            process=None if report is None else report.process(),
            slots=self.control.loader.slots.get(host, known.slots),
            memory_limit_bytes=known.memory_bytes,
            ready=unready is None,
            unready_reason=unready,
        )


def _counters(report: HostReport) -> HostCounters:
    return HostCounters(
        incarnation=report.entry.incarnation,
        calls=report.loop.calls,
        rows=report.loop.rows,
        busy_s=report.loop.busy_s,
    )


def _number(number: PlacementId | None) -> PlacementNumber | None:
    return None if number is None else PlacementNumber(term=number.term, epoch=number.epoch)


def _rounded(age_s: float | None) -> float | None:
    return None if age_s is None else round(age_s, 1)


def _path(path: HostPath) -> PathStatus:
    return PathStatus(
        host=path.host, transport=path.transport, lent=path.lent, reason=path.why_sent
    )


def _nodes(reports: Mapping[str, HostReport]) -> list[NodeStatus]:
    """Return the machines of hosts, each with its memory as one of its hosts reported it."""
    by_node: dict[str, list[str]] = {}
    for host, report in sorted(reports.items()):
        by_node.setdefault(report.entry.node, []).append(host)
    found = []
    for node, hosts in sorted(by_node.items()):
        own = [reports[host] for host in hosts]
        memory_bytes, free_bytes = own[-1].machine_bytes
        found.append(
            NodeStatus(
                node=node,
                hosts=hosts,
                weight_bytes=sum(report.weight_bytes for report in own),
                rss_bytes=sum(report.rss_bytes for report in own),
                memory_bytes=memory_bytes,
                free_bytes=free_bytes,
            )
        )
    return found


def _cards(reports: Mapping[str, HostReport]) -> list[CardStatus]:
    """Return the GPUs of hosts, each with its memory as one of its hosts reported it."""
    by_card: dict[tuple[str, str], list[str]] = {}
    for host, report in sorted(reports.items()):
        if report.card is not None:
            by_card.setdefault((report.entry.node, report.entry.device), []).append(host)
    found = []
    for (node, card), hosts in sorted(by_card.items()):
        own = [(reports[host], known) for host in hosts if (known := reports[host].card)]
        limits = [known.limit_bytes for _, known in own]
        last = own[-1][1]
        found.append(
            CardStatus(
                card=card,
                node=node,
                hosts=hosts,
                weight_bytes=sum(report.weight_bytes for report, _ in own),
                used_bytes=sum(known.used_bytes for _, known in own),
                limit_bytes=None if None in limits else sum(one or 0 for one in limits),
                memory_bytes=last.total_bytes,
                free_bytes=last.free_bytes,
            )
        )
    return found
