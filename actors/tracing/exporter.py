"""Sends a process's spans to a collector, over OTLP/HTTP, from a thread of its own.

Requests never wait for it. Spans wait in a queue of bounded length; those that come while it is
full, and those that the collector does not take, are dropped and counted. The log says once that
spans are dropped, and once that they are taken again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...cluster.tracing.spans import Span, Value
from ...proto.errors import describe_error

log = logging.getLogger(__name__)

MOST_WAITING = 4096
BATCH = 512
INTERVAL_S = 1.0
# For one request to the collector, and for the queue when the process ends.
POST_S, CLOSE_S = 5.0, 2.0
# A batch is sent again where the collector says that it may be.
TRIES = 4
FIRST_PAUSE_S = 0.5
_AGAIN = frozenset({429, 502, 503, 504})


class NotTaken(Exception):
    """The collector has not taken a batch; ``again``: it may take it later."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


# Posts a batch's bytes, within seconds; returns how many of its spans were refused. Raises
# NotTaken.
Post = Callable[[bytes, float], int]
Encode = Callable[[list[Span]], bytes]


@dataclass(frozen=True, slots=True)
class ExportCounts:
    """Spans since the process began."""

    exported: int
    dropped: int  # the queue was full, or the collector did not take them
    waiting: int


class SpanExporter:
    """A queue of spans and the thread that empties it; `emit` never waits."""

    def __init__(
        self,
        target: str,
        encode: Encode,
        post: Post,
        *,
        most: int = MOST_WAITING,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """Start the thread. ``target`` is the collector's name in the log."""
        self._target = target
        self._encode = encode
        self._post = post
        self._most = most
        self._interval_s = interval_s
        self._waiting: deque[Span] = deque()
        # Guards the queue and the counts; never held while something is sent.
        self._lock = threading.Lock()
        self._full = threading.Event()  # there is a batch, or the exporter is closed
        self._stop = threading.Event()
        self._until = float("inf")  # when the thread has to end
        self._exported = self._dropped = 0
        self._told_dropped: int | None = None  # dropped before the outage that the log has told of
        self._thread = threading.Thread(target=self._run, name="span-exporter", daemon=True)
        self._thread.start()

    def emit(self, span: Span) -> None:
        """Queue a span that has ended, or drop it if the queue is full."""
        with self._lock:
            if len(self._waiting) >= self._most or self._stop.is_set():
                self._drop(1, "its queue is full")
                return
            self._waiting.append(span)
            enough = len(self._waiting) >= BATCH
        if enough:
            self._full.set()

    def counts(self) -> ExportCounts:
        with self._lock:
            return ExportCounts(self._exported, self._dropped, len(self._waiting))

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what waits, at most for ``timeout_s``; what is left is dropped."""
        self._until = time.monotonic() + timeout_s
        self._stop.set()
        self._full.set()
        self._thread.join(timeout_s)
        with self._lock:
            if self._waiting:
                self._drop(len(self._waiting), "there is no more time")
                self._waiting.clear()

    # ---- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self._full.wait(self._interval_s)
            self._full.clear()
            self._empty()
        self._empty()

    def _empty(self) -> None:
        """Send batches until less than one is left that is worth a request of its own."""
        first = True
        while time.monotonic() < self._until:
            with self._lock:
                if not self._waiting or (len(self._waiting) < BATCH and not first):
                    return
                count = min(BATCH, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(count)]
            first = self._stop.is_set()
            try:
                self._send(batch)
            except Exception as error:
                # Whatever it is, the thread goes on, and the log has it once.
                with self._lock:
                    self._drop(len(batch), describe_error(error))

    def _send(self, batch: list[Span]) -> None:
        body = self._encode(batch)
        pause_s, refused = FIRST_PAUSE_S, 0
        for tries_left in reversed(range(TRIES)):
            try:
                refused = self._post(body, min(POST_S, max(0.1, self._until - time.monotonic())))
                break
            except NotTaken as why:
                if not (why.again and tries_left):
                    raise
            # At the end of the process there is no time for pauses.
            if self._stop.wait(pause_s) and time.monotonic() + pause_s >= self._until:
                raise NotTaken("there is no more time", again=False)
            pause_s *= 2
        with self._lock:
            self._exported += len(batch) - refused
            if refused:
                self._drop(refused, "the collector has refused spans of a batch")
            elif self._told_dropped is not None:
                lost, self._told_dropped = self._dropped - self._told_dropped, None
                log.info("%s takes spans again; %d were dropped", self._target, lost)

    def _drop(self, count: int, why: str) -> None:
        """Count spans that are dropped, and log the first of an outage; holds the lock."""
        if self._told_dropped is None:
            self._told_dropped = self._dropped
            log.warning("spans are dropped: %s: %s", self._target, why)
        self._dropped += count


class HttpPost:
    """Posts OTLP to a collector; it keeps a connection until `close`."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        import httpx

        self._url = url
        self._client = httpx.Client(headers={**headers, "content-type": "application/x-protobuf"})

    def __call__(self, body: bytes, timeout_s: float) -> int:
        import httpx

        from .otlp import rejected

        try:
            answer = self._client.post(self._url, content=body, timeout=timeout_s)
        except httpx.TransportError as error:
            raise NotTaken(describe_error(error), again=True) from error
        if not answer.is_success:
            why = f"the collector answers {answer.status_code}"
            raise NotTaken(why, again=answer.status_code in _AGAIN)
        if "protobuf" not in answer.headers.get("content-type", ""):
            return 0
        return rejected(answer.content)[0]

    def close(self) -> None:
        self._client.close()


def encoder(resource: Mapping[str, Value]) -> Encode:
    """Return a function that encodes a process's spans."""
    from .otlp import encoded

    return lambda batch: encoded(resource, batch)
