"""Write all metrics as Markdown: `make metrics` makes docs/metrics.md."""

from __future__ import annotations

from .table import METRICS

_HEAD = """\
# Metrics

`/metrics` at the monitoring address ([openai.md](openai.md#monitoring)) is for Prometheus, and it
is the only address to scrape: the endpoint's process counts requests, and asks the trunks and the
controller at each scrape for all the rest. `deploy/monitoring/` has a scrape job
(`prometheus.yaml`), alert rules with their tests ([alerts.md](alerts.md)), and dashboards for
Grafana. This page is generated from the code by `make metrics`.

Every series has the label `cluster`, the cluster's name. Counters begin at 0 when the process that
counts starts, which Prometheus' `rate` and `increase` expect. No label has a request, a client or a
router: the controller adds up what routers count, which they report once a second, or every 6 s
while they have no load. A series goes away with its host, its model or its transport.
`monitoring.hot_experts` (default: 20) experts have series of their own, those of all models with
the most load; an expert that leaves them takes its series with it. `moesaic experts` shows all
experts. The label `layer` of the metrics of routing has the layers of the models that are served,
so a model of 60 layers has 180 such series, whatever its gates do.

If the controller does not answer within 5 s, `moesaic_controller_up` is 0, and the series that it
answers for are absent, not old. If a trunk does not answer, its `moesaic_engine_healthy` is 0, and
it has no other engine series. While Ray restarts the endpoint's process, nothing answers, and
Prometheus' own `up` is 0. A cluster without an endpoint has no monitoring address, and so no
metrics; `moesaic status --json` has most of the same figures.

| metric | type | labels | unit | meaning |
|---|---|---|---|---|
"""


def metrics_page() -> str:
    """Return the whole page."""
    rows = []
    for metric in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        cells = (f"`{metric.name}`", metric.kind, labels, metric.unit, metric.meaning)
        rows.append(f"| {' | '.join(cells)} |\n")
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    print(metrics_page(), end="")
