"""What stands in deploy/monitoring: alerts, and the expressions of dashboards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from moesaic.cluster.metrics.table import METRICS
from tests.helpers.paths import ROOT

MONITORING = ROOT / "deploy" / "monitoring"
ALERTS = MONITORING / "alerts.yaml"
DASHBOARDS = MONITORING / "dashboards"


@dataclass(frozen=True)
class Alert:
    name: str
    expr: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


def alerts() -> list[Alert]:
    return [
        Alert(rule["alert"], rule["expr"], rule["labels"], rule["annotations"])
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    ]


def dashboard_expressions(name: str) -> list[str]:
    panels = json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metrics_in(expression: str) -> set[str]:
    """The metrics of an expression; a histogram's buckets, sum and count are its own."""
    found = set(re.findall(r"\bmoesaic_\w+", expression))
    return {
        name if name in METRICS else re.sub(r"_(bucket|sum|count)$", "", name) for name in found
    }


def concrete(expression: str, *, cluster: str, interval: str) -> str:
    """An expression of a panel, with values in the place of Grafana's variables."""
    values = {"$cluster": cluster, "$model": ".*", "$__rate_interval": interval}
    for variable, value in values.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def _inside(part: str) -> str:
    """What a part says inside of a bracket that it shares with others."""
    while part.count("(") > part.count(")"):
        part = part[part.rindex("(") + 1 :]
    while part.count(")") > part.count("("):
        part = part[: part.rindex(")")]
    return part


def operands(expression: str) -> list[str]:
    """What an alert compares with a number, each of which a cluster has at all times.

    The alert itself gives nothing while all is well.
    """
    parts = re.split(r"\b(?:and|or|unless)\b(?: on \([^)]*\))?", expression)
    parts = [_inside(part) for part in parts]
    bare = [re.sub(r"(?:==|>=|<=|>|<) *[\d.]+\s*$", "", part.strip()).strip() for part in parts]
    return [part for part in bare if not part.startswith("absent(")]
