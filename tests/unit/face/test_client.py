"""The SDK's HTTP client against a scripted endpoint; no sockets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from moesaic.clients.http_client import AsyncClient, Chunk, Client, Model, Usage
from moesaic.cluster.reports.status import EndpointStatus
from moesaic.proto.errors import (
    ERRORS,
    Busy,
    ClusterError,
    EngineError,
    Expired,
    InternalError,
    MoesaicError,
    RequestError,
    UnknownModel,
)
from tests.helpers.cluster.reports import cluster_report, engine_report, host_report

Handler = Callable[[httpx.Request], httpx.Response]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
MODELS = {"data": [{"id": "demo", "max_model_len": 64}]}


def client(handler: Handler) -> Client:
    return Client("http://test", retries=0, transport=httpx.MockTransport(handler))


def always(status: int, body: Any) -> Handler:
    return lambda request: httpx.Response(status, json=body)


def error(code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": f"it is {code}", "type": "x", "param": param, "code": code}}


def sse(*events: Any, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return httpx.Response(200, text="".join(lines) + ("data: [DONE]\n\n" if done else ""))


STATUS = EndpointStatus(
    healthy=True,
    engines={"demo": engine_report(running_requests=2)},
    cluster=cluster_report(hosts=[host_report("host-0")]),
)
# As a newer cluster tells it.
TOLD = STATUS.model_dump(mode="json") | {"newer": 1}


def test_an_answer_that_is_no_status_is_an_error_of_ours() -> None:
    answer = httpx.Response(200, json={"hello": "world"})
    with client(lambda _: answer) as c, pytest.raises(ClusterError, match="not the status"):
        c.status()


def test_models_status_and_health() -> None:
    answers = {
        "/v1/models": httpx.Response(200, json=MODELS),
        "/status": httpx.Response(200, json=TOLD),
        "/readyz": httpx.Response(503, text="no"),
    }
    with client(lambda request: answers[request.url.path]) as c:
        assert c.models() == [Model(id="demo", max_tokens=64)]
        assert c.status() == STATUS
        assert c.health() is False


def test_complete_asks_for_what_was_said_and_nothing_else() -> None:
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        choice = {"index": 0, "text": " Paris", "finish_reason": "stop"}
        body = {"id": "cmpl-1", "model": "demo", "choices": [choice], "usage": USAGE}
        return httpx.Response(200, json=body)

    with client(answer) as c:
        found = c.complete([1, 2, 3], model="demo", max_tokens=2, stop=["\n"])
    assert seen == [{"model": "demo", "prompt": [1, 2, 3], "max_tokens": 2, "stop": ["\n"]}]
    assert (found.text, found.finish_reason, found.id) == (" Paris", "stop", "cmpl-1")
    assert found.usage == Usage(prompt_tokens=3, completion_tokens=2)


def test_chat_takes_the_only_model_and_a_plain_text() -> None:
    seen: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=MODELS)
        seen.append(json.loads(request.content))
        choice = {"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "length"}
        body = {"id": "c", "model": "demo", "choices": [choice], "usage": USAGE}
        return httpx.Response(200, json=body)

    with client(answer) as c:
        assert c.chat("Hello").text == "Hi"
        assert c.chat([{"role": "system", "content": "Be brief"}], temperature=0).text == "Hi"
    assert seen[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert seen[0]["model"] == "demo"
    assert seen[1]["temperature"] == 0


def test_several_models_must_be_named() -> None:
    two = {"data": [{"id": name, "max_model_len": 8} for name in ("a", "b")]}
    with client(always(200, two)) as c, pytest.raises(RequestError, match="a, b") as caught:
        c.complete("x")
    assert caught.value.param == "model"


def test_streamed_chat() -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "Hé"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": USAGE},
    ]
    with client(lambda request: sse(*events)) as c:
        found = list(c.stream_chat("x", model="demo"))
    assert "".join(chunk.text for chunk in found) == "Hé"
    assert found[-2:] == [
        Chunk(finish_reason="stop"),
        Chunk(usage=Usage(prompt_tokens=3, completion_tokens=2)),
    ]


def test_streamed_completion_that_breaks_off() -> None:
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    with client(lambda request: sse(event, done=False)) as c:
        stream = c.stream_complete("x", model="demo")
        assert next(stream).text == "a"
        with pytest.raises(EngineError, match=r"without `\[DONE\]`"):
            next(stream)


def test_an_error_inside_a_stream_is_raised() -> None:
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    with client(lambda request: sse(event, error("ExpertUnavailable"), done=False)) as c:
        stream = c.stream_complete("x", model="demo")
        next(stream)
        with pytest.raises(ERRORS["ExpertUnavailable"], match="it is"):
            next(stream)


def test_closing_a_stream_closes_the_connection() -> None:
    closed = []

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            while True:
                yield b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'

        def close(self) -> None:
            closed.append(True)

    with client(lambda request: httpx.Response(200, stream=Endless())) as c:
        stream = c.stream_complete("x", model="demo")
        next(stream)
        stream.close()  # pyright: ignore[reportAttributeAccessIssue]  (it is a generator)
        assert closed == [True]


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_of_the_tree_comes_back_as_itself(code: str) -> None:
    kind = ERRORS[code]
    for call in (
        lambda c: c.complete("x", model="demo"),
        lambda c: list(c.stream_complete("x", model="demo")),
    ):
        with (
            client(always(kind.http_status, error(code, "prompt"))) as c,
            pytest.raises(MoesaicError, match=f"it is {code}") as caught,
        ):
            call(c)
        assert type(caught.value) is kind
        assert getattr(caught.value, "param", "prompt") == "prompt"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ConnectError("refused"), ClusterError),
        (httpx.ConnectTimeout("slow"), ClusterError),
        (httpx.ReadTimeout("slow"), Expired),
        (httpx.RemoteProtocolError("cut"), EngineError),
        (httpx.ReadError("reset"), EngineError),
    ],
)
def test_transport_errors_are_mapped(raised: Exception, expected: type[MoesaicError]) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise raised

    with client(fail) as c:
        with pytest.raises(expected):
            c.complete("x", model="demo")
        with pytest.raises(expected):
            next(c.stream_chat("x", model="demo"))


def test_health_of_an_endpoint_that_is_not_there() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with client(fail) as c:
        assert c.health() is False


def test_an_answer_that_is_not_ours() -> None:
    page = httpx.Response(502, text="<h1>Bad gateway</h1>")
    with (
        client(lambda request: page) as c,
        pytest.raises(InternalError, match="HTTP 502: <h1>Bad"),
    ):
        c.models()


def test_retryable_and_not() -> None:
    with client(always(429, error("Busy"))) as c, pytest.raises(Busy) as caught:
        c.models()
    assert caught.value.retryable
    with (
        client(always(404, error("UnknownModel", "model"))) as c,
        pytest.raises(UnknownModel) as unknown,
    ):
        c.complete("x", model="nope")
    assert not unknown.value.retryable


def test_importing_the_client_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys, moesaic.clients.http_client;"
        "print([m for m in ('ray', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


CHOICE = {"index": 0, "text": "a", "finish_reason": "stop"}
WHOLE = {"id": "c", "model": "demo", "choices": [CHOICE], "usage": USAGE}


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The longest pauses that were possible; none is made."""
    most: list[float] = []
    monkeypatch.setattr("random.uniform", lambda low, high: most.append(high) or 0.0)
    return most


