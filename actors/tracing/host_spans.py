"""The spans of an expert host: how long a call waited in its queue, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...cluster.tracing.context import SPAN_ID_BYTES, TRACE_ID_BYTES, TraceContext
from ...cluster.tracing.layers import MOST_REQUESTS
from ...cluster.tracing.spans import Kind, Value
from ...cluster.tracing.tracer import Tracer
from ...proto.expert_pb2 import Call, Frame
from .process_tracer import tracer


class PendingCall(Protocol):
    """A call that waits for its answer; ``arrived`` is a moment of the host's clock, in seconds."""

    frame: Frame
    arrived: float


def trace_batch(host: str, pendings: Sequence[PendingCall], began: float, batch_us: int) -> None:
    """Make the spans of calls that have just been computed, if they are traced and were slow.

    Their computation ``began`` at that moment of the host's clock. A router makes spans of a layer
    that took as long as its host, so the parent of these exists.
    """
    here = tracer()
    if here is None:
        return
    for pending in pendings:
        if pending.frame.call.HasField("trace"):
            about: dict[str, Value] = {"moesaic.host": host, "moesaic.batch_calls": len(pendings)}
            _trace_call(here, pending.frame.call, about, began - pending.arrived, batch_us)


def _trace_call(
    here: Tracer, call: Call, about: dict[str, Value], queued_s: float, batch_us: int
) -> None:
    batch_ns, queued_ns = batch_us * 1000, int(max(0.0, queued_s) * 1e9)
    if batch_ns + queued_ns < here.settings.slow_layer_ns:
        return
    about |= {"moesaic.layer": call.layer, "moesaic.rows": call.rows}
    end_ns = here.recorder.now_ns()
    begun_ns = end_ns - batch_ns
    for parent in _parents(call):
        for name, start_ns, until_ns in (
            ("host queue", begun_ns - queued_ns, begun_ns),
            ("host compute", begun_ns, end_ns),
        ):
            opened = here.recorder.begin(name, parent, Kind.SERVER, about, start_ns)
            opened.end(at_ns=until_ns)


def _parents(call: Call) -> Iterable[TraceContext]:
    """Yield the router's span for a call in each trace; ids that are none are ignored."""
    if len(call.trace.span_id) != SPAN_ID_BYTES:
        return
    for trace_id in call.trace.trace_ids[:MOST_REQUESTS]:
        if len(trace_id) == TRACE_ID_BYTES:
            yield TraceContext(trace_id, call.trace.span_id)
