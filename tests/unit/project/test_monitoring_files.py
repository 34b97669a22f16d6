"""deploy/monitoring: dashboards that Grafana can draw, alerts with a page each, and no metric that
there is not. Whether expressions are PromQL, and give data, is for tests/with_prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from moesaic.cluster.metrics.table import METRICS
from tests.helpers.monitoring import (
    ALERTS,
    DASHBOARDS,
    MONITORING,
    alerts,
    dashboard_expressions,
    metrics_in,
)
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "alerts.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def load(name: str) -> dict[str, Any]:
    return json.loads((DASHBOARDS / f"{name}.json").read_text())


NAMES = sorted(file.stem for file in DASHBOARDS.glob("*.json"))


def test_dashboards_are_those_of_the_script() -> None:
    before = {name: (DASHBOARDS / f"{name}.json").read_text() for name in NAMES}
    made = "import dashboards as d, json; print(json.dumps({n: d.text(n) for n in d.DASHBOARDS}))"
    done = subprocess.run(
        [sys.executable, "-c", made],
        cwd=MONITORING,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == before, "run deploy/monitoring/dashboards.py"
    assert set(NAMES) == {"overview", "experts", "serving", "training"}


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_can_be_drawn(name: str) -> None:
    found = load(name)
    assert found["uid"] == f"moesaic-{name}"
    panels = found["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids) > 5
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert {x for x, _ in cells} == set(range(24)), "Grafana's grid has 24 columns"
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            assert panel["targets"]
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    assert len(set(titles)) == len(titles)
    variables = {one["name"] for one in found["templating"]["list"]}
    used = re.findall(r"\$\{?(\w+)", json.dumps(panels))
    assert set(used) - {"__rate_interval"} <= variables


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_asks_for_metrics_that_there_are(name: str) -> None:
    expressions = dashboard_expressions(name)
    assert expressions
    for expression in expressions:
        assert metrics_in(expression), expression
        assert metrics_in(expression) <= METRICS.keys(), expression
        assert 'cluster="$cluster"' in expression, "of one cluster among several"


def test_labels_that_are_asked_for_are_those_of_the_table() -> None:
    """A selector or a grouping by a label that a metric lacks gives nothing, silently."""
    for name in NAMES:
        for expression in dashboard_expressions(name):
            known = {"cluster", "le"}.union(*(METRICS[m].labels for m in metrics_in(expression)))
            for group in re.findall(r"by \(([^)]*)\)", expression):
                assert set(group.split(", ")) <= known, expression
            for metric, selector in re.findall(r"(moesaic_\w+)\{([^}]*)\}", expression):
                (of,) = metrics_in(metric)
                asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selector))
                assert asked <= {"cluster", *METRICS[of].labels}, expression


def test_most_metrics_stand_on_a_dashboard_or_in_an_alert() -> None:
    shown = set().union(
        *(metrics_in(one) for name in NAMES for one in dashboard_expressions(name)),
        *(metrics_in(alert.expr) for alert in alerts()),
    )
    # Those that complete a picture, and that `moesaic status` or a query of one's own may need.
    assert METRICS.keys() - shown <= UNSEEN
    assert shown & UNSEEN == set()


UNSEEN = {
    f"moesaic_{name}"
    for name in (
        "controller_term",
        "controller_ticks_total",
        "placement_epoch",
        "model_experts",
        "host_draining",
        "host_slots",
        "host_memory_limit_bytes",
        "host_assignments_total",
        "host_received_bytes_total",
        "host_sent_bytes_total",
        "host_connected_routers",
        "group_min_hosts",
        "scaling_busy_ratio",
        "scaling_wait_ratio",
        "router_service_calls_total",
        "router_service_rows_total",
        "router_service_batches_total",
        "router_service_refused_calls_total",
        "router_service_expired_calls_total",
        "router_service_held_calls",
        "router_service_held_bytes",
        "engine_beat_age_seconds",
    )
}


# ---- alerts --------------------------------------------------------------------------------------


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    names = [alert.name for alert in alerts()]
    assert len(set(names)) == len(names) > 20
    assert set(names) == SECTIONS.keys()


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert.name)
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(alert: Any) -> None:
    assert alert.labels.keys() == {"severity"}
    assert alert.labels["severity"] in ("critical", "warning")
    assert alert.annotations["runbook"] == f"docs/alerts.md#{alert.name.lower()}"
    assert alert.annotations["summary"].endswith(".")
    assert metrics_in(alert.expr) <= METRICS.keys()
    assert metrics_in(alert.expr) or "up{" in alert.expr
    assert len(SECTIONS[alert.name].split()) >= 15, "it says what to do"


def test_links_between_alerts_lead_somewhere() -> None:
    for words, anchor in re.findall(r"\[(\w+)\]\(#(\w+)\)", PAGE):
        assert words in SECTIONS
        assert anchor == words.lower()


def test_each_alert_is_tested_with_what_fires_it_and_with_what_does_not() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())
    assert tests["rule_files"] == [ALERTS.name]
    fired = {
        name
        for test in tests["tests"]
        for one in test["promql_expr_test"]
        for sample in one["exp_samples"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert fired == {alert.name for alert in alerts()}
    for test in tests["tests"]:
        assert len(test["input_series"]) >= 2 or not test["input_series"]


def test_the_scrape_example_is_what_the_endpoint_does_by_default() -> None:
    from moesaic.cluster.spec.monitoring import MonitoringSpec

    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    at = MonitoringSpec()
    assert job["static_configs"] == [{"targets": [f"{at.host}:{at.port}"]}]
    assert config["rule_files"] == [ALERTS.name]
    assert job["job_name"] == "moesaic"
