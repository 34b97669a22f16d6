"""Samples as Prometheus' client library prints them.

They are made anew at each scrape from what is known then, so a series goes away with its host,
its model or its expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from ..load.router_counts import LATENCY_BOUNDS_S
from .table import METRICS

Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class Families:
    """The samples of one scrape."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}

    def add(self, name: str, value: float | None, **labels: object) -> None:
        """Add a sample of a metric of the table, without its first word; None: there is none."""
        if value is None:
            return
        family = self._family(name, labels)
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(_values(labels), float(value))

    def add_histogram(
        self, name: str, buckets: Sequence[int], seconds: float, **labels: object
    ) -> None:
        """Add a histogram; ``buckets`` count what lies between `LATENCY_BOUNDS_S`."""
        bounds = [*map(str, LATENCY_BOUNDS_S), "+Inf"]
        sums = [float(sum(buckets[: place + 1])) for place in range(len(buckets))]
        family = self._family(name, labels)
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(_values(labels), list(zip(bounds, sums, strict=True)), seconds)

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families.values())

    def _family(self, name: str, labels: dict[str, object]) -> Family:
        if name not in self._families:
            metric = METRICS[f"moesaic_{name}"]
            assert set(metric.labels) == labels.keys(), metric.name
            made = {
                "counter": CounterMetricFamily,
                "gauge": GaugeMetricFamily,
                "histogram": HistogramMetricFamily,
            }
            self._families[name] = made[metric.kind](
                metric.name, metric.meaning, labels=list(labels)
            )
        return self._families[name]


def _values(labels: dict[str, object]) -> list[str]:
    return list(map(str, labels.values()))


class _OneScrape(Collector):
    def __init__(self, metrics: Iterable[Metric], cluster: str) -> None:
        self._metrics = metrics
        self._labels = {"cluster": cluster} if cluster else {}

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            named = Metric(metric.name, metric.documentation, metric.type)
            named.samples = [
                sample._replace(labels=self._labels | sample.labels)
                for sample in metric.samples
                # When a counter began: one more series for each, which nobody asks for.
                if not sample.name.endswith("_created")
            ]
            yield named


def exposition(metrics: Iterable[Metric], cluster: str) -> bytes:
    """Return the text of a scrape; each series gets the label ``cluster``, unless it is empty."""
    registry = CollectorRegistry()
    registry.register(_OneScrape(metrics, cluster))
    return generate_latest(registry)
