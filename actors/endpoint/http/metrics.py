"""The endpoint's Prometheus metrics (`/metrics`): counts, latencies, the state of its engines."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Mapping
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ....cluster.reports.status import EngineStatus
from ....proto.errors import InternalError, MoesaicError
from ..openai.answers import IndexedDeltas

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
# Metric -> the field of `EngineWork`, and its help text.
_ENGINE = {
    "running": ("running_requests", "requests in the batch"),
    "waiting": ("waiting_requests", "requests that wait for the batch"),
    "parked": ("parked_requests", "waiting requests that need an expert which no host has"),
    "restarts": ("restarts", "restarts of the engine after failed steps"),
    "steps": ("steps", "steps of the engine"),
    "cache_free": ("free_cache_fraction", "free part of the KV cache"),
}
_HEALTHY = "1 if the trunk answers and its engine runs"


class HttpMetrics:
    """The metrics of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"moesaic_{name}", words, labels, registry=registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"moesaic_{name}", words, ("model",), buckets=buckets, registry=registry
            )

        self._answers = counter("http_responses", "HTTP answers by status", "path", "status")
        self._ended = counter("choices", "choices by how they ended", "model", "reason")
        self._prompt = counter("prompt_tokens", "tokens of prompts", "model")
        self._generated = counter("generated_tokens", "tokens of answers", "model")
        self._first = histogram(
            "time_to_first_token_seconds", "time to a choice's first token", _FIRST_S
        )
        self._between = histogram("inter_token_latency_seconds", "time between tokens", _BETWEEN_S)
        self._whole = histogram("request_latency_seconds", "time to the end of a request", _WHOLE_S)
        self._open = Gauge(
            "moesaic_requests_running", "requests being answered", ("model",), registry=registry
        )
        self._engine = {
            field: Gauge(f"moesaic_engine_{name}", words, ("model",), registry=registry)
            for name, (field, words) in _ENGINE.items()
        }
        self._healthy = Gauge("moesaic_engine_healthy", _HEALTHY, ("model",), registry=registry)

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(path, status).inc()

    async def watch(
        self, model: str, prompt_tokens: int, began: float, pieces: IndexedDeltas
    ) -> IndexedDeltas:
        """Yield ``pieces`` unchanged and count them.

        ``began`` is when the request arrived, by `time.perf_counter`.
        """
        self._prompt.labels(model).inc(prompt_tokens)
        first, between = self._first.labels(model), self._between.labels(model)
        heard_at: dict[int, float] = {}
        tokens: Tally[int] = Tally()
        reason = "abandoned"  # kept only if the client leaves before the end
        try:
            with self._open.labels(model).track_inprogress():
                async with aclosing(pieces):
                    async for index, piece in pieces:
                        now, new = time.perf_counter(), piece.tokens - tokens[index]
                        if new and index in heard_at:
                            between.observe((now - heard_at[index]) / new)
                        elif new:
                            first.observe(now - began)
                        if new:
                            heard_at[index], tokens[index] = now, piece.tokens
                        if piece.finish_reason is not None:
                            self._ended.labels(model, piece.finish_reason).inc()
                        yield index, piece
            reason = ""
        except Exception as error:
            # Whatever it is, it is counted and raised again.
            reason = error.code if isinstance(error, MoesaicError) else InternalError.__name__
            raise
        finally:
            if reason:
                self._ended.labels(model, reason).inc()
            self._generated.labels(model).inc(tokens.total())
            self._whole.labels(model).observe(time.perf_counter() - began)

    def text(self, engines: Mapping[str, EngineStatus]) -> bytes:
        """Return all metrics as text; ``engines`` has each model's engine."""
        for model, engine in engines.items():
            self._healthy.labels(model).set(engine.healthy)
            for name, gauge in self._engine.items():
                if engine.work is not None:
                    gauge.labels(model).set(getattr(engine.work, name))
        return generate_latest(self._registry)
