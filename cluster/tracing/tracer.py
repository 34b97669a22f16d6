"""The sampled requests of one process, by the ids that its log and its engine call them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from .context import TRACE_ID_BYTES, TraceContext, is_sampled, parse_traceparent
from .layers import StepTrace
from .settings import TraceSettings
from .spans import Kind, OpenSpan, Recorder, Value, error_code
from .stages import PREFILL, RequestTrace

# Sampled requests that one process follows at a time: clients can ask for as many as they like.
MOST_REQUESTS = 64


class Tracer:
    """Decides which requests are traced, and knows those that are in progress."""

    def __init__(self, settings: TraceSettings, recorder: Recorder) -> None:
        self.settings = settings
        self.recorder = recorder
        self.passed_over = 0  # requests that were not traced because too many were already
        self._spans: dict[str, OpenSpan] = {}  # by a request's id
        self._requests: dict[str, RequestTrace] = {}  # those that an engine computes here

    def parent_of(self, headers: Sequence[str]) -> TraceContext | None:
        """Return below which span a request's trace goes on or begins; None: it has none.

        ``headers`` are the values of its `traceparent`.
        """
        given = parse_traceparent(headers)
        if given is None or not self.settings.follow_clients:
            trace_id = self.recorder.new_id(TRACE_ID_BYTES)
            given = TraceContext(trace_id, b"", is_sampled(trace_id, self.settings.sample))
        return given if given.sampled else None

    def given_parent(self, headers: Sequence[str]) -> TraceContext | None:
        """Return the sampled parent that a client named, or None: no trace begins here."""
        given = parse_traceparent(headers)
        follows = given is not None and given.sampled and self.settings.follow_clients
        return given if follows else None

    @contextmanager
    def span(
        self,
        request_id: str,
        parent: TraceContext | None,
        name: str,
        kind: Kind = Kind.SERVER,
        attributes: Mapping[str, Value] | None = None,
    ) -> Iterator[OpenSpan | None]:
        """Open a request's span for a block; None without a parent, and if there are too many.

        Lines of the log that name the request have the ids of this span meanwhile.
        """
        opened = self._open(request_id, parent, name, kind, attributes)
        if opened is None:
            yield None
            return
        try:
            with opened:
                yield opened
        finally:
            self._close(request_id, opened)

    @contextmanager
    def request(
        self,
        request_id: str,
        parent: TraceContext | None,
        name: str,
        attributes: Mapping[str, Value] | None = None,
        *,
        running: str = PREFILL,
    ) -> Iterator[RequestTrace | None]:
        """Follow a request, for a block, through the stages of its computation; as `span`."""
        opened = self._open(request_id, parent, name, Kind.SERVER, attributes)
        if opened is None:
            yield None
            return
        layers = self.settings.layers_per_request
        request = self._requests[request_id] = RequestTrace(self.recorder, opened, layers, running)
        error = ""
        try:
            yield request
        except BaseException as raised:
            error = error_code(raised)
            raise
        finally:
            if self._requests.get(request_id) is request:
                del self._requests[request_id]
            request.end(error)
            self._close(request_id, opened)

    def step(self, router: str, step: int, request_ids: Iterable[str]) -> StepTrace | None:
        """Return the trace of a forward pass that has these requests; None: none is sampled."""
        found = [one for one in map(self._requests.get, request_ids) if one is not None]
        if not found:
            return None
        slow_ns = self.settings.slow_layer_ns
        return StepTrace(self.recorder, found, router=router, step=step, slow_ns=slow_ns)

    def following(self, request_id: str) -> RequestTrace | None:
        """Return the trace of a request that is computed here."""
        return self._requests.get(request_id)

    def context_of(self, request_id: str) -> TraceContext | None:
        """Return the ids that the log gives a request's lines."""
        opened = self._spans.get(request_id)
        return None if opened is None else opened.context

    @property
    def computes(self) -> bool:
        """Whether any request that is computed here is sampled."""
        return bool(self._requests)

    @property
    def busy(self) -> bool:
        """Whether any request that is in progress here is sampled."""
        return bool(self._spans)

    def _open(
        self,
        request_id: str,
        parent: TraceContext | None,
        name: str,
        kind: Kind,
        attributes: Mapping[str, Value] | None,
    ) -> OpenSpan | None:
        if parent is None:
            return None
        if len(self._spans) >= MOST_REQUESTS:
            self.passed_over += 1
            return None
        about = {"moesaic.request_id": request_id, **(attributes or {})}
        opened = self._spans[request_id] = self.recorder.begin(name, parent, kind, about)
        return opened

    def _close(self, request_id: str, opened: OpenSpan) -> None:
        # A client may use an id for two requests at a time.
        if self._spans.get(request_id) is opened:
            del self._spans[request_id]
