"""A collector of OTLP over HTTP, in the test's own process."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.helpers.pool.transports import settles


@dataclass(frozen=True)
class CollectedSpan:
    """A span, and the process that has sent it."""

    service: str
    process: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    error: str
    about: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.span_id


@dataclass
class Collector:
    """What has arrived; a test sets how the server answers."""

    url: str = ""
    spans: list[CollectedSpan] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    status: int = 200
    rejects: int = 0
    # Answers wait until it is set.
    answers: threading.Event = field(default_factory=threading.Event)

    def taken(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for of_process in request.resource_spans:
            about = _values(of_process.resource.attributes)
            for scope in of_process.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        CollectedSpan(
                            about["service.name"],
                            about["service.instance.id"],
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.message,
                            _values(span.attributes),
                        )
                    )

    def traces(self) -> dict[str, list[CollectedSpan]]:
        found: dict[str, list[CollectedSpan]] = defaultdict(list)
        for span in self.spans:
            found[span.trace_id].append(span)
        return dict(found)

    def has(self, trace_id: str, name: str) -> bool:
        """Whether a span of that name comes to arrive."""
        return settles(
            lambda: any(s.name == name and s.trace_id == trace_id for s in list(self.spans))
        )


def connected(spans: list[CollectedSpan], above: str = "") -> bool:
    """Whether spans of one trace are a tree, with one root, which is below the span ``above``."""
    by_id = {span.span_id: span for span in spans}
    roots = [span for span in spans if span.parent_id not in by_id]
    return len(by_id) == len(spans) and [root.parent_id for root in roots] == [above]


def _values(attributes: Any) -> dict[str, Any]:
    return {
        one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value")
        for one in attributes
    }


@contextmanager
def collector() -> Iterator[Collector]:
    found = Collector()
    found.answers.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.headers.append({"path": self.path, **dict(self.headers)})
            found.answers.wait(30)
            if found.status == 200:
                found.taken(body)
            answer = ExportTraceServiceResponse()
            answer.partial_success.rejected_spans = found.rejects
            octets = answer.SerializeToString()
            self.send_response(found.status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(octets)))
            self.end_headers()
            self.wfile.write(octets)

        def log_message(self, format: str, *args: Any) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield found
    finally:
        found.answers.set()
        server.shutdown()
        thread.join(10)
        server.server_close()
