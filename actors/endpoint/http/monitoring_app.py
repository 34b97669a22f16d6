"""`/status` and `/metrics` for operators, as an app for an address of its own.

Its answers may name hosts and their addresses, which clients of the endpoint must not see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain
from typing import Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from ....cluster.metrics.engines import engine_families
from ....cluster.metrics.families import exposition
from ....cluster.metrics.pool import pool_families
from ....cluster.metrics.snapshot import MetricsSnapshot
from ....cluster.reports.status import EndpointStatus, EngineStatus
from ....cluster.service.web_guard import WebGuard
from ....proto.errors import Forbidden, MoesaicError, NoAnswer, RequestError
from ..openai.responses import error_response
from .edge import RETRY_AFTER_S, ErrorMiddleware, json_response
from .health import Health
from .metrics import HttpMetrics
from .probes import add_health

logger = logging.getLogger(__name__)

# Longer than each part's own timeout (`trunk_client`), whose error says more. The parts are asked
# at the same time.
STATUS_TIMEOUT_S = 6.0

T = TypeVar("T")


class PoolSource(Protocol):
    """Asks a cluster's controller for what its metrics are made of."""

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        ...

    async def __call__(self) -> MetricsSnapshot:
        """Return the pool as it is now. Raises MoesaicError."""
        ...


def monitoring_app(
    *,
    status: Callable[[], Awaitable[EndpointStatus]],
    engines: Callable[[], Awaitable[Mapping[str, EngineStatus]]],
    metrics: HttpMetrics,
    guard: WebGuard,
    pool: PoolSource | None = None,
    health: Health | None = None,
) -> FastAPI:
    """Create the monitoring app.

    ``status()`` returns what ``/status`` shows, and ``engines()`` each model's engine alone.
    ``pool`` adds the pool's metrics (None: the endpoint serves without one).
    ``health`` answers probes here, too; the endpoint also answers them.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(ErrorMiddleware)
    app.add_middleware(_Guarded, guard=guard)

    if health is not None:
        add_health(app, health)

    @app.get("/status")
    async def get_status() -> Response:
        return json_response(await _in_time(status()))

    @app.get("/metrics")
    async def get_metrics() -> Response:
        # At the same time, since each may take its time. The endpoint's own counts need neither.
        found, snapshot = await asyncio.gather(
            _if_answered(engines(), "the engines"),
            _if_answered(pool(), "the controller") if pool is not None else _nothing(),
        )
        families = chain(
            metrics,
            engine_families(found or {}),
            () if pool is None else pool_families(snapshot),
        )
        text = exposition(families, "" if pool is None else pool.cluster)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(MoesaicError)
    @app.exception_handler(HTTPException)
    async def on_error(request: Request, error: Exception) -> Response:
        return _answer(error)

    return app


async def _in_time(asked: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            return await asked
    except TimeoutError:
        text = f"the cluster's status did not arrive within {STATUS_TIMEOUT_S:g} s; ask again"
        raise NoAnswer(text) from None


async def _if_answered(asked: Awaitable[T], who: str) -> T | None:
    try:
        return await _in_time(asked)
    except MoesaicError as error:
        logger.warning("/metrics lacks the values of %s: %s: %s", who, error.code, error)
        return None


async def _nothing() -> None:
    return None


def _answer(error: Exception) -> Response:
    status_code = None
    if isinstance(error, HTTPException):
        status_code, error = error.status_code, RequestError(error.detail)
    assert isinstance(error, MoesaicError)
    told = error_response(error, words=str(error))
    response = json_response(told, status_code or error.http_status)
    if response.status_code in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


class _Guarded:
    """ASGI middleware: refuses requests that the guard rejects."""

    def __init__(self, app: ASGIApp, guard: WebGuard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            headers = Request(scope).headers
            try:
                self._guard.check(headers.getlist("host"), headers.getlist("origin"))
            except Forbidden as error:
                app = _answer(error)
        await app(scope, receive, send)
