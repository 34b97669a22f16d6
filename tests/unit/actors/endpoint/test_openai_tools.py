"""Tools, the choice of them, and the form of an answer or of its calls."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from moesaic.actors.engine.engine import ExpertBounds
from moesaic.actors.text.answer_form import ANY_OBJECT, AnswerForm, ToolForm
from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.openai_requests import CACHED, CALLS, chat


def test_hints_at_tools_change_nothing() -> None:
    function = {"name": "f", "parameters": {"properties": {"cache_control": {}}}}
    plain = chat(tools=[{"type": "function", "function": function}])
    assert chat(tools=[{"type": "function", "function": {**function, **CACHED}, **CACHED}]) == plain
    # A tool's own parameters are no hints, whatever their names are.
    assert plain.offered_tools[0]["function"] == function


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "now", "parameters": {"type": "object"}},
}


def test_tools_as_templates_take_them() -> None:
    assert chat(tools=[WEATHER]).offered_tools == [WEATHER]
    assert chat(tools=[WEATHER], tool_choice="none").offered_tools == []
    assert chat(tools=[], tool_choice="auto").offered_tools == []
    messages = [
        {"role": "user", "content": "how is it?"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "rain", "tool_call_id": "a"},
    ]
    asked = [message.for_template() for message in chat(messages=messages).messages]
    assert asked[1]["tool_calls"] == CALLS  # templates differ in what they take for arguments
    assert asked[2] == {"role": "tool", "content": "rain", "tool_call_id": "a"}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "retrieval"}], "tools[0].type"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "strict": "yes"}}],
         "tools[0].function.strict"),
        ([WEATHER] * 129, "tools"),
    ],
)  # fmt: skip
def test_bad_tools(tools: Any, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(tools=tools)
    assert caught.value.param == param


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]},
    }


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("always", "is 'always'; use none, auto, required"),
        (named("other"), "names the function 'other'; the tools are weather"),
        (allowed("auto", "weather", "other"), "names the function 'other'"),
        (allowed("none", "weather"), "of type allowed_tools must be {"),
        (allowed("auto"), "of type allowed_tools must be {"),
        ({"type": "function", "name": "weather"}, "must name a function as"),
        ({"type": "function", "function": {"name": 7}}, "must name a function as"),
        ({"type": "custom", "custom": {"name": "weather"}}, "has the type 'custom'"),
        (7, "has the type None"),
    ],
)
def test_a_bad_choice_of_tools(choice: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(tools=[WEATHER], tool_choice=choice)
    assert caught.value.param == "tool_choice"
    assert words in str(caught.value)


@pytest.mark.parametrize("choice", ["required", named("weather"), allowed("auto", "weather")])
@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"tools": None}])
def test_a_choice_without_tools(choice: Any, tools: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="only allowed when tools are specified") as caught:
        chat(tool_choice=choice, **tools)
    assert caught.value.param == "tool_choice"


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
STRICT = {"type": "function", "function": {"name": "s", "parameters": CITY, "strict": True}}
PLAIN = {"type": "function", "function": {"name": "p", "parameters": CITY}}
BARE = {"type": "function", "function": {"name": "b"}}


def form(**fields: Any) -> AnswerForm | None:
    asked = chat(**fields)
    assert asked.sampling(5, ExpertBounds()).form == asked.form
    return asked.form


def test_the_form_of_an_answer() -> None:
    assert form() is None
    assert form(response_format={"type": "text"}) is None
    assert form(response_format={"type": "json_object"}) == AnswerForm(json_schema=ANY_OBJECT)
    schema = {"name": "x", "schema": {"enum": [1]}, "strict": True}
    asked = {"response_format": {"type": "json_schema", "json_schema": schema}}
    assert form(**asked) == AnswerForm(json_schema='{"enum": [1]}')
    # Either the form, or calls; where calls are forced, there is no other text.
    either = form(tools=[PLAIN], **asked)
    assert either is not None
    assert (either.json_schema, either.forced) == ('{"enum": [1]}', False)
    assert [tool.schema for tool in either.tools] == [ANY_OBJECT]
    forced = form(tools=[PLAIN], tool_choice="required", **asked)
    assert forced is not None
    assert (forced.json_schema, forced.forced) == (None, True)
    assert form(tools=[STRICT], tool_choice="none", **asked) == form(**asked)


def test_the_form_of_calls() -> None:
    assert form(tools=[PLAIN, BARE]) is None
    city = json.dumps(CITY)
    strict = ToolForm(name="s", schema=city, param="tools[1].function.parameters")
    loose = ToolForm(name="p", schema=ANY_OBJECT, param="tools[0].function.parameters")
    bare = ToolForm(name="b", schema=ANY_OBJECT, param="tools[2].function.parameters")
    tools = [PLAIN, STRICT, BARE]
    assert form(tools=tools) == AnswerForm(tools=(loose, strict, bare))
    held = replace(loose, schema=city)
    assert form(tools=tools, tool_choice="required") == AnswerForm(
        tools=(held, strict, bare), forced=True
    )
    assert form(tools=tools, tool_choice="required", parallel_tool_calls=False) == AnswerForm(
        tools=(held, strict, bare), forced=True, many=False
    )
    assert form(tools=tools, tool_choice=named("p")) == AnswerForm(
        tools=(held,), forced=True, many=False
    )
    assert form(tools=tools, tool_choice=allowed("auto", "p", "b")) is None
    assert form(tools=tools, tool_choice=allowed("required", "s")) == AnswerForm(
        tools=(strict,), forced=True
    )
    offered = chat(tools=tools, tool_choice=allowed("auto", "s")).offered_tools
    assert [tool["function"]["name"] for tool in offered] == ["s"]
    assert len(chat(tools=tools, tool_choice=named("p")).offered_tools) == 3


@pytest.mark.parametrize(
    ("parameters", "held"),
    [
        (None, ANY_OBJECT),
        ({}, ANY_OBJECT),
        ({"properties": {}}, '{"properties": {}, "type": "object"}'),
        ({"type": ["object", "null"]}, '{"type": "object"}'),
    ],
)
def test_arguments_are_an_object(parameters: Any, held: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    found = form(tools=[tool])
    assert found is not None
    assert found.tools[0].schema == held


def test_arguments_that_are_none_are_refused() -> None:
    function = {"name": "f", "parameters": {"type": "string"}, "strict": True}
    with pytest.raises(RequestError, match="arguments are an object") as caught:
        form(tools=[{"type": "function", "function": function}])
    assert caught.value.param == "tools[0].function.parameters"


def test_how_many_calls_are_wanted() -> None:
    assert chat().calls == "none"
    assert chat(tools=[PLAIN]).calls == "many"
    assert chat(tools=[PLAIN], parallel_tool_calls=False).calls == "one"
    assert chat(tools=[PLAIN], tool_choice=named("p")).calls == "named"
    assert chat(tools=[PLAIN], tool_choice="none").calls == "none"


@pytest.mark.parametrize(
    "form",
    [
        "json_object",
        {"type": "xml"},
        {"type": "json_object", "schema": {}},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}, "unknown": 1}},
    ],
)
def test_a_form_that_is_none_is_refused(form: Any) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        chat(response_format=form)
    assert caught.value.param == "response_format"
