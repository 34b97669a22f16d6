"""A random model at temperature 1 that is held to calls of tools, with the official client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from moesaic.actors.endpoint.ingress import create_app
from moesaic.actors.engine.engine import Engine, EngineConfig, Sampling
from moesaic.actors.engine.served_model import ServedModel
from moesaic.actors.engine.transformers_backend.engine import TransformersEngine
from moesaic.actors.text.answer_form import AnswerForm, ToolForm
from moesaic.actors.text.answer_parser import AnswerParser
from moesaic.actors.text.marked_text import MarkedText
from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.engines import deltas
from tests.helpers.endpoint.service import BODIES, tool_tokenizer
from tests.helpers.models.tiny import tiny_mixtral

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]
SIZES = EngineConfig(page_size=8, num_blocks=256, max_batch_tokens=128, max_requests=8)
TOKENIZER = tool_tokenizer()
TOKENIZER.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
TEXT_MARKS = tool_tokenizer()  # to which they are text like any other
VOCABULARY, END_OF_TEXT = 322, 2


class Weather(BaseModel):
    """How the weather is."""

    city: str = Field(max_length=3)
    unit: Literal["C", "F"]


class Now(BaseModel):
    """The time."""

    utc: bool


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
NAMED: Any = {"type": "function", "function": {"name": "Weather"}}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model = tiny_mixtral(eos_token_id=END_OF_TEXT, max_positions=2048)
    model.resize_token_embeddings(VOCABULARY)
    engine = TransformersEngine(model, config=SIZES, tokenizer=lambda: TOKENIZER)
    engine.start()
    yield engine
    engine.close()


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[openai.AsyncOpenAI]:
    text_marks = TransformersEngine(
        tiny_mixtral(eos_token_id=END_OF_TEXT, max_positions=2048),
        config=SIZES,
        tokenizer=lambda: TEXT_MARKS,
    )
    text_marks.start()
    served = ServedModel("tiny", TEXT_MARKS, text_marks.limits, text_marks.generate)
    app = create_app(models={"tiny": served}, bodies=BODIES)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    web: Any = httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60)
    async with openai.AsyncOpenAI(
        base_url="http://tiny/v1", api_key="none", http_client=web, max_retries=0
    ) as client:
        yield client
    text_marks.close()


def asked(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "messages": MESSAGES, "tools": TOOLS, "seed": seed, "temperature": 1,
        "max_tokens": 300, **more,
    }  # fmt: skip


def check(calls: Any) -> list[str]:
    """The names of valid calls."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


async def test_a_required_call_is_made(client: openai.AsyncOpenAI) -> None:
    for seed in range(3):
        answer = await client.chat.completions.create(
            **asked(seed, tool_choice="required", parallel_tool_calls=False)
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert len(check(choice.message.tool_calls)) == 1


async def test_several_calls_may_be_made(client: openai.AsyncOpenAI) -> None:
    made: list[int] = []
    for seed in range(2):
        answer = await client.chat.completions.create(
            **asked(seed, tool_choice="required", max_tokens=150)
        )
        made.append(len(check(answer.choices[0].message.tool_calls)))
    assert min(made) >= 1
    assert max(made) > 1


async def test_the_named_function_is_called(client: openai.AsyncOpenAI) -> None:
    """As OpenAI has it, the answer ends with "stop"."""
    for seed in range(2):
        answer = await client.chat.completions.create(**asked(seed, tool_choice=NAMED))
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        assert check(choice.message.tool_calls) == ["Weather"]


async def test_parse_gives_the_function_s_own_class(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(**asked(1, tool_choice=NAMED))
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    # Without a choice a random model says what it likes; the request is accepted, and it is text.
    text = await client.chat.completions.parse(**asked(1, max_tokens=None, stop=["e"]))
    assert not text.choices[0].message.tool_calls


async def test_the_stream_helper_puts_the_call_together(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        **asked(2, tool_choice="required", parallel_tool_calls=False)
    ) as stream:
        async for _ in stream:
            pass
        choice = (await stream.get_final_completion()).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert isinstance(call.function.parsed_arguments, (Weather, Now))


async def test_a_call_that_is_cut_off_is_text(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**asked(0, tool_choice=NAMED, max_tokens=20))
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert (choice.message.content or "").startswith('<tool_call>\n{"name": "')


async def test_an_answer_of_a_form_or_calls(client: openai.AsyncOpenAI) -> None:
    schema = {"name": "x", "schema": {"enum": ["red", "blue"]}}
    form = {"type": "json_schema", "json_schema": schema}
    kinds: set[bool] = set()
    for seed in range(8):
        answer = await client.chat.completions.create(
            **asked(seed, response_format=form, parallel_tool_calls=False)
        )
        message = answer.choices[0].message
        kinds.add(bool(message.tool_calls))
        if not message.tool_calls:
            assert json.loads(message.content or "") in ("red", "blue")
    assert kinds == {True, False}


async def test_a_schema_that_cannot_be_enforced_names_its_place(
    client: openai.AsyncOpenAI,
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            **asked(0, tools=[TOOLS[0], tool], tool_choice="required")
        )
    assert caught.value.param == "tools[1].function.parameters"
    assert "properties.a: the pattern '^(?!x)' cannot be used: look-around" in str(caught.value)
    # Nothing is enforced where nothing is asked to be.
    await client.chat.completions.create(**asked(0, tools=[tool], max_tokens=2))


async def test_strict_calls_within_free_text(engine: Engine) -> None:
    """The mark is made likely, so that it comes by itself, as a special token."""
    form = AnswerForm(
        tools=tuple(ToolForm(name=name, schema=json.dumps(s)) for name, s in SCHEMAS.items())
    )
    mark = TOKENIZER.convert_tokens_to_ids("<tool_call>")
    assert isinstance(mark, int)
    found: list[str] = []
    text = ""
    for seed in range(5):
        sampling = Sampling(
            max_tokens=200, temperature=1.0, seed=seed, form=form, logit_bias=((mark, 7.0),)
        )
        answer = await deltas(engine, [5, 6, 7], sampling)
        ids = [token for delta in answer for token in delta.token_ids]
        parser = AnswerParser(most_calls=None)
        whole = str(TOKENIZER.decode(ids, skip_special_tokens=False))
        parsed = [parser.push(MarkedText(whole)), parser.flush()]
        text += "".join(one.content.text for one in parsed)
        for call in (call for one in parsed for call in one.calls):
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            found.append(call.name)
    assert set(found) == {"Weather", "Now"}
    assert text.strip()


async def test_a_schema_that_becomes_too_large_ends_its_request_alone(engine: Engine) -> None:
    """An answer that ended there would look complete."""
    many = {f"p{n}": {"type": "string"} for n in range(3_000)}
    form = AnswerForm(json_schema=json.dumps({"type": "object", "properties": many}))
    with pytest.raises(RequestError, match="the schema's grammar is too large"):
        await deltas(engine, [5, 6, 7], Sampling(max_tokens=20, form=form))
    assert await deltas(engine, [5, 6, 7], Sampling(max_tokens=2))
