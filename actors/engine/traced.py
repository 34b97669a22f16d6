"""Generation with spans: at the caller's side, and where the tokens are made.

Both wrap a `Generate`, and hand on what it yields.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from ...cluster.tracing.context import TraceContext, parse_traceparent
from ...cluster.tracing.spans import Kind, error_code
from ...cluster.tracing.stages import RequestTrace
from ...cluster.tracing.tracer import Tracer
from ..tracing.process_tracer import tracer
from ..tracing.request_span import request_span
from .engine import Delta, Generate, Sampling


def traced_request(request_id: str) -> RequestTrace | None:
    """Return the trace of a request that is computed in this process; None: it is not sampled."""
    here = tracer()
    return None if here is None else here.following(request_id)


def trace_id_of(sampling: Sampling) -> str | None:
    """Return how the log names the trace of a request; None: it is not sampled."""
    given = sampling.traceparent
    parent = None if given is None else parse_traceparent([given])
    return None if parent is None else parent.trace_id.hex()


def traced_call(generate: Generate, model: str) -> Generate:
    """Return ``generate`` of another process, with a span of the HTTP request for each call."""

    def called(
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        if request_span() is None:
            return generate(request_id, prompt_ids, sampling, already)
        return _called(generate, model, request_id, prompt_ids, sampling, already)

    return called


async def _called(
    generate: Generate,
    model: str,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    already: Sequence[int],
) -> AsyncGenerator[Delta, None]:
    request = request_span()
    assert request is not None
    about = {"moesaic.model": model, "moesaic.resumed_tokens": len(already)}
    span = request.child("call trunk", Kind.CLIENT, about)
    asked = replace(sampling, traceparent=span.context.header)
    error = ""
    try:
        async with aclosing(generate(request_id, prompt_ids, asked, already)) as deltas:
            async for delta in deltas:
                yield delta
    except BaseException as raised:
        error = error_code(raised)
        raise
    finally:
        span.end(error)


def traced_generate(generate: Generate) -> Generate:
    """Return an engine's ``generate``, with the spans of a request's stages."""

    def followed(
        request_id: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        already: Sequence[int] = (),
    ) -> AsyncGenerator[Delta, None]:
        here, given = tracer(), sampling.traceparent
        parent = None if given is None else parse_traceparent([given])
        if here is None or parent is None:
            return generate(request_id, prompt_ids, sampling, already)
        return _followed(here, parent, generate, request_id, prompt_ids, sampling, already)

    return followed


async def _followed(
    here: Tracer,
    parent: TraceContext,
    generate: Generate,
    request_id: str,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    already: Sequence[int],
) -> AsyncGenerator[Delta, None]:
    about = {"moesaic.prompt_tokens": len(prompt_ids), "moesaic.max_tokens": sampling.max_tokens}
    with here.request(request_id, parent, "generate", about) as request:
        async with aclosing(generate(request_id, prompt_ids, sampling, already)) as deltas:
            async for delta in deltas:
                if request is not None and delta.token_ids:
                    request.tokens(len(delta.token_ids))
                yield delta
