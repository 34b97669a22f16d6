"""The table of metrics: its page, Prometheus' conventions, and that each of them is exported."""

from __future__ import annotations

import re

import pytest

from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.cluster.metrics.engines import engine_families
from moesaic.cluster.metrics.page import metrics_page
from moesaic.cluster.metrics.pool import pool_families
from moesaic.cluster.metrics.table import METRICS, Metric
from tests.helpers.cluster.metrics import families_of, snapshot
from tests.helpers.cluster.reports import engine_report
from tests.helpers.paths import ROOT

# All labels that there may be, each with few values.
LABELS = {
    "model",
    "layer",
    "expert",
    "host",
    "node",
    "group",
    "state",
    "transport",
    "path",
    "status",
    "reason",
}
# The units of Prometheus' conventions, and the ends of names that say them.
UNITS = {"seconds": "_seconds", "bytes": "_bytes", "0 to 1": "_ratio", "ratio": "_ratio"}


def test_the_page_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page(), "see `make metrics`"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_follow_prometheus_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"moesaic(_[a-z]+)+", metric.name)
    assert set(metric.labels) <= LABELS
    if metric.unit in UNITS:
        assert metric.name.removesuffix("_total").endswith(UNITS[metric.unit])
    assert metric.meaning
    assert not metric.meaning.endswith(".")


def test_each_metric_is_exported_and_no_other_one() -> None:
    everything = [
        *pool_families(snapshot()),
        *engine_families({"m": engine_report()}),
        *HttpMetrics(),
    ]
    assert families_of(everything) == METRICS.keys()
    for family in everything:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert (family.type, family.documentation) == (METRICS[name].kind, METRICS[name].meaning)
