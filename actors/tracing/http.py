"""The span of an HTTP request to the endpoint."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...cluster.tracing.context import HEADER
from ...cluster.tracing.spans import OpenSpan
from .process_tracer import tracer
from .request_span import end_request_span, set_request_span

TRACE_ID_HEADER = "x-trace-id"


class TraceMiddleware:
    """ASGI middleware that opens the span of a sampled request; others pass as they are.

    It stands inside of the middleware that gives requests their ids. Answers to sampled requests
    have the trace's id in a header.
    """

    def __init__(self, app: ASGIApp, passes: Callable[[Scope], bool]) -> None:
        """Wrap ``app``; ``passes`` says which requests are never traced."""
        self._app = app
        self._passes = passes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = tracer()
        if here is None or scope["type"] != "http" or self._passes(scope):
            await self._app(scope, receive, send)
            return
        parent = here.parent_of(Headers(scope=scope).getlist(HEADER))
        identity = scope.get("state", {}).get("request_id", "")
        # Clients may write any method or path, so only the route's own become attributes.
        with here.span(identity, parent, "HTTP request") as span:
            if span is None:
                await self._app(scope, receive, send)
                return
            await self._traced(span, scope, receive, send)

    async def _traced(self, span: OpenSpan, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[TRACE_ID_HEADER] = span.span.trace_id.hex()
                span.set(http__response__status_code=status)
                span.event("answer begins")
            await send(message)

        token = set_request_span(span)
        try:
            await self._app(scope, receive, noting)
        finally:
            end_request_span(token)
            path = getattr(scope.get("route"), "path", "")
            if path:
                span.set(http__request__method=scope["method"], http__route=path)
                span.span.name = f"{scope['method']} {path}"
            if status >= 500:
                span.end(f"HTTP {status}")
