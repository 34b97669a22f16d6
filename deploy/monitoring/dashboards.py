"""Write the dashboards for Grafana beside this file: `python deploy/monitoring/dashboards.py`.

Panels (`panels.py`) are laid out from left to right, so none overlaps another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from panels import CLUSTER, DASHBOARDS, Panel

FOLDER = Path(__file__).parent / "dashboards"
# Grafana's grid.
_COLUMNS = 24
_HEIGHT = 8
_SMALL = 4
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(name: str) -> dict[str, Any]:
    """Return one dashboard as Grafana imports it."""
    title, sections = DASHBOARDS[name]
    panels: list[dict[str, Any]] = []
    y = 0
    for section, content in sections:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": section,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
                "panels": [],
            }
        )
        y, x, height = y + 1, 0, 0
        for panel in content:
            if x + panel.width > _COLUMNS:
                y, x = y + height, 0
            height = _SMALL if panel.kind == "stat" else _HEIGHT
            place = {"x": x, "y": y, "w": panel.width, "h": height}
            panels.append(_panel(panel, len(panels) + 1, place))
            x += panel.width
        y += height
    return {
        "uid": f"moesaic-{name}",
        "title": title,
        "tags": ["moesaic"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), *_variables()]},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
        defaults |= {"thresholds": {"mode": "absolute", "steps": _steps(panel)}}
    else:
        stacking = {"mode": "normal" if panel.stacked else "none"}
        fill = 30 if panel.stacked else 5
        defaults |= {"custom": {"fillOpacity": fill, "stacking": stacking}, "min": 0}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": expr, "legendFormat": words}
            for n, (expr, words) in enumerate(panel.queries)
        ],
    }


def _steps(panel: Panel) -> list[dict[str, Any]]:
    if panel.bad_above is not None:
        return [{"color": "green", "value": None}, {"color": "red", "value": panel.bad_above}]
    if panel.bad_below is not None:
        return [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    return [{"color": "text", "value": None}]


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "label": "Prometheus",
    }


def _variables() -> list[dict[str, Any]]:
    cluster = _variable("cluster", "label_values(moesaic_requests_running, cluster)")
    model = _variable("model", f"label_values(moesaic_engine_healthy{{{CLUSTER}}}, model)")
    model |= {"multi": True, "includeAll": True, "allValue": ".*"}
    return [cluster, model]


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "label": name.capitalize(),
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
    }


def text(name: str) -> str:
    """Return the file of a dashboard."""
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for one in DASHBOARDS:
        (FOLDER / f"{one}.json").write_text(text(one))
