"""Tools, templates' variables and the form of an answer, with the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from moesaic.actors.text.answer_form import AnswerForm
from tests.helpers.endpoint.service import CALLING, MESSAGES, Service

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
