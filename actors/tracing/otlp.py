"""Spans in OTLP's format, the protobuf messages of `opentelemetry-proto`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from ...cluster.tracing.spans import Span, Value

_SCOPE = "moesaic"


def encoded(resource: Mapping[str, Value], spans: Sequence[Span]) -> bytes:
    """Return the body of a request that exports ``spans`` of the process ``resource``."""
    request = ExportTraceServiceRequest()
    of_process = request.resource_spans.add()
    of_process.resource.attributes.extend(_attributes(resource))
    scope = of_process.scope_spans.add()
    scope.scope.name = _SCOPE
    scope.spans.extend(map(_span, spans))
    return request.SerializeToString()


def rejected(answer: bytes) -> tuple[int, str]:
    """Return how many spans a collector has not taken, and why. Raises ValueError."""
    response = ExportTraceServiceResponse()
    try:
        response.ParseFromString(answer)
    except Exception as error:
        # Each implementation of protobuf has an error of its own.
        raise ValueError(f"the collector's answer is not OTLP: {error}") from error
    partial = response.partial_success
    return max(0, partial.rejected_spans), partial.error_message


def _span(span: Span) -> OtlpSpan:
    made = OtlpSpan(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_span_id=span.parent_id,
        name=span.name,
        kind=cast("OtlpSpan.SpanKind.ValueType", int(span.kind)),
        start_time_unix_nano=span.start_ns,
        end_time_unix_nano=span.end_ns,
        flags=1,  # sampled
        attributes=_attributes(span.attributes),
        events=[OtlpSpan.Event(time_unix_nano=at, name=name) for at, name in span.events],
    )
    if span.error:
        made.status.code = Status.STATUS_CODE_ERROR
        made.status.message = span.error
    return made


def _attributes(values: Mapping[str, Value]) -> list[KeyValue]:
    return [KeyValue(key=name, value=_value(value)) for name, value in values.items()]


def _value(value: Value) -> AnyValue:
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(string_value=value)
