"""The span of the HTTP request that a task works for, and spans below it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token

from ...cluster.tracing.spans import OpenSpan

_NOTHING = nullcontext()
_request: ContextVar[OpenSpan | None] = ContextVar("traced_request", default=None)


def request_span() -> OpenSpan | None:
    """Return the span of the HTTP request that is handled now; None: it is not sampled."""
    return _request.get()


def set_request_span(span: OpenSpan) -> Token[OpenSpan | None]:
    """Handle a sampled request from now on; `end_request_span` takes what this returns."""
    return _request.set(span)


def end_request_span(token: Token[OpenSpan | None]) -> None:
    _request.reset(token)


def stage(name: str) -> AbstractContextManager[object]:
    """Return a context that is a span of the HTTP request that is handled now."""
    request = _request.get()
    return _NOTHING if request is None else request.child(name)
