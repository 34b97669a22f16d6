"""The controller actor: it observes hosts, makes them load experts and publishes placements.

It is a thin shell around `cluster/control/control.py`. Serving goes on while it is down. Ray
restarts it, and it rebuilds its view from what the hosts report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ...cluster.control.commands import EndRun, Evict, MakePlan, Publish
from ...cluster.control.host_speed import Work
from ...cluster.control.loading import LoadExperts
from ...cluster.control.pool_view import Observation, without
from ...cluster.control.watchdog import Watchdog
from ...cluster.expert_keys import ExpertKey, first_versions
from ...cluster.load.meter import LoadReport
from ...cluster.load.trace import LoadTotals
from ...cluster.metrics.snapshot import MetricsSnapshot
from ...cluster.page_feed.items import FeedRevision, ItemChanges
from ...cluster.placement import ModelRef, ModelShape, PlacementId, PlacementNews
from ...cluster.reports.activity import Activity, ExpertReport
from ...cluster.reports.placing import ChangeReport, DrainReport, PlanReport
from ...cluster.reports.scaling import ScalingReport
from ...cluster.reports.status import ClusterStatus
from ...cluster.reports.updates import WeightUpdateReport
from ...cluster.spec.deployment import Deployment
from ...cluster.training.runs import BegunTraining, NewsRequest, TrainingNews, TrainingRequest
from ...proto.errors import ClusterError, describe_error
from ..host.report import HostReport
from ..host.weight_grants import BegunUpdate, Granted, LocatedExpert, grant_all
from ..router_service.service_actor import ServiceWatch
from ..runtime.process_log import begin_process
from ..runtime.ray_border import cluster_of
from ..store.cluster_secret import secret_of
from ..store.durable_state import claim_term, store_updates
from .events import Events
from .host_actors import HostActors
from .host_orders import HostOrders
from .host_polling import HostPolling, PollResult
from .host_probing import HostProbing, prober
from .host_provisioner import HostProvisioner, HostStarter
from .operations import Operations
from .overview import LoopState, Overview
from .page_items import PageItems
from .reshaping import Reshaping
from .restoring import replay, restore
from .sizing import Sizing
from .training import Training
from .weight_updating import WeightUpdating

log = logging.getLogger(__name__)

TICK_S = 0.2
# While a model trains and nothing moves. Each tick asks the hosts, which a step keeps busy; five of
# them in a second take a tenth of a core. What a step waits for hurries the next one.
TRAINING_TICK_S = 0.5
# The shortest time between two ticks, while somebody waits for what the next one finds.
HURRIED_TICK_S = 0.02
# The longest time between two ticks while nothing happens.
QUIET_TICK_S = 1.0
REPORT_TIMEOUT_S = 2.0
SETTLE_S = 60.0
# A tick that takes longer is worth a warning; late hosts alone hold one up for less.
SLOW_TICK_S = 2 * REPORT_TIMEOUT_S


class Controller:
    """The controller of one cluster; it runs as an asyncio Ray actor."""

    def __init__(self, namespace: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Control the cluster whose `Deployment` is stored. Raises ClusterError."""
        begin_process("controller", "controller", cluster_of(namespace))
        self._namespace = namespace
        self._clock = clock
        self._wake = asyncio.Event()  # set when the loop should tick soon
        self._hurried = asyncio.Event()  # set when it should tick at once
        self._term = claim_term(namespace)
        deployment, self._control, fleet, first, self._follows_another = restore(
            namespace, self._term, self._clock()
        )
        self._models: dict[str, tuple[ModelRef, ModelShape]] = {}
        for one in deployment.models:
            self._adopt(one.ref, one.shape)
        store_updates(namespace, self._term, self._control.snapshot())
        self._hosts = HostActors(namespace)
        self._probing = HostProbing(self._hosts, prober(self._hosts, namespace), clock)
        self._polling = HostPolling(self._observe, self._wake.set, clock)
        self._orders = HostOrders(
            control=self._control,
            hosts=self._hosts,
            models=self._models,
            term=self._term,
            changed=self._polling.invalidate,
            clock=clock,
        )
        self._published = asyncio.Condition()
        self._state = LoopState()
        self._planning: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(self._control, self._clock())
        self._sizing = Sizing(self._control, fleet, namespace, self._wake.set, clock)
        self._events = Events(self._control, fleet)
        self._updating = WeightUpdating(
            control=self._control,
            hosts=self._hosts,
            models=self._models,
            namespace=namespace,
            term=self._term,
            wake=self._wake.set,
            clock=clock,
        )
        self._training = Training(
            control=self._control,
            models=self._models,
            store=self._updating.store,
            evicting=self._orders.evicting,
            hurry=self._hurry,
            clock=clock,
        )
        self._reshaping = Reshaping(
            deployment=deployment,
            control=self._control,
            sizing=self._sizing,
            models=self._models,
            reports=self._hosts.reports,
            adopt=partial(self._adopt, fits=True),
            forget=self._orders.forget_model,
            left=lambda: (self._updating.store(), self._sizing.keep_constraints()),
            namespace=namespace,
            clock=clock,
        )
        self._operations = Operations(self._control, namespace, self._wake.set, clock)
        self._overview = Overview(
            control=self._control,
            hosts=self._hosts,
            orders=self._orders,
            probing=self._probing,
            sizing=self._sizing,
            training=self._training,
            watchdog=self._watchdog,
            service=self._service_watch(deployment.router),
            models=self._models,
            loop=self._state,
            term=self._term,
            clock=clock,
        )
        self._page_items = PageItems(self._overview, cluster_of(namespace))
        loop = asyncio.get_running_loop()
        self._loop = loop.create_task(self._run())
        self._watching = loop.create_task(self._overview.watch(lambda: self._polling.quiet))
        self._provisioner = HostProvisioner(
            HostStarter(lambda: self._reshaping.deployment, namespace, first, self._hosts.nodes),
            namespace,
            partial(self._sizing.desired_for_thread, loop),
        )

    # ---- called by others -----------------------------------------------------------------------

    async def report(self, report: LoadReport, wait_s: float) -> PlacementNews | None:
        """Take a router's report; return what is newer than the placement that the router uses.

        Wait for such a placement, and return None if there is none after ``wait_s``.
        """
        self._control.hear(report, self._clock())
        after = report.received or report.placement_id

        def newer() -> PlacementNews | None:
            return self._control.publisher.news(after)

        async with self._published:
            try:
                return await asyncio.wait_for(self._published.wait_for(newer), wait_s)
            except TimeoutError:
                return None

    async def add_model(self, ref: ModelRef, shape: ModelShape) -> list[Granted]:
        """Serve one more model; return the experts that each host is to hold, with their grants.

        Raises ClusterError.
        """
        known = self._models.get(ref.name)
        if known is not None and known != (ref, shape):
            raise ClusterError(
                f"model {ref.name!r}: the cluster serves another model of this name; choose "
                "another name"
            )
        deadline = self._clock() + SETTLE_S
        while not self._control.settled:
            if self._clock() > deadline:
                raise ClusterError(
                    f"model {ref.name!r}: the hosts are not up after {SETTLE_S:g} s; see "
                    "`moesaic status`"
                )
            await asyncio.sleep(TICK_S)
        try:
            self._adopt(ref, shape)
        except ValueError as error:
            raise ClusterError(str(error)) from error
        if ref.path is None:
            for host in list(self._hosts.reports):
                await self._hosts.introduce(host, ref, shape, REPORT_TIMEOUT_S)
        secret = secret_of(self._namespace)
        granted = []
        for host in self._control.view.hosts:
            keys = [key for key in self._control.wanted(host) if key.model == ref.name]
            if keys and host not in self._hosts.reports:
                text = f"model {ref.name!r}: {host} is not up, so no experts can be sent to it"
                raise ClusterError(text)
            if keys:
                entry = self._hosts.reports[host].entry
                granted.append(grant_all(secret, entry, first_versions(keys), self._term))
        return granted

    async def models(self) -> list[tuple[ModelRef, ModelShape]]:
        return list(self._models.values())

    async def progress(self) -> tuple[int, int, str]:
        """Return (replicas held, replicas wanted, first load error)."""
        wanted = {host: self._control.wanted(host) for host in self._control.view.hosts}
        view = self._control.view
        held = sum(view.holds(host, key) for host in view.hosts for key in wanted[host])
        error = next((f"{host}: {why}" for host, why in self._hosts.errors.items()), "")
        lacking = self._control.unplaced
        if lacking and not error:
            error = f"no host has room for {len(lacking)} experts (the first is {lacking[0]}); "
            error += "give hosts more slots or memory, or add hosts"
        return held, sum(map(len, wanted.values())), error

    # ---- operators: see `Operations` ------------------------------------------------------------

    async def plan(self, budget: int | str | None = None) -> PlanReport:
        return await self._operations.plan(budget)

    async def rebalance(self, budget: int | str | None, who: str) -> ChangeReport:
        return await self._operations.rebalance(budget, who)

    async def change(self, number: int | None = None) -> ChangeReport:
        return await self._operations.change(number)

    async def history(self) -> list[ChangeReport]:
        return await self._operations.history()

    async def rollback(self, number: int | None = None) -> ChangeReport:
        return await self._operations.rollback(number)

    async def replicate(self, key: tuple[str, int, int], count: int, who: str) -> ChangeReport:
        return await self._operations.replicate(key, count, who)

    async def pin(self, key: tuple[str, int, int], host: str, who: str) -> ChangeReport:
        return await self._operations.pin(key, host, who)

    async def unpin(self, key: tuple[str, int, int], host: str, who: str) -> ChangeReport:
        return await self._operations.unpin(key, host, who)

    async def drain(self, host: str, who: str) -> ChangeReport:
        return await self._operations.drain(host, who)

    async def undrain(self, host: str, who: str) -> ChangeReport:
        return await self._operations.undrain(host, who)

    async def draining(self, host: str) -> DrainReport:
        return await self._operations.draining(host)

    # ---- updates of weights: see `WeightUpdating` -----------------------------------------------

    async def begin_update(
        self, experts: Sequence[ExpertKey], who: str, timeout_s: float
    ) -> BegunUpdate:
        return await self._updating.begin(experts, who, timeout_s)

    async def grant_update(self, model: str, number: int) -> list[Granted]:
        return await self._updating.grant(model, number)

    async def serve_update(self, model: str, number: int, timeout_s: float) -> WeightUpdateReport:
        return await self._updating.serve(model, number, timeout_s)

    async def abandon_update(self, model: str, number: int) -> None:
        self._updating.abandon(model, number)

    async def revert_update(self, model: str, who: str, timeout_s: float) -> WeightUpdateReport:
        return await self._updating.revert(model, who, timeout_s)

    async def locate_expert(self, key: ExpertKey) -> LocatedExpert:
        return self._updating.locate(key)

    # ---- training: see `Training` ---------------------------------------------------------------

    async def begin_training(self, asked: TrainingRequest) -> BegunTraining:
        return await self._training.begin(asked)

    async def training_news(self, asked: NewsRequest) -> TrainingNews:
        return self._training.news(asked)

    async def publish_training(self, run: int, version: int, timeout_s: float) -> PlacementId:
        return await self._training.publish(run, version, timeout_s)

    async def end_training(self, run: int) -> None:
        self._training.end(run)

    # ---- the pool's size: see `Sizing` ----------------------------------------------------------

    async def desired(self) -> list[str]:
        """Return the names of all hosts there should be."""
        return list((await self._sizing.desired(None, 0.0))[1])

    async def scale(self, count: int, group: int, who: str) -> ScalingReport:
        return await self._sizing.scale(count, group, who)

    async def scaling(self, number: int) -> ScalingReport:
        return await self._sizing.scaling(number)

    # ---- another spec: see `Reshaping` ----------------------------------------------------------

    async def reshape(
        self, before: str, wanted: Deployment, who: str, then: Deployment | None
    ) -> None:
        await self._reshaping.follow(before, wanted, who, then)
        if self._overview.service is not None:
            self._overview.service.close()
        self._overview.service = self._service_watch(wanted.router)

    async def left(self, model: str) -> bool:
        """Return whether some host still knows a model that the cluster serves no more."""
        return self._reshaping.is_left(model)

    # ---- observers: see `Overview` --------------------------------------------------------------

    async def status(self) -> ClusterStatus:
        return self._overview.status()

    async def top(self, count: int) -> Activity:
        return self._overview.top(count)

    async def experts(
        self, model: str | None, layer: int | None, hot: int | None
    ) -> list[ExpertReport]:
        return self._overview.experts(model, layer, hot)

    async def page_items(self, known: FeedRevision | None) -> ItemChanges:
        return self._page_items.since(known)

    async def metrics(self, hot_experts: int) -> MetricsSnapshot:
        return self._overview.metrics(hot_experts)

    async def totals(self) -> LoadTotals:
        return self._overview.totals()

    # ---- the loop -------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            began = time.monotonic()
            try:
                await self._tick()
                self._state.tick_error = ""
                if (took_s := time.monotonic() - began) > SLOW_TICK_S:
                    log.warning("a tick of the controller's loop took %.1f s", took_s)
            except Exception as error:
                # `status` shows the error, whatever it is.
                self._state.tick_error = describe_error(error)
                log.exception("a tick of the controller's loop failed; the next one starts afresh")
            self._watchdog.ticked(self._clock(), failed=bool(self._state.tick_error))
            self._state.ticks += 1
            await self._pause()

    async def _pause(self) -> None:
        """Wait until the next tick is due."""
        await asyncio.sleep(HURRIED_TICK_S)
        control = self._control
        trains = control.training.alive is not None
        calm = trains and control.at_target and not control.leaving
        tick_s = TRAINING_TICK_S if calm else TICK_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._hurried.wait(), tick_s - HURRIED_TICK_S)
        if self._polling.quiet and self._control.is_quiet(self._clock()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), QUIET_TICK_S - TICK_S)
        self._hurried.clear()

    def _hurry(self) -> None:
        self._hurried.set()
        self._wake.set()

    async def _tick(self) -> None:
        observed = await self._polling.round(self._control.view.hosts)
        for host in self._polling.late:
            if not self._control.view.never_seen(host):
                self._hosts.late(host)
        # After a restart of this controller, only the hosts know models that were attached.
        for report in self._hosts.reports.values():
            for ref, shape in report.models:
                if ref.name not in self._models and ref.path is None:
                    try:
                        self._adopt(ref, shape)
                    except ValueError as error:
                        # This model is left out; the others are served.
                        self._hosts.errors[report.entry.host] = str(error)
        self._reshaping.tick()
        now = self._clock()
        published = self._control.note(observed, now)
        self._training.ticked()  # it stores what is served, before any router hears of it
        if published:
            await self._notify()
        commands = self._control.decide(observed, now)
        for host in self._sizing.tick(self._clock()):
            self._polling.forget(host)
            self._hosts.forget(host)
        self._events.tick()
        self._operations.keep_history()
        for command in commands:
            match command:
                case LoadExperts() | Evict() | EndRun():
                    self._orders.start(command)
                case MakePlan():
                    self._planning = asyncio.get_running_loop().create_task(self._plan(command))
                case Publish():
                    await self._notify()

    async def _notify(self) -> None:
        """Answer the routers that wait for a newer placement."""
        async with self._published:
            self._published.notify_all()
        await asyncio.sleep(0)  # they are told before the rest of the tick is decided

    async def _observe(self, host: str, wait_s: float) -> PollResult:
        """Ask a host for its report; the host waits up to ``wait_s`` for something new."""
        if self._control.view.never_seen(host) and not await self._hosts.has_come(host):
            return "late"
        forgetting = self._orders.evicting(host)
        last = self._hosts.reports.get(host)
        known = None if last is None else last.revision
        try:
            asked = self._hosts.handle(host).report.remote(
                self._term, self._orders.evictions(host), known=known, wait_s=wait_s
            )
            report: HostReport = await asyncio.wait_for(asked, wait_s + REPORT_TIMEOUT_S)
        except RayTaskError as failure:
            raise self._orders.cause(failure) from failure
        except (TimeoutError, GetTimeoutError):
            self._hosts.late(host)
            return "late"
        except (RayActorError, ValueError) as error:
            self._hosts.died(host, restarting="unavailable" in str(error).lower())
            return None
        seen = Observation(
            entry=report.entry,
            holdings=without(self._reshaping.own_holdings(host, report), forgetting),
            loading=report.loading > 0 or self._orders.moves_experts(host),
            work=Work(*report.work),
            device_bytes=None if report.card is None else report.card.room_bytes,
            free_bytes=report.free_bytes,
            run=report.run,
            owned=report.owned,
        )
        # Nothing is placed on a host before its listener has answered. What one holds already stays
        # placed: routers reach it from where they are, and judge it themselves.
        if seen.bare and not await self._probing.reached(report.entry):
            self._hosts.unreached(host, report)
            return "late"
        self._hosts.reported(host, report)
        return seen

    async def _plan(self, command: MakePlan) -> None:
        """Run the planner in its own thread: a large pool takes seconds, and ticks go on."""
        found = None
        self._watchdog.plan_began(self._clock())
        try:
            found = await asyncio.to_thread(command.run)
            self._state.plan_error = ""
        except Exception as error:
            # `status` shows the error, whatever it is.
            self._state.plan_error = f"planner: {describe_error(error)}"
            log.exception("the planner failed; the current placement stays in use")
        finally:
            self._watchdog.plan_ended(self._clock(), failed=found is None)
            self._control.planned(command, found, self._clock())
            self._wake.set()

    # ---- small parts ----------------------------------------------------------------------------

    def _service_watch(self, address: str | None) -> ServiceWatch | None:
        start_s = self._reshaping.deployment.spec.timeouts.start_s
        if address is None:
            return None
        return ServiceWatch(self._namespace, address, start_s, clock=self._clock)

    def _adopt(self, ref: ModelRef, shape: ModelShape, *, fits: bool = False) -> None:
        self._control.add_model(shape, on_disk=ref.path is not None, fits=fits)
        self._models[ref.name] = (ref, shape)
        if ref.updates is not None:
            replay(self._control, ref.name, ref.updates, lenient=self._follows_another)
        self._wake.set()
