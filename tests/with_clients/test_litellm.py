"""LiteLLM, which speaks of the endpoint as of a model `openai/NAME`."""

# Installed by `make test-clients` alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel

SCRIPTED, TINY = "openai/org/scripted", "openai/org/tiny"
HELLO = "Grüße 🙂, this is the script. 日本語 too."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
UNIT = {
    "type": "function",
    "function": {
        "name": "set_unit",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["c", "f"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


class Wish(BaseModel):
    size: Literal["small", "large"]
    sure: bool


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def asked(url: str) -> dict[str, Any]:
    return {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0, "timeout": 60}


def test_chat_whole_streamed_and_asynchronously(asked: dict[str, Any]) -> None:
    answer: Any = litellm.completion(SCRIPTED, user("hi"), **asked)
    assert answer.choices[0].message.content == HELLO
    assert answer.usage.completion_tokens > 0
    stream: Any = litellm.completion(SCRIPTED, user("hi"), stream=True, **asked)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == HELLO
    assert len(pieces) > 5
    later: Any = asyncio.run(litellm.acompletion(SCRIPTED, user("repeat this"), **asked))
    assert later.choices[0].message.content == "this"


def test_hints_for_other_services_do_no_harm(asked: dict[str, Any]) -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You repeat.", **hint}]},
        {"role": "user", "content": [{"type": "text", "text": "repeat this", **hint}], **hint},
    ]
    answer: Any = litellm.completion(SCRIPTED, messages, tools=[{**WEATHER, **hint}], **asked)
    assert answer.choices[0].message.content == "this"


def test_a_conversation_with_a_tool(asked: dict[str, Any]) -> None:
    messages = user("How is the weather in Köln?")
    first: Any = litellm.completion(SCRIPTED, messages, tools=[WEATHER], **asked)
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    result = {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "rain"}
    # Its own object, and what it makes of it as plain values.
    for sent in (first.choices[0].message, first.choices[0].message.model_dump()):
        history = [*messages, sent, result]
        second: Any = litellm.completion(SCRIPTED, history, tools=[WEATHER], **asked)
        assert second.choices[0].message.content == "The tool says: rain"


def test_a_streamed_call_is_put_together(asked: dict[str, Any]) -> None:
    messages = user("How is the weather in Köln?")
    stream: Any = litellm.completion(SCRIPTED, messages, tools=[WEATHER], stream=True, **asked)
    whole: Any = litellm.stream_chunk_builder(list(stream), messages=messages)
    (call,) = whole.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    history = [*messages, whole.choices[0].message.model_dump()]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    answer: Any = litellm.completion(SCRIPTED, history, tools=[WEATHER], **asked)
    assert answer.choices[0].message.content == "The tool says: sun"


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "set_unit"}}]
)
def test_a_call_that_must_come(asked: dict[str, Any], choice: Any) -> None:
    answer: Any = litellm.completion(
        TINY,
        user("hello"),
        tools=[UNIT],
        tool_choice=choice,
        parallel_tool_calls=False,  # it would go on calling
        seed=3,
        max_tokens=300,
        **asked,
    )
    for call in answer.choices[0].message.tool_calls:
        assert call.function.name == "set_unit"
        assert json.loads(call.function.arguments)["unit"] in ("c", "f")


def test_an_answer_of_a_form(asked: dict[str, Any]) -> None:
    answer: Any = litellm.completion(
        TINY, user("hello"), response_format=Wish, seed=3, max_tokens=300, **asked
    )
    assert Wish.model_validate_json(answer.choices[0].message.content)


def test_embeddings(asked: dict[str, Any]) -> None:
    answer: Any = litellm.embedding(TINY, ["the quick fox", "Paris"], **asked)
    assert [len(one["embedding"]) for one in answer.data] == [32, 32]


def test_errors_are_its_own(asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.exceptions.BadRequestError, match="temperature"):
        litellm.completion(SCRIPTED, user("hi"), temperature=9, **asked)
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion("openai/org/nothing", user("hi"), **asked)
    with pytest.raises(litellm.exceptions.RateLimitError):
        litellm.completion("openai/busy", user("hi"), max_retries=0, **asked)
    with pytest.raises(litellm.exceptions.ServiceUnavailableError):
        litellm.completion("openai/lost", user("hi"), max_retries=0, **asked)
