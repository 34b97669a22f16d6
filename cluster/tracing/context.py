"""W3C Trace Context: the `traceparent` header, and which new traces are sampled.

https://www.w3.org/TR/trace-context/ says what a header has to look like, and that one that does not
is ignored, as if the request had none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HEADER = "traceparent"
TRACE_ID_BYTES, SPAN_ID_BYTES = 16, 8

_SAMPLED = 0x01
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
# The part of a trace's id that decides whether it is sampled: its last 56 bits are random.
_RANDOM_BYTES = 7


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span's place: the trace that it belongs to, and its own id."""

    trace_id: bytes
    span_id: bytes
    sampled: bool = True

    @property
    def header(self) -> str:
        """The value of a `traceparent` header that names this span as the parent."""
        return f"00-{self.trace_id.hex()}-{self.span_id.hex()}-{_SAMPLED * self.sampled:02x}"


def parse_traceparent(values: Sequence[str]) -> TraceContext | None:
    """Return what the `traceparent` headers of one request say; None: nothing that counts.

    A version that is not known yet is read as far as version 00 goes.
    """
    if len(values) != 1:
        return None
    found = _FORM.fullmatch(values[0].strip(" \t"))
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    context = TraceContext(
        bytes.fromhex(trace_id), bytes.fromhex(span_id), bool(int(flags, 16) & _SAMPLED)
    )
    # An id of zeros alone is invalid.
    return context if any(context.trace_id) and any(context.span_id) else None


def is_sampled(trace_id: bytes, share: float) -> bool:
    """Return whether a new trace belongs to the ``share`` (0 to 1) of traces that is kept.

    Services that decide by the same rule of OpenTelemetry decide alike about the same trace.
    """
    most = 1 << (8 * _RANDOM_BYTES)
    return int.from_bytes(trace_id[-_RANDOM_BYTES:]) >= round((1.0 - share) * most)
