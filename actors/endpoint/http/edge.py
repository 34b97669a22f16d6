"""What all paths share: who may ask, request ids, errors, SSE, disconnects."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ....cluster.service.web_guard import WebGuard
from ....proto.errors import Forbidden, InternalError, MoesaicError, SlowBody
from ...tracing.http import TRACE_ID_HEADER
from ..openai.responses import ErrorResponse, error_response
from .metrics import HttpMetrics
from .probes import is_probe

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

T = TypeVar("T")


def json_response(content: BaseModel, status_code: int = 200) -> Response:
    return Response(
        content.model_dump_json(), status_code=status_code, media_type="application/json"
    )


def error_answer(
    error: Exception, identity: str = "", *, status_code: int | None = None
) -> Response:
    """Return the response for an error.

    What the client must not see of it is logged under the request's id, ``identity``.
    """
    if status_code is None:
        known = error if isinstance(error, MoesaicError) else InternalError()
        status_code = known.http_status
    words = told(error, identity, status_code)
    response = json_response(words, status_code)
    if status_code in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    if isinstance(error, SlowBody):
        # Otherwise the connection would stay open for the rest of the body.
        response.headers["Connection"] = "close"
    return response


def told(error: Exception, identity: str, status: int | None = None) -> ErrorResponse:
    """Log an error, and return the client's message about it.

    ``status`` is None where the answer had begun. Messages for clients may quote the request, so
    they are not logged.
    """
    ids = {"request_id": identity, "status": status}
    if not isinstance(error, MoesaicError):
        logger.error(
            "request %s: unexpected error",
            identity,
            exc_info=error,
            extra=ids | {"code": InternalError.__name__},
        )
        return error_response(InternalError(), identity)
    ids |= {"code": error.code}
    if not error.for_clients:
        logger.warning("request %s: %s: %s", identity, error.code, error, extra=ids)
    else:
        logger.info("request %s failed: %s", identity, error.code, extra=ids)
    return error_response(error, identity)


def log_request(request: Request, model: str, *, prompt_tokens: int, choices: int) -> None:
    """Log what a request asks for, at the debug level; never its text."""
    if logger.isEnabledFor(logging.DEBUG):
        identity = request_id(request)
        logger.debug(
            "request %s goes to model %s",
            identity,
            model,
            extra={
                "request_id": identity,
                "model": model,
                "prompt_tokens": prompt_tokens,
                "choices": choices,
            },
        )


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; cancel it and raise ClientDisconnect if the client leaves.

    The body must have been read.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def event_stream(
    request: Request, chunks: AsyncGenerator[BaseModel, None]
) -> StreamingResponse:
    """Return an SSE response.

    An error before the first chunk is raised; a later one becomes an event.
    """
    events = _events(chunks, request_id(request))
    try:
        first = await unless_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(first, events)


async def _events(
    chunks: AsyncGenerator[BaseModel, None], identity: str
) -> AsyncGenerator[str, None]:
    started = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
                started = True
        except Exception as error:
            # The answer has begun: whatever it is becomes its last event, and is logged.
            if not started:
                raise
            yield f"data: {told(error, identity).model_dump_json()}\n\n"
            return
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        self._first, self._events = first, events
        # Without these, proxies such as nginx buffer the events.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._body(), media_type="text/event-stream", headers=headers)

    async def _body(self) -> AsyncGenerator[str, None]:
        yield self._first
        async for event in self._events:
            yield event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Closed here and not by the garbage collector: closing cancels the request in the engine.
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def request_id(request: Request) -> str:
    """Return the request's id; "" where the app runs without `EdgeMiddleware`."""
    return request.scope.get("state", {}).get("request_id", "")


def began(request: Request) -> float:
    """Return when the request arrived, by `time.perf_counter`."""
    return request.scope["state"]["began"]


def allow_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins use the endpoint from within a browser.

    Call it after adding `ErrorMiddleware`, so that the errors that it words have the CORS headers,
    too.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        # Any header: each client library has some of its own (x-stainless-os).
        allow_headers=("*",),
        expose_headers=(_REQUEST_ID_HEADER, TRACE_ID_HEADER, "retry-after"),
    )


def _log_answer(scope: Scope, path: str, status: int) -> None:
    """Log that an answer begins; ``path`` is the route's, since clients may write anything."""
    identity = scope["state"]["request_id"]
    logger.debug(
        "request %s gets its answer",
        identity,
        extra={
            "request_id": identity,
            "method": scope["method"],
            "path": path,
            "status": status,
            "took_ms": round(1e3 * (time.perf_counter() - scope["state"]["began"]), 3),
        },
    )


class ErrorMiddleware:
    """ASGI middleware: turns each unexpected exception into a proper error response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            # Whatever it is becomes an answer, and is logged.
            if scope["type"] != "http" or started:
                raise
            await error_answer(error, request_id(Request(scope)))(scope, receive, send)


class EdgeMiddleware:
    """The outermost ASGI middleware.

    It gives each request an id, refuses those that the guard rejects, and counts the answers.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, guard: WebGuard) -> None:
        self._app = app
        self._metrics = metrics
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        asked = request.headers.get(_REQUEST_ID_HEADER, "")
        identity = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["began"] = identity, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_REQUEST_ID_HEADER] = identity
                # Clients choose unknown paths; as "other" they cannot create labels without bound.
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._metrics.answered(path, message["status"])
                if logger.isEnabledFor(logging.DEBUG):
                    _log_answer(scope, path, message["status"])
            await send(message)

        try:
            headers = request.headers
            # A kubelet sends probes with the pod's address as Host; the answers hold no secret.
            if not is_probe(scope):
                self._guard.check(headers.getlist("host"), headers.getlist("origin"))
        except Forbidden as error:
            await error_answer(error, identity)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)
