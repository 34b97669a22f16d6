"""Answers that a client that goes away, or an error, cuts short."""

from __future__ import annotations

import json
import time

import httpx
import openai
import pytest

from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from tests.helpers.endpoint.service import Service
from tests.helpers.processes.live import wait_until


def wait_until_idle(engine: TransformersEngine) -> None:
    deadline = time.monotonic() + 10
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request(service: Service, stream: bool) -> None:
    body = {"model": "tiny", "prompt": "the", "max_tokens": 4000, "temperature": 0}
    before = service.engine.stats().steps
    with httpx.Client(base_url=service.url, timeout=httpx.Timeout(30, read=0.3)) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                next(answer.iter_lines())
                # A moment may pass between the first token and the count of the scheduler.
                wait_until(lambda: service.engine.stats().running == 1, 10.0)
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body)
    wait_until_idle(service.engine)
    assert service.engine.stats().steps - before < 4000


def test_going_away_before_the_first_token_cancels_too(service: Service) -> None:
    before = service.script.cancelled
    body = {"model": "org/script", "prompt": ["wait", "wait"], "stream": True}
    with (
        httpx.Client(base_url=service.url, timeout=httpx.Timeout(30, read=0.2)) as http,
        pytest.raises(httpx.ReadTimeout),
    ):
        http.post("/v1/completions", json=body)
    deadline = time.monotonic() + 10
    while service.script.cancelled < before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_error_before_the_first_token_has_its_status(http: httpx.Client) -> None:
    for stream in (False, True):
        body = {"model": "org/script", "prompt": "busy", "stream": stream}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "Busy"
        answer = http.post("/v1/completions", json={**body, "prompt": "broken"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "InternalError"


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    http: httpx.Client, official: openai.OpenAI
) -> None:
    body = {"model": "org/script", "prompt": "lost", "max_tokens": 99, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    events = answer.text.strip().split("\n\n")
    assert len(events) > 5
    last = json.loads(events[-1].removeprefix("data: "))["error"]
    assert last["code"] == "ExpertUnavailable"
    assert "expert tiny/1/2" in last["message"]
    with pytest.raises(openai.APIError, match="expert tiny/1/2"):
        list(
            official.completions.create(
                model="org/script", prompt="lost", max_tokens=99, stream=True
            )
        )
    answer = http.post("/v1/completions", json={**body, "prompt": "bug"})
    assert '"code":"InternalError"' in answer.text.strip().split("\n\n")[-1]
    answer = http.post("/v1/completions", json={**body, "prompt": "lost", "stream": False})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "ExpertUnavailable")
