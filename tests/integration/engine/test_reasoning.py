"""A model that thinks before it answers: what a client gets of it, whole and in a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import openai
import pytest

from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import Delta, RequestLimits, Sampling, TokenLogprob
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.text.answer_form import AnswerForm
from moesaic.actors.text.chat_template import ChatPrompt
from moesaic.actors.text.thinking import Thinking
from tests.helpers.endpoint.service import BODIES, tool_tokenizer

TOKENIZER = tool_tokenizer()
LIMITS = RequestLimits(
    max_prompt_tokens=2000, max_total_tokens=4000, max_requests=8, vocab_size=320
)
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
TEXT = f"Shall I? {CALL} No.\n</think>\n\nI ask. {CALL}"
TOOLS: list[Any] = [{"type": "function", "function": {"name": "now"}}]
ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Thinks(ServedModel):
    """Its prompts end inside of the thinking."""

    form: AnswerForm | None = None

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        prompt = await super().encode_chat(messages, tools, options)
        return ChatPrompt(prompt.token_ids, Thinking(opened=True))


@pytest.fixture
def model() -> Thinks:
    async def generate(
        request_id: str, prompt_ids: Sequence[int], sampling: Sampling, already: Sequence[int] = ()
    ) -> AsyncGenerator[Delta, None]:
        model.form = sampling.form
        for n, token in enumerate(TOKENIZER(TEXT).input_ids):
            logprobs = (TokenLogprob(token, -1.0, ()),) if sampling.logprobs is not None else ()
            last = n + 1 == sampling.max_tokens
            yield Delta((token,), "length" if last else None, logprobs=logprobs)
            if last:
                return
        yield Delta((), "stop")

    model = Thinks("m", TOKENIZER, LIMITS, generate)
    return model


@pytest.fixture
async def client(model: Thinks) -> AsyncIterator[openai.AsyncOpenAI]:
    app = create_app(models={"m": model}, bodies=BODIES)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    web: Any = httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60)
    async with openai.AsyncOpenAI(
        base_url="http://tiny/v1", api_key="none", http_client=web, max_retries=0
    ) as client:
        yield client


THOUGHT = f"Shall I? {CALL} No."


async def test_thinking_is_apart_and_calls_within_it_are_none(client: openai.AsyncOpenAI) -> None:
    choice = (await client.chat.completions.create(**ASKED, tools=TOOLS)).choices[0]
    message: Any = choice.message
    assert message.reasoning_content == THOUGHT
    assert message.content == "I ask. "
    assert [call.function.name for call in message.tool_calls] == ["now"]
    assert choice.finish_reason == "tool_calls"


async def test_without_tools_it_is_apart_too(client: openai.AsyncOpenAI) -> None:
    message: Any = (await client.chat.completions.create(**ASKED)).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, f"I ask. {CALL}")
    assert message.tool_calls is None


async def test_thinking_in_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        **ASKED, tools=TOOLS, stream=True, logprobs=True, n=2
    )
    parts: dict[int, list[str]] = {0: ["", "", ""], 1: ["", "", ""]}
    tokens = {0: "", 1: ""}
    async for chunk in stream:
        choice = chunk.choices[0]
        said = parts[choice.index]
        said[0] += getattr(choice.delta, "reasoning_content", None) or ""
        said[1] += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.type == "function"
            said[2] += call.function.name or "" if call.function else ""
        if choice.logprobs is not None:
            tokens[choice.index] += "".join(one.token for one in choice.logprobs.content or ())
    assert parts == {choice: [THOUGHT, "I ask. ", "now"] for choice in (0, 1)}
    assert tokens == dict.fromkeys((0, 1), TEXT)


async def test_thinking_that_is_cut_off_is_all_there_is(client: openai.AsyncOpenAI) -> None:
    choice = (await client.chat.completions.create(**ASKED, max_tokens=4)).choices[0]
    message: Any = choice.message
    assert THOUGHT.startswith(message.reasoning_content)
    assert (message.content, choice.finish_reason) == ("", "length")


async def test_the_form_of_an_answer_comes_after_the_thinking(
    client: openai.AsyncOpenAI, model: Thinks
) -> None:
    await client.chat.completions.create(**ASKED, response_format={"type": "json_object"})
    assert model.form is not None
    assert model.form.thinking == Thinking(opened=True)
