"""The controller as observers see it: status, live view, totals and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...cluster.control.control import Control
from ...cluster.control.operations import check_layer, check_model
from ...cluster.control.status_views import HostCounters, HostRates, hottest, standing
from ...cluster.control.watchdog import Vitals, Watchdog
from ...cluster.load.trace import LoadTotals
from ...cluster.placement import ModelRef, ModelShape
from ...proto.errors import ClusterError, in_words
from ..host.report import HostReport
from ..router_service.service_actor import ServiceWatch
from ..runtime.ray_border import cluster_of
from .host_actors import HostActors
from .metrics import PoolMetrics
from .sizing import Sizing

log = logging.getLogger(__name__)

WATCH_S = 1.0
QUIET_WATCH_S = 5.0


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
    """Answers `status`, `top` and recordings, and exports metrics."""

    control: Control
    hosts: HostActors
    sizing: Sizing
    watchdog: Watchdog
    service: ServiceWatch | None
    models: Mapping[str, tuple[ModelRef, ModelShape]]
    loop: LoopState
    term: int
    rates: HostRates = field(default_factory=HostRates)
    clock: Callable[[], float] = time.monotonic

    def status(self) -> dict[str, Any]:
        """Return the whole status as plain values, for people and JSON."""
        placement = self.control.placement
        missing, no_room = self.control.missing(), self.control.no_room()
        vitals = self._vitals(self.clock())
        return {
            "placement": list(placement.number) if placement else None,
            "tick_age_s": round(vitals.tick_age_s, 3),
            "ticks": self.loop.ticks,
            "error": self.loop.error,
            "warnings": vitals.warnings(),
            "watchdog": vitals.describe(),
            "term": self.term,
            "routers": {
                name: None if number is None else list(number)
                for name, number in self.control.publisher.routers(self.clock()).items()
            },
            "router_service": None if self.service is None else self.service.describe(),
            "balance": self._balance_status(),
            "size": self.sizing.status(self.clock()),
            "hosts": [self._host_status(host, no_room) for host in self.control.view.hosts],
            "models": [
                {
                    "name": name,
                    "path": ref.path,
                    "dtype": ref.dtype,
                    "replicas": shape.replicas,
                    "exact": shape.exact,
                    "layers": len(shape.experts),
                    "experts": sum(shape.experts.values()),
                    "asleep": name in self.control.sleep.asleep,
                    "missing_experts": sum(1 for key in missing if key.model == name),
                }
                for name, (ref, shape) in self.models.items()
            ],
            "missing_experts": [f"{key}: {why}" for key, why in list(missing.items())[:10]],
            "unprotected_experts": len(self.control.unprotected()),
        }

    def top(self, count: int) -> dict[str, Any]:
        """Return the current load and the ``count`` hottest experts."""
        now = self.clock()
        control, vitals = self.control, self._vitals(now)
        placement = control.placement
        layers = {} if placement is None else placement.layers
        rates = {key: rate for key in layers if (rate := control.loads.rate(key)) is not None}
        return {
            "placement": list(placement.number) if placement else None,
            "routers": len(control.publisher.routers(now)),
            "moves_pending": vitals.moves_pending,
            "missing_experts": vitals.missing_experts,
            "unprotected_experts": vitals.unprotected_experts,
            "warnings": vitals.warnings(),
            "error": self.loop.error,
            "models": [
                {
                    "model": model,
                    "choices_per_s": round(
                        sum(float(r.sum()) for key, r in rates.items() if key.model == model), 1
                    ),
                    "balancedness_mean": _rounded(self.watchdog.balancedness.get(model), 0),
                    "balancedness_worst": _rounded(self.watchdog.balancedness.get(model), 1),
                }
                for model in sorted(control.models)
            ],
            "hosts": [self._host_glance(host) for host in control.view.hosts],
            "experts": hottest(rates, layers, count),
        }

    def experts(
        self, model: str | None, layer: int | None, hot: int | None
    ) -> list[dict[str, Any]]:
        """Return the experts as `Operating.experts` describes them."""
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
        return standing(layers, control.loads, control.wishes, model=model, layer=layer, hot=hot)

    def totals(self) -> LoadTotals:
        """Return all counts since this controller's start."""
        loads = self.control.loads
        return LoadTotals(term=self.term, counts=loads.totals, hosts=loads.hosts)

    # ---- watching -------------------------------------------------------------------------------

    async def watch(self, namespace: str, is_quiet: Callable[[], bool]) -> None:
        """Export metrics in a task of its own, so that they show a stuck loop."""
        metrics: PoolMetrics | None = None
        watched_at = -QUIET_WATCH_S
        while True:
            now = self.clock()
            if is_quiet() and now - watched_at < QUIET_WATCH_S:
                await asyncio.sleep(WATCH_S)
                continue
            watched_at = now
            try:
                metrics = metrics or PoolMetrics(cluster_of(namespace))
                self.rates.note(
                    {host: _counters(report) for host, report in self.hosts.reports.items()}, now
                )
                metrics.set(self._vitals(now))
                self.loop.watch_error = ""
            except Exception as error:
                # A failure here must not stop the controller. `status` shows it; try again.
                self.loop.watch_error = f"watchdog: {in_words(error)}"
                log.exception("controller: the watchdog failed")
            await asyncio.sleep(WATCH_S)

    def _vitals(self, now: float) -> Vitals:
        hosts = self.control.view.hosts
        return self.watchdog.vitals([self.hosts.state(host) for host in hosts], now)

    # ---- parts ----------------------------------------------------------------------------------

    def _host_glance(self, host: str) -> dict[str, Any]:
        report = self.hosts.reports.get(host)
        return {
            "host": host,
            "state": self.hosts.state(host),
            "experts": 0 if report is None else sum(map(len, report.holdings.values())),
            "queued_rows": 0 if report is None else report.loop.queued_rows,
            **(self.rates.of(host) or {"calls_per_s": 0.0, "rows_per_s": 0.0, "busy": 0.0}),
        }

    def _balance_status(self) -> dict[str, Any]:
        now = self.clock()
        control = self.control
        last = control.changes.all[-1] if control.changes.all else None
        return {
            "auto": control.policy.auto,
            "plan_age_s": None
            if control.planned_at is None
            else round(now - control.planned_at, 1),
            "moves_pending": control.pending(),
            "leaving": sorted(control.leaving),
            "last_change": None if last is None else last.describe(now),
        }

    def _host_status(self, host: str, no_room: Mapping[str, str]) -> dict[str, Any]:
        status: dict[str, Any] = {"host": host, "state": self.hosts.state(host)}
        waiting = self.sizing.waiting(host, self.clock())
        if waiting is not None:
            status["waiting"] = waiting
        if host in no_room:
            status["waiting"] = f"draining; {no_room[host]}"
        report = self.hosts.reports.get(host)
        if report is not None:
            status |= report.describe()
        if host in self.hosts.errors:
            status["error"] = self.hosts.errors[host]
        return status


def _counters(report: HostReport) -> HostCounters:
    return HostCounters(
        incarnation=report.entry.incarnation,
        calls=report.loop.calls,
        rows=report.loop.rows,
        busy_s=report.loop.busy_s,
    )


def _rounded(figures: tuple[float, float] | None, which: int) -> float | None:
    return None if figures is None else round(figures[which], 4)
