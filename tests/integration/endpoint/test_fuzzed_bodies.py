"""Bodies that nobody would write: every one gets an answer of OpenAI's form, none is a defect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.actors.endpoint.openai.requests import ChatRequest, CompletionRequest
from tests.helpers.endpoint.service import running_service

FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
# Values near to good ones reach further than those that the first check refuses.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(-1, 5),
    "n": st.integers(-1, 70),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "top_k": st.integers(-2, 400),
    "seed": st.integers(-(2**64), 2**64),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=5),
    "logit_bias": st.dictionaries(st.integers(-5, 400).map(str), st.floats(-200, 200), max_size=3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.integers(-1, 30) | st.booleans(),
    "priority": st.integers(-(2**33), 2**33),
    "prompt": st.text(max_size=20)
    | st.lists(st.integers(-1, 400), max_size=6)
    | st.lists(st.text(max_size=5), max_size=3),
    "messages": st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
                "content": st.text(max_size=9) | st.none() | ANYTHING,
                "tool_calls": ANYTHING,
                "tool_call_id": st.text(max_size=3),
            },
        ),
        max_size=3,
    ),
    "tools": st.lists(ANYTHING, max_size=2),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
        optional={"json_schema": ANYTHING},
    ),
    "moesaic": st.dictionaries(
        st.sampled_from(["missing_expert", "wait_s", "max_dropped", "resumable"]), ANYTHING
    ),
}


@st.composite
def bodies(draw: st.DrawFn, kind: type[CompletionRequest] | type[ChatRequest]) -> Any:
    """A good body with a few fields of any form: with many, nothing gets past the first check."""
    names = sorted(set(kind.model_fields) - {"model"})
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    model = draw(st.sampled_from(["org/script", "tools", "plain", "tiny"]))
    good: dict[str, Any] = {"model": model, "max_tokens": 3, "prompt": "the"}
    if kind is ChatRequest:
        good |= {"messages": [{"role": "user", "content": "hi"}]}
        del good["prompt"]
    return good | {name: draw(LIKELY.get(name, ANYTHING) | ANYTHING) for name in chosen}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with running_service() as service, httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


def check(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content)
    if answer.status_code == 200:
        assert answer.json() if answer.headers["content-type"] == "application/json" else True
        return
    error = answer.json()["error"]
    assert answer.status_code in (400, 404, 413, 429, 503), (content, error)
    assert error["message"]
    assert error["code"] not in ("InternalError", "EngineError")


@FUZZ
@given(body=bodies(CompletionRequest))
def test_completions(http: httpx.Client, body: Any) -> None:
    check(http, "/v1/completions", json.dumps(body).encode())


@FUZZ
@given(body=bodies(ChatRequest))
def test_chats(http: httpx.Client, body: Any) -> None:
    check(http, "/v1/chat/completions", json.dumps(body).encode())


@FUZZ
@given(content=st.binary(max_size=200) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_bytes(http: httpx.Client, content: bytes) -> None:
    check(http, "/v1/completions", content)
    check(http, "/v1/chat/completions", content)


def test_a_good_request_behind_all_that(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "the", "max_tokens": 3, "temperature": 0}
    assert http.post("/v1/completions", json=body).status_code == 200
