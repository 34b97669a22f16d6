"""The endpoint on a real socket, with the engine in the same process and the official client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moesaic.actors.engine.engine import Sampling
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.text.answer_form import AnswerForm
from moesaic.client import Client
from moesaic.proto.errors import ExpertUnavailable
from tests.helpers.engines import reference
from tests.helpers.live import wait_until
from tests.helpers.reports import engine_report
from tests.helpers.service import CALLING, TEXT, TOKENIZER, Service, running_service

MODELS = ["tiny", "org/script", "plain", "tools", "limited"]
MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service() as service:
        yield service


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture
def operator(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.monitoring, timeout=30) as client:
        yield client


@pytest.fixture
def official(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:
        yield client


def text_of(ids: Sequence[int]) -> str:
    text = TOKENIZER.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def chat_ids() -> list[int]:
    text = TOKENIZER.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    return TOKENIZER(str(text)).input_ids


def wait_until_idle(engine: TransformersEngine) -> None:
    deadline = time.monotonic() + 10
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_models(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == MODELS
    assert official.models.retrieve("org/script").owned_by == "moesaic"
    with pytest.raises(openai.NotFoundError, match="'nope' does not exist"):
        official.models.retrieve("nope")


def test_completion_whole_and_streamed(official: openai.OpenAI, service: Service) -> None:
    prompt = "the quick"
    ids = TOKENIZER(prompt).input_ids
    expected = text_of(reference(service.model, ids, 30))
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 0}
    whole = official.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 30)
    chunks = list(official.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None and chunk.object == "text_completion" for chunk in chunks)
    by_ids = official.completions.create(**{**asked, "prompt": ids})
    assert by_ids.choices[0].text == expected


def test_chat_whole_and_streamed(official: openai.OpenAI, service: Service) -> None:
    ids = chat_ids()
    expected = text_of(reference(service.model, ids, 30))
    asked: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "max_completion_tokens": 30, "temperature": 0
    }  # fmt: skip
    whole = official.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        official.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 10


def test_several_choices_have_seeds_of_their_own(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 1.5}
    several = official.completions.create(**asked, prompt=["the", "quick"], n=3, seed=40)
    texts = [choice.text for choice in several.choices]
    assert [choice.index for choice in several.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert several.usage is not None
    assert several.usage.completion_tokens == 6 * 12
    for prompt, first in (("the", 0), ("quick", 3)):
        for n in range(3):
            one = official.completions.create(**asked, prompt=prompt, seed=40 + n)
            assert one.choices[0].text == texts[first + n]


def test_several_chat_choices_streamed(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 10, "n": 2, "seed": 3
    }  # fmt: skip
    whole = official.chat.completions.create(**asked)
    texts = ["", ""]
    for chunk in official.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]


def test_a_bias_and_a_penalty_change_greedy_texts(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 8, "temperature": 0}
    only = official.completions.create(**asked, logit_bias={"70": 100})
    assert only.choices[0].text == TOKENIZER.decode([70] * 8)
    varied = official.completions.create(
        **asked, logit_bias={"70": 50, "71": 50}, frequency_penalty=2
    )
    assert set(varied.choices[0].text) == set(TOKENIZER.decode([70, 71]))


async def test_official_async_client_many_at_once(service: Service) -> None:
    prompts = [[5 + n, 6, 7] for n in range(8)]
    expected = [text_of(reference(service.model, prompt, 20)) for prompt in prompts]
    async with openai.AsyncOpenAI(
        base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=30
    ) as client:

        async def whole(prompt: list[int]) -> str:
            answer = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=20, temperature=0
            )
            return answer.choices[0].text

        async def streamed(prompt: list[int]) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        assert await asyncio.gather(*map(whole, prompts)) == expected
        assert await asyncio.gather(*map(streamed, prompts)) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_several_choices(
    official: openai.OpenAI, service: Service, stream: bool
) -> None:
    prompts = ["the quick", "Paris", "and 123"]
    expected = [
        text_of(reference(service.model, TOKENIZER(prompt).input_ids, 12)) for prompt in prompts
    ]
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": prompts, "max_tokens": 12, "temperature": 0
    }  # fmt: skip
    texts = ["", "", ""]
    if stream:
        asked["stream_options"] = {"include_usage": True}
        chunks = list(official.completions.create(**asked, stream=True))
        for chunk in chunks[:-1]:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        usage = chunks[-1].usage
    else:
        answer = official.completions.create(**asked)
        for choice in answer.choices:
            texts[choice.index] = choice.text
        usage = answer.usage
    assert texts == expected
    assert usage is not None
    assert usage.completion_tokens == 36


def test_stop_strings_cut_across_tokens(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "org/script", "prompt": "x", "max_tokens": 500}
    whole = official.completions.create(**asked, stop=["azy do", "never"])
    assert whole.choices[0].text == TEXT[: TEXT.index("azy do")]
    assert whole.choices[0].finish_reason == "stop"
    stream = official.completions.create(**asked, stop="🙂 日", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT[: TEXT.index("🙂 日")]
    no_stop = official.completions.create(**asked, stop="never")
    assert (no_stop.choices[0].text, no_stop.choices[0].finish_reason) == (TEXT, "stop")


def test_defaults_are_openais(official: openai.OpenAI, service: Service) -> None:
    official.completions.create(model="org/script", prompt="x")
    assert service.script.sampling == Sampling(max_tokens=16, temperature=1.0, top_p=1.0)
    answer = official.chat.completions.create(model="org/script", messages=MESSAGES)
    assert answer.usage is not None
    left = 4000 - answer.usage.prompt_tokens
    assert service.script.sampling == Sampling(max_tokens=left, temperature=1.0, top_p=1.0)


def test_the_wire_of_a_stream(http: httpx.Client) -> None:
    body = {"model": "org/script", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "my-request.1"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "my-request.1"
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n")[:-2]]
    first = json.loads(events[0])
    assert first["id"] == "chatcmpl-my-request.1"
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]


def test_request_ids_that_are_not_plain_are_replaced(http: httpx.Client) -> None:
    for bad in ("a b", "x" * 200, "<script>"):
        answer = http.get("/v1/models", headers={"x-request-id": bad})
        assert len(answer.headers["x-request-id"]) == 32


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


def test_our_own_client(service: Service) -> None:
    with Client(service.url) as client:
        assert [model.id for model in client.models()] == MODELS
        answer = client.complete("x", model="org/script", max_tokens=500)
        assert (answer.text, answer.finish_reason) == (TEXT, "stop")
        chunks = list(client.stream_chat("x", model="org/script"))
        assert "".join(chunk.text for chunk in chunks) == TEXT
        assert chunks[-1].usage is not None
        with pytest.raises(ExpertUnavailable):
            list(client.stream_complete("lost", model="org/script", max_tokens=99))


WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def test_tools_are_told_of_and_called(official: openai.OpenAI, service: Service) -> None:
    asked: dict[str, Any] = {"model": "tools", "messages": MESSAGES, "tools": [WEATHER]}
    choice = official.chat.completions.create(**asked).choices[0]
    assert '"name": "weather"' in service.tools.prompt
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is not None
    assert choice.message.content.strip() == "Let me see."
    calls: Any = choice.message.tool_calls
    assert [one.function.name for one in calls] == ["weather", "time"]
    assert json.loads(calls[0].function.arguments) == {"city": "Köln"}
    answers = [
        choice.message,
        {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"},
        {"role": "tool", "tool_call_id": calls[1].id, "content": "noon"},
    ]
    official.chat.completions.create(**{**asked, "messages": [*MESSAGES, *answers]})
    assert "Köln" in service.tools.prompt
    assert "rain" in service.tools.prompt
    one = official.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert one.finish_reason == "tool_calls"
    assert len(one.message.tool_calls or ()) == 1
    text = official.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert "weather" not in service.tools.prompt
    assert text.message.content == CALLING
    assert text.message.tool_calls is None


def test_calls_of_tools_in_a_stream(official: openai.OpenAI) -> None:
    """The official client's own accumulation puts them together."""
    with official.chat.completions.stream(
        model="tools", messages=MESSAGES, tools=[WEATHER]
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    calls: Any = choice.message.tool_calls
    assert [one.function.name for one in calls] == ["weather", "time"]
    assert [event.name for event in done] == ["weather", "time"]


def test_variables_of_the_template(official: openai.OpenAI, service: Service) -> None:
    official.chat.completions.create(
        model="tools",
        messages=MESSAGES,
        extra_body={"chat_template_kwargs": {"style": "In rhymes."}},
    )
    assert service.tools.prompt.startswith("In rhymes.")


def test_a_template_without_tools_refuses_them(official: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support tools"):
        official.chat.completions.create(model="org/script", messages=MESSAGES, tools=[WEATHER])


def test_the_form_of_an_answer_reaches_the_engine(
    official: openai.OpenAI, service: Service
) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    official.chat.completions.create(model="org/script", messages=MESSAGES, response_format=form)
    assert service.script.sampling is not None
    assert service.script.sampling.form == AnswerForm(json_schema='{"enum": [1]}')


def test_an_echo_begins_with_the_prompt(official: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "org/script", "max_tokens": 5, "echo": True}
    for prompt, words in (("the fox", "the fox"), (TOKENIZER("the fox").input_ids, "the fox")):
        plain = official.completions.create(
            model="org/script", prompt=prompt, max_tokens=5, n=2
        ).choices
        whole = official.completions.create(prompt=prompt, n=2, **asked).choices
        assert [one.text for one in whole] == [words + one.text for one in plain]
        stream = official.completions.create(prompt=prompt, stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in stream) == words + plain[0].text
    with pytest.raises(openai.BadRequestError, match="echo: not allowed with logprobs"):
        official.completions.create(prompt="the", logprobs=1, **asked)


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
    assert found["moesaic_engine_running[('model', 'tiny')]"] == 3
    assert found["moesaic_engine_parked[('model', 'tiny')]"] == 1
    assert found["moesaic_engine_healthy[('model', 'tiny')]"] == 1
    service.healthy = False
    try:
        assert any(name.startswith("moesaic_http_responses") for name in metrics_of(operator))
    finally:
        service.healthy = True


def test_limits_of_the_spec(http: httpx.Client) -> None:
    """`limited`: 20 tokens of a prompt, 10 of an answer, half a second."""

    def ask(**body: Any) -> httpx.Response:
        return http.post("/v1/completions", json={"model": "limited", "prompt": "the", **body})

    assert ask().json()["usage"]["completion_tokens"] == 10
    assert ask(max_tokens=10).status_code == 200
    for body, param in (
        ({"max_tokens": 11}, "max_tokens"),
        ({"prompt": [5] * 21, "max_tokens": 1}, "prompt"),
    ):
        refused = ask(**body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
    chat = {"model": "limited", "messages": MESSAGES}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert answer["usage"]["completion_tokens"] == 10
    late = ask(prompt="wait")
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "Expired"
    assert "request_s" in late.json()["error"]["message"]


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
