"""LangChain's `ChatOpenAI` and `OpenAIEmbeddings`."""

# Installed by `make test-clients` alone.
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx
import pytest
import tiktoken
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, SecretStr
from tiktoken import registry

SCRIPTED, TINY = "org/scripted", "org/tiny"
HELLO = "Grüße 🙂, this is the script. 日本語 too."


class City(BaseModel):
    """A city and how many live there."""

    name: str
    people: int


class Wish(BaseModel):
    """What is wished for."""

    # More keys than these, as a schema allows by itself, and a random model never comes to an end.
    model_config = ConfigDict(extra="forbid")

    size: Literal["small", "large"]
    sure: bool


def _weather(city: str) -> str:
    """How the weather is now."""
    return f"21 degrees in {city}"


get_weather: Any = tool("get_weather")(_weather)


def chat(url: str, model: str, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=f"{url}/v1",
        api_key=SecretStr("none"),
        max_retries=0,
        timeout=60,
        **more,
    )


def test_invoke_stream_and_batch(url: str) -> None:
    model = chat(url, SCRIPTED)
    answer = model.invoke([SystemMessage("be brief"), HumanMessage("hi")])
    assert answer.content == HELLO
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream("hi"))
    assert "".join(str(chunk.content) for chunk in chunks) == HELLO
    assert len(chunks) > 5
    assert [one.content for one in model.batch([f"repeat {n}" for n in range(5)])] == [*"01234"]


def test_asynchronously(url: str) -> None:
    async def ask() -> tuple[Any, str]:
        model = chat(url, SCRIPTED)
        whole = await model.ainvoke("hi")
        pieces = [str(chunk.content) async for chunk in model.astream("hi")]
        return whole.content, "".join(pieces)

    assert asyncio.run(ask()) == (HELLO, HELLO)


def test_a_conversation_with_a_tool(url: str) -> None:
    model = chat(url, SCRIPTED).bind_tools([get_weather])
    messages: list[Any] = [HumanMessage("How is the weather in Köln and Paris?")]
    answer = model.invoke(messages)
    assert [call["args"] for call in answer.tool_calls] == [{"city": "Köln"}, {"city": "Paris"}]
    messages.append(answer)
    messages += [get_weather.invoke(call) for call in answer.tool_calls]
    assert isinstance(messages[-1], ToolMessage)
    assert model.invoke(messages).content == "The tool says: 21 degrees in Paris"


def test_a_streamed_call_goes_back_as_it_was_put_together(url: str) -> None:
    model = chat(url, SCRIPTED).bind_tools([get_weather])
    whole: Any = None
    for chunk in model.stream("How is the weather in Köln?"):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert call["args"] == {"city": "Köln"}
    history = [HumanMessage("How is the weather in Köln?"), whole, get_weather.invoke(call)]
    assert model.invoke(history).content == "The tool says: 21 degrees in Köln"


def test_parts_with_hints(url: str) -> None:
    parts: list[Any] = [
        {"type": "text", "text": "You repeat.", "cache_control": {"type": "ephemeral"}}
    ]
    asked = [SystemMessage(parts), HumanMessage([{"type": "text", "text": "repeat parts"}])]
    assert chat(url, SCRIPTED).invoke(asked).content == "parts"
    history = [HumanMessage("hi"), AIMessage([{"type": "text", "text": "hello", "index": 0}])]
    assert chat(url, SCRIPTED).invoke([*history, HumanMessage("repeat x")]).content == "x"


# ---- structured output --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output_of_a_script(url: str, method: Any) -> None:
    model = chat(url, SCRIPTED).with_structured_output(City, method=method)
    assert model.invoke("describe Köln as JSON") == City(name="Köln", people=1086000)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output_of_a_random_model(url: str, method: Any, strict: Any) -> None:
    """The grammar alone makes it keep to the form."""
    model = chat(url, TINY, seed=3, max_tokens=300)
    found = model.with_structured_output(Wish, method=method, strict=strict).invoke("hello")
    assert isinstance(found, Wish)


@pytest.mark.parametrize("choice", ["any", "required", "Wish"])
def test_a_call_that_must_come(url: str, choice: str) -> None:
    model = chat(url, TINY, seed=3, max_tokens=300)
    # It would go on calling.
    asking = model.bind_tools([Wish], tool_choice=choice, parallel_tool_calls=False)
    answer = asking.invoke("hello")
    assert {call["name"] for call in answer.tool_calls} == {"Wish"}
    assert all(Wish(**call["args"]) for call in answer.tool_calls)


# ---- embeddings ---------------------------------------------------------------------------------


def embeddings(url: str, **more: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model=TINY, base_url=f"{url}/v1", api_key=SecretStr("none"), max_retries=0, **more
    )


TEXTS = ["the quick fox", "Paris"]


def vectors(url: str, given: list[Any]) -> list[list[float]]:
    answer = httpx.post(f"{url}/v1/embeddings", json={"model": TINY, "input": given}, timeout=60)
    return [one["embedding"] for one in answer.json()["data"]]


def test_embeddings_of_texts(url: str) -> None:
    model = embeddings(url, check_embedding_ctx_length=False)
    found = model.embed_documents(TEXTS)
    for one, other in zip(found, vectors(url, TEXTS), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert model.embed_query(TEXTS[0]) == pytest.approx(found[0], abs=1e-5)


def test_embeddings_of_token_ids(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its own check of lengths the client counts tokens, and sends their ids."""
    # What tiktoken would load from elsewhere: here a byte is a token.
    of_bytes = tiktoken.Encoding(
        "cl100k_base",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([n]): n for n in range(256)},
        special_tokens={},
    )
    monkeypatch.setitem(registry.ENCODINGS, "cl100k_base", of_bytes)
    found = embeddings(url, check_embedding_ctx_length=True).embed_documents(TEXTS)
    expected = vectors(url, [list(text.encode()) for text in TEXTS])
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
