"""The monitoring address of a scripted pool, on a free port of this machine, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI

from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.http.monitoring_app import monitoring_app
from moesaic.actors.endpoint.http.monitoring_server import monitoring
from moesaic.actors.page.broadcast import Broadcast
from moesaic.actors.page.page_app import PageSource, add_page
from moesaic.actors.runtime.ports import free_port
from moesaic.cluster.reports.status import EndpointStatus, EngineStatus
from moesaic.cluster.service.web_guard import WebGuard

HERE = "127.0.0.1"


async def _status() -> EndpointStatus:
    return EndpointStatus(healthy=True, engines={}, cluster=None)


async def _engines() -> dict[str, EngineStatus]:
    return {}


async def own_items() -> Mapping[str, Any]:
    work = {
        "running_requests": 212,
        "waiting_requests": 3,
        "parked_requests": 0,
        "steps": int(asyncio.get_running_loop().time() * 38),
        "restarts": 0,
        "beat_age_s": 0.0,
        "free_cache_fraction": 0.37,
    }
    engine = {"healthy": True, "starts_on_demand": False, "last_error": None, "work": work}
    return {"endpoint": {"running": 215, "ending": False}, "engines": {"kimi-k2": engine}}


def page_app(source: PageSource) -> tuple[FastAPI, Broadcast]:
    """Return the monitoring app with the page of ``source``."""
    app = monitoring_app(
        status=_status, engines=_engines, metrics=HttpMetrics(), guard=WebGuard.of(HERE)
    )
    return app, add_page(app, source, own_items)


@contextlib.asynccontextmanager
async def served_page(
    source: PageSource, port: int = 0
) -> AsyncGenerator[tuple[str, Broadcast], None]:
    """Serve the page, and yield its address."""
    app, broadcast = page_app(source)
    port = port or free_port(HERE)
    async with monitoring(app, HERE, port, broadcast.close):
        yield f"http://{HERE}:{port}", broadcast
