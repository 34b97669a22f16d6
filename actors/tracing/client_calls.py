"""The spans of a client's call to the router service."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ...cluster.expert_keys import LayerKey
from .process_tracer import tracer

COMPUTE = "compute"


def trace_client_call(
    request_id: str, traceparent: Sequence[str], key: LayerKey, rows: int
) -> AbstractContextManager[object]:
    """Return a context that belongs to the client's trace, if it has a sampled one.

    No trace begins here: a call is one layer of a request that only its client knows.
    """
    here = tracer()
    parent = None if here is None else here.given_parent(traceparent)
    if here is None or parent is None:
        return nullcontext()
    about = {"moesaic.model": key.model, "moesaic.layer": key.layer, "moesaic.rows": rows}
    return here.request(request_id, parent, "router call", about, running=COMPUTE)
