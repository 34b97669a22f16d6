"""The `openai` client's own conversations: chat, streams, tools, parsed answers, embeddings."""

# Installed by `make test-clients` alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Literal

import openai
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamEvent
from pydantic import BaseModel, Field

SCRIPTED, TINY = "org/scripted", "org/tiny"
HELLO = "Grüße 🙂, this is the script. 日本語 too."
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How the weather is now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


class City(BaseModel):
    name: str
    people: int


class Unit(StrEnum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


class Wish(BaseModel):
    """Small enough that a model of random weights comes to its end."""

    unit: Unit
    size: Literal["small", "large"]
    sure: bool


class SetUnit(BaseModel):
    """Set the unit of temperatures."""

    unit: Unit


class SetSize(BaseModel):
    """Set the size of letters."""

    size: Literal["small", "large"] = Field(description="of letters")


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


# ---- text ---------------------------------------------------------------------------------------


def test_chat_by_name_and_by_alias(client: openai.OpenAI) -> None:
    for name in (SCRIPTED, "scripted"):
        answer = client.chat.completions.create(model=name, messages=user("hi"))
        assert answer.choices[0].message.content == HELLO
        assert (answer.choices[0].finish_reason, answer.model) == ("stop", SCRIPTED)
        assert answer.usage is not None
        assert answer.usage.total_tokens > answer.usage.completion_tokens > 0


def test_a_stream_has_the_text_and_then_its_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=SCRIPTED,
            messages=user("hi"),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == HELLO
    assert len(texts) > 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    events: list[ChatCompletionStreamEvent[Any]] = []
    with client.chat.completions.stream(model=SCRIPTED, messages=user("hi")) as stream:
        events += stream
        final = stream.get_final_completion()
    assert final.choices[0].message.content == HELLO
    kinds = [event.type for event in events]
    assert kinds.count("content.delta") > 5
    assert kinds[-1] == "content.done" or "content.done" in kinds


def test_many_at_once(url: str) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=60) as many:
            answers = await asyncio.gather(
                *(
                    many.chat.completions.create(model=SCRIPTED, messages=user(f"repeat {n}"))
                    for n in range(10)
                )
            )
            stream = await many.chat.completions.create(
                model=SCRIPTED, messages=user("hi"), stream=True
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return [*(answer.choices[0].message.content for answer in answers), text]

    assert asyncio.run(ask()) == [*map(str, range(10)), HELLO]


def test_a_completion_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=TINY, prompt="the quick", max_tokens=8, temperature=0, logprobs=2, seed=1
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert 1 <= len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) <= 8
    assert all(logprob <= 0 for logprob in found.token_logprobs)


def test_a_chat_with_logprobs(client: openai.OpenAI) -> None:
    for top in (0, 3):
        answer = client.chat.completions.create(
            model=TINY,
            messages=user("the quick"),
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=top,
        )
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.content
        assert {len(token.top_logprobs) for token in found.content} == {top}


def test_embeddings(client: openai.OpenAI) -> None:
    # The client asks for base64 and decodes it.
    answer = client.embeddings.create(model=TINY, input=["the quick fox", "Paris"])
    floats = client.embeddings.create(
        model="tiny", input=["the quick fox", "Paris"], encoding_format="float"
    )
    for one, other in zip(answer.data, floats.data, strict=True):
        assert len(one.embedding) == 32
        assert one.embedding == pytest.approx(other.embedding, abs=1e-5)
    assert answer.model == floats.model == TINY
    assert answer.usage.prompt_tokens > 0


def test_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {SCRIPTED, "scripted", TINY, "tiny"} <= set(names)
    assert client.models.retrieve(SCRIPTED).id == SCRIPTED
    assert client.models.retrieve("scripted").id == "scripted"


# ---- tools --------------------------------------------------------------------------------------


