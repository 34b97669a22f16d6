"""Bad HTTP input: one clear error that names the field, and the service answers afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.endpoint.service import MAX_BODY, MESSAGES, Service

TINY = {"model": "tiny", "prompt": "the"}
BAD: list[tuple[str, Any, int, str | None, str]] = [
    # path, JSON body (or raw bytes), status, param, what the message says
    ("completions", b"{", 400, None, "not valid JSON"),
    ("completions", b"", 400, None, "not valid JSON"),
    ("completions", b"\xff\xfe\x00", 400, None, "not valid JSON"),
    ("completions", [1], 400, None, "must be a JSON object"),
    ("completions", {"prompt": "x"}, 400, "model", "missing parameter 'model'"),
    ("completions", {"model": "tiny"}, 400, "prompt", "missing parameter 'prompt'"),
    ("completions", {**TINY, "model": "nope"}, 404, "model", "use one of: tiny, org/script"),
    ("completions", {**TINY, "model": "../../etc/passwd"}, 404, "model", "does not exist"),
    ("completions", {**TINY, "colour": 1}, 400, "colour", "unknown parameter 'colour'"),
    ("completions", {**TINY, "suffix": "x"}, 400, "suffix", "suffix='x' is not supported"),
    ("completions", {**TINY, "temperature": 3}, 400, "temperature", "(got 3)"),
    ("completions", {**TINY, "top_p": 0}, 400, "top_p", "(got 0)"),
    ("completions", {**TINY, "max_tokens": -1}, 400, "max_tokens", "(got -1)"),
    ("completions", {**TINY, "max_tokens": 10**9}, 400, "max_tokens", "4096 are possible"),
    ("completions", {**TINY, "stop": [""]}, 400, "stop", "string of 0 characters"),
    ("completions", {**TINY, "prompt": ""}, 400, "prompt", "the prompt is empty"),
    ("completions", {**TINY, "prompt": [5, 320]}, 400, "prompt", "token id 320"),
    ("completions", {**TINY, "logit_bias": {"320": 1}}, 400, "logit_bias", "token id 320"),
    ("completions", {**TINY, "prompt": [-1]}, 400, "prompt", "token id -1"),
    ("completions", {**TINY, "prompt": [2**70]}, 400, "prompt", "token id"),
    ("completions", {**TINY, "prompt": [5] * 5000}, 400, "prompt", "has 5000 tokens"),
    ("completions", {**TINY, "prompt": "ab " * 3000}, 400, "prompt", "4095 are possible"),
    ("completions", {**TINY, "prompt": "a" * 500_000}, 400, "prompt", "500000 characters"),
    ("completions", {**TINY, "prompt": "a" * 2 * MAX_BODY}, 413, None, "1048576 are allowed"),
    ("completions", {**TINY, "prompt": ["x", [1]]}, 400, "prompt", "must be a string"),
    ("chat/completions", {"model": "tiny", "messages": []}, 400, "messages", "at least 1"),
    ("chat/completions", {"model": "plain", "messages": MESSAGES}, 400, "messages", "template"),
    (
        "chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "ab " * 4000}]},
        400,
        "messages",
        "4095 are possible",
    ),
    (
        "chat/completions",
        {"model": "tiny", "messages": [{"role": "root", "content": "x"}]},
        400,
        "messages[0].role",
        "(got 'root')",
    ),
    ("nothing", {}, 404, None, "POST /v1/nothing: Not Found"),
    ("models", {}, 405, None, "Method Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD)
def test_bad_input_has_a_clear_answer_and_harms_nothing(
    http: httpx.Client, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    for extra in (b"", b" " if status != 413 else b""):
        answer = http.post(f"/v1/{path}", content=content + extra)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert message in error["message"]
        assert error["param"] == param
        assert set(error) == {"message", "type", "param", "code"}
    well = http.post("/v1/completions", json={**TINY, "max_tokens": 2})
    assert well.status_code == 200


def test_a_body_of_unknown_length_is_bounded_too(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 2**16

    answer = http.post("/v1/completions", content=endless())
    assert answer.status_code == 413
    assert "more than 1048576 bytes" in answer.json()["error"]["message"]


def test_a_large_prompt_does_not_stop_the_others(service: Service) -> None:
    """Parsing and encoding happen beside the event loop: small requests pass meanwhile."""
    large = {"model": "tiny", "prompt": "a" * 60_000}
    done = threading.Event()

    def send() -> None:
        with httpx.Client(base_url=service.url, timeout=60) as http:
            assert http.post("/v1/completions", json=large).status_code == 400
        done.set()

    with httpx.Client(base_url=service.url, timeout=60) as http:
        thread = threading.Thread(target=send)
        thread.start()
        slowest = 0.0
        while not done.is_set():
            start = time.monotonic()
            assert http.get("/v1/models").status_code == 200
            slowest = max(slowest, time.monotonic() - start)
        thread.join(10)
    assert slowest < 1.0
