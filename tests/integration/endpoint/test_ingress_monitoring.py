"""What operators and probes read of the endpoint: metrics, status and health."""

from __future__ import annotations

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.cluster.reports import engine_report
from tests.helpers.endpoint.service import TOKENIZER, Service


def metrics_of(operator: httpx.Client) -> dict[str, float]:
    answer = operator.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_count_what_was_done(
    http: httpx.Client, operator: httpx.Client, official: openai.OpenAI
) -> None:
    before = metrics_of(operator)
    prompt = TOKENIZER("the quick").input_ids
    official.completions.create(model="org/script", prompt=prompt, max_tokens=5, n=2)
    list(official.completions.create(model="org/script", prompt=prompt, max_tokens=5, stream=True))
    with pytest.raises(openai.APIStatusError):
        official.completions.create(model="org/script", prompt="lost", max_tokens=99)
    assert http.post("/v1/completions", json={"model": "none"}).status_code == 400
    assert http.get("/no/such/page").status_code == 404
    after = metrics_of(operator)

    def grown(name: str, **labels: str) -> float:
        key = f"moesaic_{name}{sorted(labels.items())}"
        return after.get(key, 0.0) - before.get(key, 0.0)

    def of_model(name: str) -> float:
        return grown(name, model="org/script")

    assert grown("choices_total", model="org/script", reason="length") == 3
    assert grown("choices_total", model="org/script", reason="ExpertUnavailable") == 1
    assert of_model("generated_tokens_total") == 3 * 5 + 10
    assert of_model("prompt_tokens_total") == 2 * len(prompt) + len(TOKENIZER("lost").input_ids)
    assert of_model("time_to_first_token_seconds_count") == 4
    assert of_model("inter_token_latency_seconds_count") > 0
    assert of_model("request_latency_seconds_count") == 3
    assert after["moesaic_requests_running[('model', 'org/script')]"] == 0
    assert grown("http_responses_total", path="/v1/completions", status="200") == 2
    assert grown("http_responses_total", path="/v1/completions", status="400") == 1
    assert grown("http_responses_total", path="other", status="404") == 1


def test_the_state_of_the_engines_is_among_the_metrics(
    operator: httpx.Client, service: Service
) -> None:
    service.engine_reports["tiny"] = engine_report(running_requests=3, parked_requests=1)
    try:
        found = metrics_of(operator)
    finally:
        service.engine_reports.clear()
    assert found["moesaic_engine_running_requests[('model', 'tiny')]"] == 3
    assert found["moesaic_engine_parked_requests[('model', 'tiny')]"] == 1
    assert found["moesaic_engine_healthy[('model', 'tiny')]"] == 1
    service.healthy = False
    try:
        assert any(name.startswith("moesaic_http_responses") for name in metrics_of(operator))
    finally:
        service.healthy = True


def test_status_and_metrics_are_elsewhere(
    http: httpx.Client, operator: httpx.Client, service: Service
) -> None:
    assert operator.get("/status").json() == {"healthy": True, "engines": {}, "cluster": None}
    service.healthy = False
    try:
        answer = operator.get("/status")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the trunk is gone", "operators hear all"
    finally:
        service.healthy = True
    for path in ("/status", "/metrics"):
        assert http.get(path).status_code == 404
        # Nor does a page hear of it whose name was made to lead here.
        foreign = operator.get(path, headers={"host": "evil.example"})
        assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "Forbidden")
        assert operator.get(path, headers={"origin": "https://evil.example"}).status_code == 403
    assert operator.get("/nothing").status_code == 404


def test_probes(http: httpx.Client, operator: httpx.Client, service: Service) -> None:
    service.healthy = False
    try:
        assert operator.get("/status").status_code == 503
        # Who cannot say how the cluster is may serve all the same.
        for probe in ("/livez", "/startupz", "/readyz", "/readyz?model=org/script"):
            for answer in (http.get(probe), http.head(probe), operator.get(probe)):
                assert answer.status_code == 200
                assert answer.headers["cache-control"] == "no-store"
            assert http.get(probe).text == "ok\n"
    finally:
        service.healthy = True
    unknown = http.get("/readyz?model=other")
    assert (unknown.status_code, unknown.text) == (404, "unknown model\n")
