"""The trace of a call on its way from a router to a host."""

from __future__ import annotations

from ...cluster.routing.events import Send
from ...cluster.tracing.layers import LayerTrace
from ...proto.expert_pb2 import Frame


def trace_send(trace: LayerTrace, send: Send, frame: Frame, *, hedge: bool) -> None:
    """Note a send in the trace of its layer, and name its span in its frame."""
    rows = send.assignment_tk.shape[0]
    span_id = trace.sent(send.seq, send.host, rows=rows, attempt=send.attempt, hedge=hedge)
    if trace.trace_ids and frame.HasField("call"):
        frame.call.trace.span_id = span_id
        frame.call.trace.trace_ids.extend(trace.trace_ids)
