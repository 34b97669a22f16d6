"""What an ingress serves at its monitoring address: status, metrics, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ....cluster.reports.status import ClusterStatus, EndpointStatus, EngineStatus
from ....cluster.service.web_guard import WebGuard
from ....cluster.spec.monitoring import MonitoringSpec
from ...endpoint.http.gate import Gate
from ...endpoint.http.health import Health
from ...endpoint.http.metrics import HttpMetrics
from ...endpoint.http.monitoring_app import PoolSource, monitoring_app
from ...endpoint.http.monitoring_server import monitoring
from ...page.page_app import PageSource, add_page

if TYPE_CHECKING:
    from starlette.types import StatelessLifespan

ClusterStatusSource = Callable[[], Awaitable[ClusterStatus]]


class _Asked(Protocol):
    async def status(self) -> EngineStatus: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """The parts of an ingress that its monitoring address shows."""

    trunks: Mapping[str, _Asked]
    cluster: ClusterStatusSource | None
    page: PageSource | None
    pool: PoolSource | None
    gate: Gate

    def lifespan(
        self,
        at: MonitoringSpec,
        metrics: HttpMetrics,
        health: Health,
        *,
        allowed_hosts: Collection[str],
        own_hosts: Collection[str],
    ) -> StatelessLifespan[Any]:
        """Return a lifespan that serves the address as long as the ingress's app runs."""
        app = monitoring_app(
            status=self._status,
            engines=self._engines,
            metrics=metrics,
            pool=self.pool,
            health=health,
            guard=WebGuard.of(at.host, allowed_hosts=allowed_hosts, own=own_hosts),
        )
        broadcast = None if self.page is None else add_page(app, self.page, self._own_items)

        def run(_: Any) -> AbstractAsyncContextManager[None]:
            if broadcast is None:
                return monitoring(app, at.host, at.port)
            return monitoring(app, at.host, at.port, broadcast.close)

        return run

    async def _engines(self) -> dict[str, EngineStatus]:
        found = await asyncio.gather(*(trunk.status() for trunk in self.trunks.values()))
        return dict(zip(self.trunks, found, strict=True))

    async def _status(self) -> EndpointStatus:
        # At the same time, since each may take QUESTION_TIMEOUT_S.
        engines, cluster = await asyncio.gather(self._engines(), self._cluster())
        healthy = all(one.healthy for one in engines.values())
        return EndpointStatus(healthy=healthy, engines=engines, cluster=cluster)

    async def _cluster(self) -> ClusterStatus | None:
        return None if self.cluster is None else await self.cluster()

    async def _own_items(self) -> dict[str, Any]:
        """Return the items of the page that only the ingress knows."""
        engines = await self._engines()
        return {
            "endpoint": {"running": self.gate.running, "ending": self.gate.ending},
            "engines": {name: one.model_dump(mode="json") for name, one in engines.items()},
        }
