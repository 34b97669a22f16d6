"""The endpoint on a real socket, with the engine in the same process and the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from moesaic.actors.engine.engine import Sampling
from moesaic.clients.http_client import Client
from moesaic.proto.errors import ExpertUnavailable
from tests.helpers.endpoint.engines import reference
from tests.helpers.endpoint.service import MESSAGES, TEXT, TOKENIZER, Service, chat_ids

MODELS = ["tiny", "org/script", "plain", "tools", "limited"]


def text_of(ids: Sequence[int]) -> str:
    text = TOKENIZER.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


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
    with pytest.raises(openai.BadRequestError, match="echo: is not allowed with logprobs"):
        official.completions.create(prompt="the", logprobs=1, **asked)


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
