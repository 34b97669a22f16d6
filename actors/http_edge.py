"""What every endpoint shares at the edge: bounded bodies, request ids, errors, SSE, disconnects."""

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

from ..proto.errors import BodyTooLarge, InternalError, MoesaicError, in_words
from .http_metrics import HttpMetrics
from .http_responses import error_response

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

T = TypeVar("T")


def json_response(content: BaseModel, status_code: int = 200) -> Response:
    return Response(
        content.model_dump_json(), status_code=status_code, media_type="application/json"
    )


def error_answer(error: MoesaicError, *, status_code: int | None = None) -> Response:
    status_code = status_code or error.http_status
    response = json_response(error_response(error), status_code)
    if status_code in (429, 503):
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises BodyTooLarge before more than ``max_bytes`` are in memory."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if not declared.isdigit() or int(declared) > max_bytes:
        raise BodyTooLarge(f"the body has {declared} bytes; {max_bytes} are allowed")
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes")
    return bytes(body)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away (ClientDisconnect).

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
    """An SSE response; an error before the first chunk is raised, a later one is an event."""
    events = _events(chunks)
    try:
        first = await unless_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(first, events)


async def _events(chunks: AsyncGenerator[BaseModel, None]) -> AsyncGenerator[str, None]:
    started = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
                started = True
        except Exception as error:
            if not started:
                raise
            known = error if isinstance(error, MoesaicError) else _internal(error)
            yield f"data: {error_response(known).model_dump_json()}\n\n"
            return
    yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    def __init__(self, first: str, events: AsyncGenerator[str, None]) -> None:
        self._first, self._events = first, events
        # Proxies (nginx) would otherwise collect the pieces.
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


def _internal(error: Exception) -> InternalError:
    logger.error("unexpected error", exc_info=error)
    return InternalError(in_words(error))


def request_id(request: Request) -> str:
    return request.scope["state"]["request_id"]


def began(request: Request) -> float:
    """When it came, by `time.perf_counter`."""
    return request.scope["state"]["began"]


def allow_cors(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these origins use the endpoint from within a browser. To be called after Edge is
    added, so that errors that Edge words have the headers, too."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        # Whatever a page asks to send: each client library has headers of its own (x-stainless-os).
        allow_headers=("*",),
        expose_headers=(_REQUEST_ID_HEADER, "retry-after"),
    )


class Edge:
    """ASGI middleware: gives each request an id, each unexpected error a proper answer, and counts
    the answers."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Request(scope).headers.get(_REQUEST_ID_HEADER, "")
        identity = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["began"] = identity, time.perf_counter()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[_REQUEST_ID_HEADER] = identity
                # A path that nobody serves is anybody's words.
                route = scope.get("route")
                self._metrics.answered(getattr(route, "path", "other"), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if started:
                raise
            await error_answer(_internal(error))(scope, receive, send_with_id)
