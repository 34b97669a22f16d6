"""A sampled request in the process that computes it: one stage after the other.

    queue -> prefill -> decode -> end
    queue <- expert wait <- prefill or decode, when an expert is missing

A stage is one span, however many tokens and steps it has: it counts them.
"""

from __future__ import annotations

from .context import TraceContext
from .spans import OpenSpan, Recorder

QUEUE, PREFILL, DECODE, EXPERT_WAIT = "queue", "prefill", "decode", "expert wait"
# Of one request. One that waits for experts again and again has many.
MOST_STAGES = 64


class RequestTrace:
    """The spans of one request; any thread may call its methods."""

    def __init__(
        self, recorder: Recorder, whole: OpenSpan, layers: int, running: str = PREFILL
    ) -> None:
        """Begin with the stage `QUEUE` below the span ``whole``, which `end` ends.

        At most ``layers`` slow layers get spans. ``running`` is the stage that begins with a
        request's first step.
        """
        self.layers_left = layers
        self._recorder = recorder
        self._whole = whole
        self._running = running
        self._lock = recorder.new_lock()
        self._stages = 0
        self._left_out = 0
        self._layers_left_out = 0
        self._stage: OpenSpan | None = None
        self._tokens = self._steps = self._layers = self._layers_ns = 0
        self._next(QUEUE)

    @property
    def context(self) -> TraceContext:
        return self._whole.context

    def step(self) -> None:
        """Take note that a forward pass begins that has the request."""
        with self._lock:
            if self._name == QUEUE:
                self._next(self._running)
            self._steps += 1

    def tokens(self, count: int) -> None:
        """Take note of new tokens."""
        with self._lock:
            if self._name in (QUEUE, PREFILL):
                self._next(DECODE)
            self._tokens += count

    def parked(self) -> None:
        """Take note that the request waits outside the batch for an expert."""
        with self._lock:
            self._next(EXPERT_WAIT)

    def unparked(self) -> None:
        with self._lock:
            if self._name == EXPERT_WAIT:
                self._next(QUEUE)

    def layer(self, took_ns: int, *, slow: bool) -> TraceContext | None:
        """Take note of a layer's call; return the span below which it gets one, or None."""
        with self._lock:
            self._layers += 1
            self._layers_ns += took_ns
            if not slow:
                return None
            if self.layers_left <= 0:
                self._layers_left_out += 1
                return None
            self.layers_left -= 1
            return (self._stage or self._whole).context

    def end(self, error: str = "") -> None:
        with self._lock:
            self._end_stage()
            if self._left_out:
                self._whole.set(moesaic__stages_left_out=self._left_out)
            if self._layers_left_out:
                self._whole.set(moesaic__layers_left_out=self._layers_left_out)
            self._whole.end(error)

    @property
    def _name(self) -> str:
        return "" if self._stage is None else self._stage.span.name

    def _next(self, name: str) -> None:
        if self._whole.span.end_ns:
            return  # the engine's thread may be a step behind its caller
        self._end_stage()
        self._stage = self._whole.child(name)

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage is None:
            return
        if self._steps:
            stage.set(moesaic__steps=self._steps)
        if self._tokens:
            stage.set(moesaic__tokens=self._tokens)
        if self._layers:
            stage.set(moesaic__layers=self._layers, moesaic__layers_ms=self._layers_ns / 1e6)
        self._tokens = self._steps = self._layers = self._layers_ns = 0
        self._stages += 1
        if self._stages > MOST_STAGES:
            self._left_out += 1
            return
        stage.end()
