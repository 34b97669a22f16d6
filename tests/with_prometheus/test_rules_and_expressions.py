"""promtool on what stands in deploy/monitoring, and on the text of a scrape."""

from __future__ import annotations

import subprocess
from pathlib import Path

import yaml

from moesaic.cluster.metrics.families import exposition
from moesaic.cluster.metrics.pool import pool_families
from tests.helpers.cluster.metrics import snapshot
from tests.helpers.monitoring import DASHBOARDS, MONITORING, concrete, dashboard_expressions


def run(promtool: Path, *arguments: str, given: str = "") -> str:
    done = subprocess.run(
        [str(promtool), *arguments],
        cwd=MONITORING,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def test_the_rules_are_sound_and_fire_when_they_should(promtool: Path) -> None:
    assert "SUCCESS" in run(promtool, "check", "rules", "alerts.yaml")
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts_test.yaml")


def test_the_scrape_example_is_sound(promtool: Path) -> None:
    assert "SUCCESS" in run(promtool, "check", "config", "prometheus.yaml")


def test_a_scrape_is_what_prometheus_expects(promtool: Path) -> None:
    text = exposition(pool_families(snapshot()), "c").decode()
    # It names metrics without help, counters without `_total`, and units that are not base units.
    assert run(promtool, "check", "metrics", given=text) == ""


def test_expressions_of_dashboards_are_promql(promtool: Path, tmp_path: Path) -> None:
    expressions = [
        concrete(expression, cluster="c", interval="1m")
        for file in DASHBOARDS.glob("*.json")
        for expression in dashboard_expressions(file.stem)
    ]
    rules = [
        {"record": f"panel:{n}", "expr": expression} for n, expression in enumerate(expressions)
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    said = run(promtool, "check", "rules", "--lint=none", str(file))
    assert f"{len(rules)} rules found" in said
