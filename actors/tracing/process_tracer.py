"""The tracer of this process: there is one where the cluster's spec names a collector."""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from ...cluster.tracing.settings import TraceSettings
from ...cluster.tracing.spans import Recorder, Value
from ...cluster.tracing.tracer import Tracer
from ...proto.errors import SpecError
from .exporter import MOST_WAITING, ExportCounts, HttpPost, SpanExporter, encoder

# What collectors ask for, such as a token, which a spec should not hold: `key=value,key=value`.
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"

_tracer: Tracer | None = None
_exporter: SpanExporter | None = None
_post: HttpPost | None = None


def tracer() -> Tracer | None:
    """Return this process's tracer; None: no request is traced."""
    return _tracer


def use_tracer(new: Tracer | None) -> None:
    """Trace with another tracer from now on, or not at all."""
    global _tracer
    _tracer = new


def begin_tracing(settings: TraceSettings, kind: str, process: str, cluster: str) -> None:
    """Trace sampled requests in this process, and send their spans until it ends.

    ``kind`` is that of the process, and ``process`` its name in the log. Raises SpecError.
    """
    global _exporter, _post
    end_tracing()
    resource: dict[str, Value] = {
        "service.name": f"moesaic-{kind}",
        "service.namespace": cluster,
        "service.instance.id": process,
        "process.pid": os.getpid(),
        "host.name": socket.gethostname(),
    }
    _post = HttpPost(settings.url, exporter_headers(os.environ))
    _exporter = SpanExporter(settings.url, encoder(resource), _post, most=MOST_WAITING)
    recorder = Recorder(_exporter.emit, time.time_ns, secrets.token_bytes, threading.Lock)
    use_tracer(Tracer(settings, recorder))
    atexit.register(end_tracing)


def end_tracing() -> None:
    """Send the spans that wait, for a bounded time, and trace nothing any more."""
    global _exporter, _post
    use_tracer(None)
    (exporter, _exporter), (post, _post) = (_exporter, None), (_post, None)
    atexit.unregister(end_tracing)
    if exporter is not None:
        exporter.close()
    if post is not None:
        post.close()


class TraceCounts(NamedTuple):
    """What this process has traced since it began."""

    spans: ExportCounts
    passed_over: int  # requests that were sampled when too many were followed already


def trace_counts() -> TraceCounts | None:
    """Return the counts of this process; None: it traces nothing."""
    here, exporter = _tracer, _exporter
    if here is None or exporter is None:
        return None
    return TraceCounts(exporter.counts(), here.passed_over)


def exporter_headers(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers for the collector that the environment names. Raises SpecError."""
    headers = {}
    for part in environ.get(HEADERS, "").split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not (name.isascii() and name and equals and value.isprintable()):
            raise SpecError(f"{HEADERS}: write key=value,key=value")  # it may hold a secret
        headers[name] = value
    return headers
