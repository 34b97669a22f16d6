"""What clients send makes no series: neither ids of requests, nor names, nor paths."""

from __future__ import annotations

from fastapi.testclient import TestClient

from moesaic.actors.endpoint.http.metrics import HttpMetrics
from moesaic.actors.endpoint.ingress import create_app
from moesaic.cluster.metrics.families import exposition
from tests.helpers.cluster.metrics import samples
from tests.helpers.endpoint.service import BODIES, scripted_models


def test_a_thousand_clients_make_as_many_series_as_one() -> None:
    metrics = HttpMetrics()
    app = create_app(models=scripted_models("m"), bodies=BODIES, metrics=metrics)

    def series() -> set[object]:
        return set(samples(exposition(metrics, "c").decode()))

    with TestClient(app) as http:

        def ask(n: int) -> None:
            headers = {"x-request-id": f"request-{n}", "user-agent": f"client-{n}"}
            if n % 10 == 0:
                body = {"model": "m", "prompt": "the quick", "max_tokens": 1}
                assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
            elif n % 2:
                body = {"model": f"model-{n}", "prompt": "x"}
                assert http.post("/v1/completions", json=body, headers=headers).status_code == 404
            else:
                assert http.get(f"/some/page/{n}", headers=headers).status_code == 404

        for n in range(10):
            ask(n)
        before = series()
        for n in range(10, 1000):
            ask(n)
    assert series() == before
