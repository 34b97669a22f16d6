"""Spans: what was done for a request, from when to when, and below which other span."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Self

from .context import SPAN_ID_BYTES, TraceContext

Value = str | bool | int | float
# Of one span. Names and values are the code's own, so the limit is never reached.
MOST_EVENTS = 32


class Kind(IntEnum):
    """The kinds of spans that there are, with OTLP's numbers."""

    INTERNAL = 1
    SERVER = 2
    CLIENT = 3


@dataclass(slots=True)
class Span:
    """One span of one trace; times are nanoseconds of Unix time."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes  # empty: the trace begins here
    name: str
    kind: Kind
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    events: list[tuple[int, str]] = field(default_factory=list)
    error: str = ""  # its code; empty: none


@dataclass(frozen=True, slots=True)
class Recorder:
    """What makes spans: where they go, the clock, and the source of their ids.

    Where several threads work for one request, ``new_lock`` makes locks between them.
    """

    emit: Callable[[Span], None]
    now_ns: Callable[[], int]
    new_id: Callable[[int], bytes]  # that many random bytes
    new_lock: Callable[[], AbstractContextManager[object]] = nullcontext

    def begin(
        self,
        name: str,
        parent: TraceContext,
        kind: Kind = Kind.INTERNAL,
        attributes: Mapping[str, Value] | None = None,
        start_ns: int | None = None,
    ) -> OpenSpan:
        """Begin a span below ``parent``, now or at ``start_ns``."""
        return OpenSpan(
            self,
            Span(
                parent.trace_id,
                self.new_id(SPAN_ID_BYTES),
                parent.span_id,
                name,
                kind,
                self.now_ns() if start_ns is None else start_ns,
                attributes=dict(attributes or {}),
            ),
        )


class OpenSpan:
    """A span that has begun; as a context manager it ends with its block."""

    def __init__(self, recorder: Recorder, span: Span) -> None:
        self.span = span
        self._recorder = recorder

    @property
    def context(self) -> TraceContext:
        return TraceContext(self.span.trace_id, self.span.span_id)

    def set(self, **attributes: Value) -> None:
        """Set attributes; a name's double underscores stand for dots."""
        for name, value in attributes.items():
            self.span.attributes[name.replace("__", ".")] = value

    def event(self, name: str) -> None:
        if len(self.span.events) < MOST_EVENTS:
            self.span.events.append((self._recorder.now_ns(), name))

    def child(
        self, name: str, kind: Kind = Kind.INTERNAL, attributes: Mapping[str, Value] | None = None
    ) -> OpenSpan:
        return self._recorder.begin(name, self.context, kind, attributes)

    def end(self, error: str = "", *, at_ns: int | None = None) -> None:
        """End the span, now or ``at_ns``; a second call changes nothing."""
        if self.span.end_ns:
            return
        end_ns = self._recorder.now_ns() if at_ns is None else at_ns
        self.span.end_ns = max(end_ns, self.span.start_ns)  # a clock may be set back
        self.span.error = error
        self._recorder.emit(self.span)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(error_code(error))


def error_code(error: BaseException | None) -> str:
    """Return how a span names an error; empty for none, and where a client has left."""
    if error is None or not isinstance(error, Exception):
        return ""  # a generator that is closed, or a task that is cancelled
    return str(getattr(error, "code", type(error).__name__))
