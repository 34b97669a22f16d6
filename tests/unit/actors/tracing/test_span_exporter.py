"""The queue of spans: bounded, in no one's way, and open about what it drops."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from moesaic.actors.tracing import exporter
from moesaic.actors.tracing.exporter import (
    BATCH,
    TRIES,
    HttpPost,
    NotTaken,
    SpanExporter,
    encoder,
)
from moesaic.actors.tracing.otlp import encoded
from moesaic.actors.tracing.process_tracer import exporter_headers
from moesaic.cluster.tracing.spans import Kind, Span
from moesaic.proto.errors import SpecError
from tests.helpers.pool.transports import settles
from tests.helpers.tracing.collector import collector

LOGGER = "moesaic.actors.tracing.exporter"
_HEADERS = {"x-token": "abc"}


def span(number: int = 1) -> Span:
    return Span(b"t" * 16, number.to_bytes(8), b"", "name", Kind.SERVER, 10, 20)


class Target:
    """Takes batches, or does what a test says."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.tries = 0
        self.error: Exception | None = None
        self.refuses = 0
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.inside = threading.Event()

    def encode(self, batch: list[Span]) -> bytes:
        return bytes(len(batch))

    def post(self, body: bytes, timeout_s: float) -> int:
        self.tries += 1
        self.inside.set()
        assert self.goes_on.wait(30)
        if self.error is not None:
            raise self.error
        self.taken.append(len(body))
        return self.refuses


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "FIRST_PAUSE_S", 0.001)


@contextmanager
def exporting(most: int = 4096) -> Iterator[tuple[SpanExporter, Target]]:
    target = Target()
    made = SpanExporter("there", target.encode, target.post, most=most, interval_s=0.01)
    try:
        yield made, target
    finally:
        target.goes_on.set()
        made.close(10.0)
        assert not made._thread.is_alive()


def test_what_is_emitted_arrives_and_what_waits_at_the_end_too() -> None:
    with exporting() as (made, target):
        for number in range(10):
            made.emit(span(number))
        assert settles(lambda: made.counts().exported == 10)
        made.emit(span())
    assert sum(target.taken) == 11
    assert made.counts().dropped == 0


def test_batches_have_a_limit() -> None:
    with exporting() as (made, target):
        target.goes_on.clear()
        made.emit(span())
        assert target.inside.wait(10)
        for number in range(2 * BATCH):
            made.emit(span(number))
        target.goes_on.set()
        assert settles(lambda: made.counts().exported == 2 * BATCH + 1)
    assert max(target.taken) == BATCH


def test_a_full_queue_drops_what_comes_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER), exporting(most=5) as (made, target):
        target.goes_on.clear()
        made.emit(span())
        assert target.inside.wait(10)
        for number in range(100):
            made.emit(span(number))
        assert made.counts() == exporter.ExportCounts(exported=0, dropped=95, waiting=5)
        target.goes_on.set()
        assert settles(lambda: made.counts().waiting == 0)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "spans are dropped: there: its queue is full",
        "there takes spans again; 95 were dropped",
    ]


def test_a_collector_that_may_take_them_later_is_asked_again() -> None:
    with exporting() as (made, target):
        target.error = NotTaken("503", again=True)
        made.emit(span())
        assert settles(lambda: made.counts().dropped == 1)
        assert target.tries == TRIES
        target.error = NotTaken("400", again=False)
        made.emit(span())
        assert settles(lambda: made.counts().dropped == 2)
        assert target.tries == TRIES + 1
        target.error = None
        made.emit(span())
        assert settles(lambda: made.counts().exported == 1)


def test_a_defect_of_the_encoder_ends_no_thread() -> None:
    with exporting() as (made, target):
        target.error = KeyError("a defect")
        made.emit(span())
        assert settles(lambda: made.counts().dropped == 1)
        target.error = None
        made.emit(span())
        assert settles(lambda: made.counts().exported == 1)


def test_spans_that_the_collector_refuses_are_counted() -> None:
    with exporting() as (made, target):
        target.refuses = 2
        target.goes_on.clear()
        for number in range(5):
            made.emit(span(number))
        target.goes_on.set()
        assert settles(lambda: sum(target.taken) == 5 and made.counts().waiting == 0)
        counts = made.counts()
    assert counts.exported + counts.dropped == 5
    assert counts.dropped == 2 * len(target.taken)


def test_the_end_waits_only_so_long_for_a_collector_that_hangs() -> None:
    target = Target()
    made = SpanExporter("there", target.encode, target.post, interval_s=0.01)
    target.goes_on.clear()
    made.emit(span())
    assert target.inside.wait(10)
    for number in range(7):
        made.emit(span(number))
    made.close(0.05)
    assert made.counts().dropped == 7
    made.emit(span())
    assert made.counts().dropped == 8, "nothing is taken after the end"
    target.goes_on.set()
    made._thread.join(10)
    assert not made._thread.is_alive()


def test_what_travels_is_otlp() -> None:
    with collector() as server, closing(HttpPost(f"{server.url}/v1/traces", _HEADERS)) as post:
        sent = Span(b"t" * 16, b"s" * 8, b"p" * 8, "layer", Kind.CLIENT, 1, 2, error="Busy")
        sent.attributes |= {"text": "x", "whole": 3, "part": 0.5}
        sent.events.append((1, "begins"))
        assert post(encoder({"service.name": "s", "service.instance.id": "i"})([sent]), 5.0) == 0
        (found,) = server.spans
        assert (found.trace_id, found.span_id, found.parent_id) == (
            (b"t" * 16).hex(),
            (b"s" * 8).hex(),
            (b"p" * 8).hex(),
        )
        assert (found.service, found.process, found.name) == ("s", "i", "layer")
        assert (found.start_ns, found.end_ns, found.error) == (1, 2, "Busy")
        assert found.about == {"text": "x", "whole": 3, "part": 0.5}
        (headers,) = server.headers
        assert (headers["path"], headers["x-token"]) == ("/v1/traces", "abc")
        server.rejects = 1
        assert post(encoded({"service.name": "s", "service.instance.id": "i"}, []), 5.0) == 1
        for status, again in ((503, True), (429, True), (400, False), (404, False)):
            server.status = status
            with pytest.raises(NotTaken) as raised:
                post(b"", 5.0)
            assert raised.value.again is again
    with (
        closing(HttpPost(f"{server.url}/v1/traces", _HEADERS)) as post,
        pytest.raises(NotTaken) as raised,
    ):
        post(b"", 5.0)  # nobody listens any more
    assert raised.value.again


def test_a_collectors_headers_come_from_the_environment() -> None:
    assert exporter_headers({}) == {}
    given = {"OTEL_EXPORTER_OTLP_HEADERS": "api-key=a=b, x=1,"}
    assert exporter_headers(given) == {"api-key": "a=b", "x": "1"}
    for wrong in ("secret", "=secret", "x=a\nb"):
        with pytest.raises(SpecError) as raised:
            exporter_headers({"OTEL_EXPORTER_OTLP_HEADERS": wrong})
        assert "secret" not in str(raised.value)
