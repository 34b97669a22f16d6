"""What the endpoint counts for Prometheus: answers, choices, tokens, latencies."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from ....cluster.metrics.table import METRICS
from ....proto.errors import InternalError, MoesaicError
from ..openai.answers import IndexedDeltas

_FIRST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_BETWEEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_WHOLE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class HttpMetrics:
    """The metrics of one ingress."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def counter(name: str) -> Counter:
            known = METRICS[f"moesaic_{name}_total"]
            return Counter(known.name, known.meaning, known.labels, registry=registry)

        def histogram(name: str, buckets: tuple[float, ...]) -> Histogram:
            known = METRICS[f"moesaic_{name}"]
            return Histogram(
                known.name, known.meaning, known.labels, buckets=buckets, registry=registry
            )

        self._answers = counter("http_responses")
        self._ended = counter("choices")
        self._prompt = counter("prompt_tokens")
        self._generated = counter("generated_tokens")
        self._first = histogram("time_to_first_token_seconds", _FIRST_S)
        self._between = histogram("inter_token_latency_seconds", _BETWEEN_S)
        self._whole = histogram("request_latency_seconds", _WHOLE_S)
        running = METRICS["moesaic_requests_running"]
        self._open = Gauge(running.name, running.meaning, running.labels, registry=registry)

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

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._registry.collect())