def failing(times: int, code: str, then: Handler) -> tuple[Handler, list[str]]:
    """Answers with an error so many times."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if len(asked) <= times:
            return httpx.Response(ERRORS[code].http_status, json=error(code))
        return then(request)

    return answer, asked


def test_what_may_succeed_is_tried_again(no_pause: list[float]) -> None:
    answer, asked = failing(2, "Busy", always(200, WHOLE))
    with Client("http://test", transport=httpx.MockTransport(answer)) as c:
        assert c.complete("x", model="demo").text == "a"
    assert len(asked) == 3
    assert no_pause == [0.5, 1.0]
    answer, asked = failing(3, "EngineError", always(200, WHOLE))
    with (
        Client("http://test", transport=httpx.MockTransport(answer)) as c,
        pytest.raises(EngineError),
    ):
        c.complete("x", model="demo")
    assert len(asked) == 3


@pytest.mark.parametrize("code", ["RequestError", "InternalError", "Expired", "BadExpert"])
def test_what_cannot_succeed_is_not(code: str, no_pause: list[float]) -> None:
    answer, asked = failing(1, code, always(200, WHOLE))
    with (
        Client("http://test", transport=httpx.MockTransport(answer)) as c,
        pytest.raises(ERRORS[code]),
    ):
        c.complete("x", model="demo")
    assert len(asked) == 1


def test_a_stream_is_tried_again_only_before_its_first_chunk(no_pause: list[float]) -> None:
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    answer, asked = failing(1, "Busy", lambda request: sse(event))
    with Client("http://test", transport=httpx.MockTransport(answer)) as c:
        assert [chunk.text for chunk in c.stream_complete("x", model="demo")] == ["a"]
    assert len(asked) == 2
    answer, asked = failing(0, "Busy", lambda request: sse(event, done=False))
    with Client("http://test", transport=httpx.MockTransport(answer)) as c:
        stream = c.stream_complete("x", model="demo")
        next(stream)
        with pytest.raises(EngineError):
            next(stream)
    assert len(asked) == 1


# ---- asyncio ------------------------------------------------------------------------------------


def later(handler: Handler, retries: int = 0) -> AsyncClient:
    return AsyncClient("http://test", retries=retries, transport=httpx.MockTransport(handler))


async def test_async_answers() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json=MODELS)
            case "/status":
                return httpx.Response(200, json=TOLD)
            case "/readyz":
                return httpx.Response(503, text="no")
            case "/v1/chat/completions":
                message = {"role": "assistant", "content": "Hi"}
                choice = {"message": message, "finish_reason": "stop"}
                return httpx.Response(200, json={**WHOLE, "choices": [choice]})
        return httpx.Response(200, json=WHOLE)

    async with later(answer) as c:
        assert await c.models() == [Model(id="demo", max_tokens=64)]
        assert await c.status() == STATUS
        assert await c.health() is False
        assert (await c.complete([1, 2])).text == "a"
        assert (await c.chat("Hello", temperature=0)).text == "Hi"


async def test_async_streams_retries_and_errors(no_pause: list[float]) -> None:
    event = {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}
    answer, asked = failing(1, "Busy", lambda request: sse(event, {"choices": [], "usage": USAGE}))
    async with later(answer, retries=1) as c:
        found = [chunk async for chunk in c.stream_complete("x", model="demo")]
    assert [chunk.text for chunk in found] == ["a", ""]
    assert found[-1].usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert len(asked) == 2
    delta = {"choices": [{"index": 0, "delta": {"content": "b"}, "finish_reason": None}]}
    async with later(lambda request: sse(delta, done=False), retries=5) as c:
        stream = c.stream_chat("x", model="demo")
        assert (await anext(stream)).text == "b"
        with pytest.raises(EngineError, match=r"without `\[DONE\]`"):
            await anext(stream)
    answer, asked = failing(1, "Busy", always(200, WHOLE))
    async with later(answer, retries=1) as c:
        assert (await c.complete("x", model="demo")).text == "a"
    async with later(always(400, error("RequestError", "prompt"))) as c:
        with pytest.raises(RequestError) as caught:
            await c.complete("x", model="demo")
    assert caught.value.param == "prompt"


async def test_closing_an_async_stream_closes_the_connection() -> None:
    closed = []

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'

        async def aclose(self) -> None:
            closed.append(True)

    async with later(lambda request: httpx.Response(200, stream=Endless())) as c:
        stream = c.stream_complete("x", model="demo")
        await anext(stream)
        await stream.aclose()
        assert closed == [True]


async def test_each_request_names_the_callers_span() -> None:
    asked: list[str | None] = []
    spans = iter(["00-first", None, "00-third"])

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("traceparent"))
        return httpx.Response(200, json={"object": "list", "data": []})

    transport = httpx.MockTransport(answer)
    with Client("http://test", traceparent=lambda: next(spans), transport=transport) as client:
        client.models()
        client.models()
    async with AsyncClient(
        "http://test", traceparent=lambda: next(spans), transport=transport
    ) as c:
        await c.models()
    with Client("http://test", transport=transport) as client:
        client.models()
    assert asked == ["00-first", None, "00-third", None]
