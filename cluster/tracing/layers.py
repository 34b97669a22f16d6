"""The layers of a forward pass that has sampled requests: which were slow, and why.

A step serves several requests. Each of those that are sampled has the step's slow layers in its own
trace, with the same ids of spans, so that every trace is complete for whoever looks at it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from .context import SPAN_ID_BYTES
from .spans import Kind, Recorder, Span, Value, error_code
from .stages import RequestTrace

# Of one layer's call. More are sent only if hosts fail or refuse again and again.
MOST_SENDS = 64
# Sampled requests of one step whose calls name them.
MOST_REQUESTS = 8


@dataclass(slots=True)
class TracedSend:
    """What was sent to one host, and what became of it."""

    span_id: bytes
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    error: str = ""


class StepTrace:
    """The sampled requests of one forward pass."""

    def __init__(
        self,
        recorder: Recorder,
        requests: Sequence[RequestTrace],
        *,
        router: str,
        step: int,
        slow_ns: int,
    ) -> None:
        self.layer: LayerTrace | None = None  # the one that is computed now
        self._recorder = recorder
        self._requests = requests[:MOST_REQUESTS]
        self._router = router
        self._step = step
        self._slow_ns = slow_ns
        for request in requests:
            request.step()

    def tracing(self, model: str, layer: int) -> LayerTrace:
        """Return a context in which a layer is computed."""
        about: dict[str, Value] = {
            "moesaic.model": model,
            "moesaic.layer": layer,
            "moesaic.router": self._router,
            "moesaic.step": self._step,
        }
        return LayerTrace(self, self._recorder, self._requests, about, self._slow_ns)


class LayerTrace:
    """One layer's call; its spans are made when it is over.

    They are made if it was slow or failed, or if a host has not answered: that host may still make
    spans, below that of the send.
    """

    def __init__(
        self,
        step: StepTrace,
        recorder: Recorder,
        requests: Sequence[RequestTrace],
        about: dict[str, Value],
        slow_ns: int,
    ) -> None:
        self._step = step
        self._recorder = recorder
        self._requests = requests
        self._about = about
        self._slow_ns = slow_ns
        self._start_ns = 0
        self._sends: dict[int, TracedSend] = {}
        # Of requests that may still have slow layers: hosts make spans for these.
        wanted = [one.context.trace_id for one in requests if one.layers_left > 0]
        self.trace_ids = list(dict.fromkeys(wanted))

    @property
    def shown(self) -> list[str]:
        """The traces' ids for the log."""
        return list(dict.fromkeys(one.context.trace_id.hex() for one in self._requests))

    def sent(self, seq: int, host: str, *, rows: int, attempt: int, hedge: bool) -> bytes:
        """Note a send; return the id of its span, below which its host has spans."""
        span_id = self._recorder.new_id(SPAN_ID_BYTES)
        if len(self._sends) < MOST_SENDS:
            self._sends[seq] = TracedSend(
                span_id,
                self._recorder.now_ns(),
                attributes={
                    "moesaic.host": host,
                    "moesaic.rows": rows,
                    "moesaic.attempt": attempt,
                    "moesaic.hedge": hedge,
                },
            )
        return span_id

    def answered(self, seq: int, queued_us: int, batch_us: int) -> None:
        send = self._over(seq)
        if send is not None:
            send.attributes["moesaic.queued_ms"] = queued_us / 1e3
            send.attributes["moesaic.batch_ms"] = batch_us / 1e3

    def refused(self, seq: int, code: str) -> None:
        send = self._over(seq)
        if send is not None:
            send.error = code

    def _over(self, seq: int) -> TracedSend | None:
        send = self._sends.get(seq)
        if send is not None:
            send.end_ns = self._recorder.now_ns()
        return send

    def __enter__(self) -> None:
        self._start_ns = self._recorder.now_ns()
        self._step.layer = self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._step.layer = None
        now_ns = max(self._recorder.now_ns(), self._start_ns)
        slow = error is not None or now_ns - self._start_ns >= self._slow_ns
        slow = slow or any(not send.end_ns for send in self._sends.values())
        span_id = self._recorder.new_id(SPAN_ID_BYTES) if slow else b""
        done: set[bytes] = set()  # several choices of one request are in one trace
        for request in self._requests:
            again = request.context.trace_id in done
            parent = request.layer(now_ns - self._start_ns, slow=slow and not again)
            if parent is None:
                continue
            done.add(parent.trace_id)
            about = self._about | {"moesaic.calls": len(self._sends)}
            self._recorder.emit(
                Span(
                    parent.trace_id,
                    span_id,
                    parent.span_id,
                    "layer",
                    Kind.INTERNAL,
                    self._start_ns,
                    now_ns,
                    about,
                    error=error_code(error),
                )
            )
            for send in self._sends.values():
                self._recorder.emit(
                    Span(
                        parent.trace_id,
                        send.span_id,
                        span_id,
                        "expert call",
                        Kind.CLIENT,
                        send.start_ns,
                        send.end_ns or now_ns,
                        send.attributes | {"moesaic.answered": send.end_ns > 0},
                        error=send.error,
                    )
                )
