"""Tracers whose spans a test sees at once, with a clock and ids of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from moesaic.actors.tracing.process_tracer import use_tracer
from moesaic.cluster.tracing.context import TraceContext
from moesaic.cluster.tracing.settings import TraceSettings
from moesaic.cluster.tracing.spans import Recorder, Span
from moesaic.cluster.tracing.tracer import Tracer

SETTINGS = TraceSettings(endpoint="http://collector:4318", sample=1.0, slow_layer_ms=0.0)
MS = 1_000_000
PARENT = TraceContext(b"t" * 16, b"p" * 8)


@dataclass
class Recording:
    """A tracer, and the spans that have ended, in this order."""

    settings: TraceSettings = SETTINGS
    spans: list[Span] = field(default_factory=list)
    now_ns: int = 1_000 * MS
    ids: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        recorder = Recorder(
            self.spans.append,
            lambda: self.now_ns,
            lambda size: next(self.ids).to_bytes(size),
            threading.Lock,
        )
        self.recorder = recorder
        self.tracer = Tracer(self.settings, recorder)

    def wait(self, ms: float) -> None:
        self.now_ns += round(ms * MS)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span


def recording(**settings: float) -> Recording:
    return Recording(replace(SETTINGS, **settings))  # pyright: ignore[reportArgumentType]


@contextmanager
def traced(found: Recording | None = None) -> Iterator[Recording]:
    """Trace in this process into ``found``."""
    found = found or Recording()
    use_tracer(found.tracer)
    try:
        yield found
    finally:
        use_tracer(None)


def took_ms(span: Span) -> float:
    return (span.end_ns - span.start_ns) / MS