def test_a_conversation_with_a_tool(client: openai.OpenAI) -> None:
    """The client's own objects go back as they came."""
    messages: list[Any] = user("How is the weather in Köln and Paris?")
    first = client.chat.completions.create(
        model=SCRIPTED, messages=messages, tools=[WEATHER], tool_choice="auto"
    )
    assert first.choices[0].finish_reason == "tool_calls"
    message = first.choices[0].message
    assert (message.content or "").strip() == "Both."
    assert message.tool_calls is not None
    asked: list[Any] = list(message.tool_calls)
    assert [json.loads(call.function.arguments) for call in asked] == [
        {"city": "Köln"}, {"city": "Paris"},
    ]  # fmt: skip
    assert len({call.id for call in asked}) == 2
    messages.append(message)
    for call in asked:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "21 degrees"})
    second = client.chat.completions.create(model=SCRIPTED, messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "The tool says: 21 degrees"
    assert second.choices[0].finish_reason == "stop"


def test_calls_in_a_stream_put_together_as_clients_do(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=SCRIPTED,
        messages=user("How is the weather in Köln and Paris?"),
        tools=[WEATHER],
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [json.loads(event.arguments) for event in done] == [{"city": "Köln"}, {"city": "Paris"}]
    calls: list[Any] = list(final.choices[0].message.tool_calls or ())
    assert [call.function.name for call in calls] == ["get_weather", "get_weather"]
    # What the helper made of the stream goes back, `index` and `parsed` included.
    history = [
        *user("How is the weather in Köln and Paris?"),
        final.choices[0].message.model_dump(),
        *(
            {"role": "tool", "tool_call_id": call.id, "content": f"{n} degrees"}
            for n, call in enumerate(calls)
        ),
    ]
    answer = client.chat.completions.create(model=SCRIPTED, messages=history, tools=[WEATHER])
    assert answer.choices[0].message.content == "The tool says: 1 degrees"


def test_one_call_where_several_are_not_wanted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SCRIPTED,
        messages=user("How is the weather in Köln and Paris?"),
        tools=[WEATHER],
        parallel_tool_calls=False,
    )
    assert len(answer.choices[0].message.tool_calls or ()) == 1


def test_no_call_where_none_is_wanted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=SCRIPTED, messages=user("hi"), tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content == HELLO


CHOICES: list[Any] = ["required", {"type": "function", "function": {"name": "SetSize"}}]


@pytest.mark.parametrize("choice", CHOICES, ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_that_must_come(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    """By a model of random weights: the grammar alone makes it call."""
    asked: dict[str, Any] = {
        "model": TINY,
        "messages": user("hello"),
        "tools": [openai.pydantic_function_tool(SetUnit), openai.pydantic_function_tool(SetSize)],
        "tool_choice": choice,
        "parallel_tool_calls": False,  # it would go on calling
        "seed": 7,
        "max_tokens": 300,
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.parse(**asked)
    message = answer.choices[0].message
    assert message.tool_calls, message
    names = {call.function.name for call in message.tool_calls}
    assert names == {"SetSize"} if choice != "required" else names <= {"SetSize", "SetUnit"}
    for call in message.tool_calls:
        assert isinstance(call.function.parsed_arguments, SetSize | SetUnit)
    # OpenAI's: `stop` where a function is named, `tool_calls` where one must come.
    assert answer.choices[0].finish_reason in ("stop", "tool_calls")


def test_a_tool_of_pydantic_in_a_parsed_conversation(client: openai.OpenAI) -> None:
    class GetWeather(BaseModel):
        city: str

    messages: list[Any] = user("How is the weather in Köln?")
    tools = [openai.pydantic_function_tool(GetWeather, name="get_weather")]
    first = client.chat.completions.parse(model=SCRIPTED, messages=messages, tools=tools)
    calls: Any = first.choices[0].message.tool_calls
    (call,) = calls
    assert call.function.parsed_arguments == GetWeather(city="Köln")
    messages += [first.choices[0].message]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    second = client.chat.completions.parse(model=SCRIPTED, messages=messages, tools=tools)
    assert second.choices[0].message.content == "The tool says: rain"


# ---- answers of a form --------------------------------------------------------------------------


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    messages: list[Any] = user("describe Köln")
    answer = client.chat.completions.parse(model=SCRIPTED, messages=messages, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Köln", people=1086000)
    # It goes back into the conversation with what `parse` made of it.
    messages += [answer.choices[0].message, *user("repeat that")]
    again = client.chat.completions.create(model=SCRIPTED, messages=messages)
    assert again.choices[0].message.content == "that"


def test_a_form_is_kept_to_by_a_random_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=TINY, messages=user("hello"), response_format=Wish, seed=seed, max_tokens=300
        )
        assert isinstance(answer.choices[0].message.parsed, Wish)


def test_a_form_in_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=TINY, messages=user("hello"), response_format=Wish, seed=1, max_tokens=300
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Wish)


def test_an_answer_that_was_cut_off_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=SCRIPTED, messages=user("describe Köln"), response_format=City, max_tokens=3
        )


# ---- errors -------------------------------------------------------------------------------------


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=SCRIPTED, messages=user("hi"), temperature=9)
    assert wrong.value.param == "temperature"
    assert "temperature: " in wrong.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="org/nothing", messages=user("hi"))
    assert unknown.value.code == "UnknownModel"
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="busy", messages=user("hi"))
    with pytest.raises(openai.InternalServerError) as lost:
        client.chat.completions.create(model="lost", messages=user("hi"))
    assert lost.value.status_code == 503
    assert lost.value.request_id


def test_what_is_refused_for_now_is_sent_again(client: openai.OpenAI) -> None:
    patient = client.with_options(max_retries=2)
    began = time.monotonic()
    answer = patient.chat.completions.create(model="busy-at-first", messages=user("hi"))
    assert answer.choices[0].message.content == HELLO
    assert time.monotonic() - began >= 0.9  # Retry-After


def test_an_error_within_a_stream(client: openai.OpenAI) -> None:
    pieces = []
    with pytest.raises(openai.APIError, match="org/broken/1/2"):
        for chunk in client.chat.completions.create(
            model=SCRIPTED, messages=user("repeat this, then break"), stream=True
        ):
            pieces.append(chunk.choices[0].delta.content or "")
    assert "".join(pieces)
