"""Gives lines of the log that name a sampled request the ids of its trace."""

from __future__ import annotations

import logging

from .process_tracer import tracer


class TraceIds(logging.Filter):
    """Adds `trace_id` and `span_id` beside `request_id`, and `trace_ids` beside `requests`."""

    def filter(self, record: logging.LogRecord) -> bool:
        here = tracer()
        if here is None or not here.busy:
            return True
        request_id = getattr(record, "request_id", None)
        context = here.context_of(request_id) if isinstance(request_id, str) else None
        if context is not None:
            record.trace_id, record.span_id = context.trace_id.hex(), context.span_id.hex()
        requests = getattr(record, "requests", None)
        if isinstance(requests, list):
            found = [one for one in map(here.context_of, requests) if one is not None]
            if found:
                record.trace_ids = [one.trace_id.hex() for one in found]
        return True
