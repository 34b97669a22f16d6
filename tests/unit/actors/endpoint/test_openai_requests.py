"""Requests are refused by name, with the field and the value; defaults of other clients pass."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import openai.types.chat
import pytest
from openai.resources.chat import Completions as ChatResource
from openai.resources.completions import Completions as CompletionsResource

from moesaic.actors.endpoint.openai import responses
from moesaic.actors.endpoint.openai.requests import (
    _IGNORED,
    _UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    parse_request,
)
from moesaic.actors.engine.engine import ExpertBounds, Sampling
from moesaic.actors.text.answer_form import ANY_OBJECT, AnswerForm, ToolForm
from moesaic.proto.errors import ERRORS, RequestError

COMPLETION = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def completion(**more: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({**COMPLETION, **more}).encode())


def chat(**more: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({**CHAT, **more}).encode())


def test_the_least_that_is_needed() -> None:
    asked = completion()
    assert (asked.prompt, asked.temperature, asked.stop, asked.stream) == (["x"], None, None, False)
    assert [(m.role, m.content) for m in chat().messages] == [("user", "x")]


def test_null_is_the_same_as_absent() -> None:
    """Many clients send all that they know."""
    own = {"model", "messages", "prompt", "moesaic"}
    nothing = dict.fromkeys((*_UNSUPPORTED, *_IGNORED))
    assert chat(**nothing, **dict.fromkeys(ChatRequest.model_fields.keys() - own)).form is None
    completion(**nothing, **dict.fromkeys(CompletionRequest.model_fields.keys() - own))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("x", ["x"]),
        (["x", "y"], ["x", "y"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_every_form_of_a_prompt(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompt == prompts


def test_stop_is_one_string_or_several() -> None:
    assert completion(stop="a").stop == ["a"]
    assert completion(stop=["a", "bc"]).stop == ["a", "bc"]
    assert completion(stop=None).stop is None


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = openai.types.chat.ChatCompletionMessage(role="assistant", content="hi")
    back = {**answer.model_dump(), "tool_calls": [], "function_call": None}
    assert chat(messages=[back]).messages[0].content == "hi"


CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("messages", "texts"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "a", **CACHED}]}], ["a"]),
        ([{"role": "user", "content": "a", **CACHED}], ["a"]),
        (
            [{"role": "user", "content": [
                {"type": "text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}},
                {"type": "text", "text": "b", "annotations": [], "index": 1, "id": "lc_1"},
            ]}],
            ["ab"],
        ),
        ([{"role": "user", "content": []}, {"role": "user", "content": "a"}], ["", "a"]),
        ([{"role": "assistant", "content": [
            {"type": "text", "text": "I can't. "}, {"type": "refusal", "refusal": "no"}
        ]}], ["I can't. no"]),
        ([{"role": "assistant", "content": None, "refusal": "no"}], ["no"]),
        ([{"role": "assistant", "content": "a", "refusal": None, "annotations": [{"type": "url"}],
           "parsed": {"x": 1}, "provider_specific_fields": {"refusal": None}}], ["a"]),
        ([{"role": "assistant", "content": [], "tool_calls": [
            {"index": 0, "id": "a", "type": "function", "provider_specific_fields": {},
             "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}
        ]}], [""]),
        ([{"role": "tool", "tool_call_id": "a", "name": "f",
           "content": [{"type": "text", "text": "x", **CACHED}], **CACHED}], ["x"]),
        ([{"role": "user", "content": "a\0b", "name": "ann"}], ["a\0b"]),
    ],
)  # fmt: skip
def test_what_clients_keep_in_messages_changes_nothing(messages: Any, texts: list[str]) -> None:
    asked = [message.for_template() for message in chat(messages=messages).messages]
    assert [message["content"] for message in asked] == texts
    assert "cache_control" not in json.dumps(asked)
    assert "index" not in json.dumps(asked)


def test_hints_at_tools_change_nothing() -> None:
    function = {"name": "f", "parameters": {"properties": {"cache_control": {}}}}
    plain = chat(tools=[{"type": "function", "function": function}])
    assert chat(tools=[{"type": "function", "function": {**function, **CACHED}, **CACHED}]) == plain
    # A tool's own parameters are no hints, whatever their names are.
    assert plain.offered_tools[0]["function"] == function


def test_sampling_is_as_asked_for_and_openais_otherwise() -> None:
    assert completion().sampling(5, ExpertBounds()) == Sampling(max_tokens=5, temperature=1.0)
    asked = completion(
        temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1, seed=-4, n=2,
        frequency_penalty=-1, presence_penalty=2, logit_bias={"7": 3, "0": -100},
    )  # fmt: skip
    assert asked.choices == 2
    assert asked.sampling(5, ExpertBounds()) == Sampling(
        max_tokens=5, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, repetition_penalty=1.1,
        seed=-4, frequency_penalty=-1, presence_penalty=2, logit_bias=((7, 3.0), (0, -100.0)),
    )  # fmt: skip
    assert completion(top_k=-1).sampling(5, ExpertBounds()).top_k == 0


def test_logprobs_in_both_forms() -> None:
    assert completion().top_tokens is None
    assert completion(logprobs=0).top_tokens == 0
    assert completion(logprobs=3).sampling(1, ExpertBounds()).logprobs == 3
    assert chat(logprobs=False).top_tokens is None
    assert chat(logprobs=True).top_tokens == 0
    assert chat(logprobs=True, top_logprobs=4).top_tokens == 4
    with pytest.raises(RequestError, match=r"^top_logprobs: is only allowed with .* \(got 2\)"):
        chat(top_logprobs=2)


def test_both_names_of_the_budget() -> None:
    assert chat(max_tokens=5).token_budget == 5
    assert chat(max_completion_tokens=6).token_budget == 6
    assert chat().token_budget is None


def test_what_openai_has_passes_with_its_neutral_value_only() -> None:
    neutral = {name: values[0] for name, values in _UNSUPPORTED.items() if values}
    assert completion(**neutral) == completion()
    assert chat(**neutral) == chat()
    assert chat(**dict.fromkeys(_UNSUPPORTED)) == chat()
    assert completion(user="me", metadata={"a": "b"}) == completion()


@pytest.mark.parametrize("name", sorted(_UNSUPPORTED))
def test_any_other_value_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}=.* is not supported") as caught:
        completion(**{name: {"some": "value"}})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("resource", "kind"), [(CompletionsResource, CompletionRequest), (ChatResource, ChatRequest)]
)
def test_every_parameter_of_the_official_client_is_known(resource: Any, kind: Any) -> None:
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    theirs = set(inspect.signature(resource.create).parameters) - own
    assert theirs <= set(kind.model_fields) | set(_UNSUPPORTED) | set(_IGNORED)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x"}, "model", "missing parameter 'model'"),
        ({"model": "m"}, "prompt", "missing parameter 'prompt'"),
        ({"model": 5, "prompt": "x"}, "model", "model: input should be a valid string (got 5)"),
        ({**COMPLETION, "temprature": 1}, "temprature", "unknown parameter 'temprature'"),
        ({**COMPLETION, "temperature": 2.1}, "temperature", "less than or equal to 2 (got 2.1)"),
        ({**COMPLETION, "temperature": "1"}, "temperature", "valid number (got '1')"),
        ({**COMPLETION, "temperature": True}, "temperature", "valid number (got True)"),
        ({**COMPLETION, "top_p": 0}, "top_p", "greater than 0 (got 0)"),
        ({**COMPLETION, "top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({**COMPLETION, "max_tokens": 0}, "max_tokens", "greater than or equal to 1 (got 0)"),
        ({**COMPLETION, "max_tokens": 1.5}, "max_tokens", "valid integer (got 1.5)"),
        ({**COMPLETION, "stop": ""}, "stop", "string of 0 characters"),
        ({**COMPLETION, "stop": list("abcde")}, "stop", "has 5 strings; at most 4"),
        ({**COMPLETION, "stop": "x" * 2000}, "stop", "string of 2000 characters"),
        ({**COMPLETION, "stop": [1]}, "stop[0]", "valid string (got 1)"),
        ({**COMPLETION, "stream": "yes"}, "stream", "valid boolean"),
        ({**COMPLETION, "stream_options": {"x": 1}}, "stream_options.x", "unknown parameter"),
        ({**COMPLETION, "n": 0}, "n", "greater than or equal to 1 (got 0)"),
        ({**COMPLETION, "n": True}, "n", "valid integer (got True)"),
        ({**COMPLETION, "n": 65}, "n", "less than or equal to 64 (got 65)"),
        ({**COMPLETION, "n": 33, "prompt": ["a", "b"]}, "n", "n: 2 prompts x n exceed 64 choices"),
        ({**COMPLETION, "echo": True, "logprobs": 1}, "echo", "echo: not allowed with logprobs"),
        ({**COMPLETION, "logprobs": 21}, "logprobs", "less than or equal to 20 (got 21)"),
        ({**COMPLETION, "logprobs": True}, "logprobs", "valid integer (got True)"),
        ({**COMPLETION, "seed": 1.5}, "seed", "valid integer (got 1.5)"),
        ({**COMPLETION, "seed": 2**63}, "seed", "less than"),
        ({**COMPLETION, "top_k": -2}, "top_k", "greater than or equal to -1 (got -2)"),
        ({**COMPLETION, "min_p": 1.1}, "min_p", "less than or equal to 1 (got 1.1)"),
        ({**COMPLETION, "repetition_penalty": 0}, "repetition_penalty", "greater than 0 (got 0)"),
        ({**COMPLETION, "frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({**COMPLETION, "presence_penalty": "1"}, "presence_penalty", "valid number (got '1')"),
        ({**COMPLETION, "logit_bias": [1]}, "logit_bias", "must map at most 1024 token ids"),
        ({**COMPLETION, "logit_bias": {"a": 1}}, "logit_bias", "has 'a': 1; token ids and numbers"),
        ({**COMPLETION, "logit_bias": {"1": True}}, "logit_bias", "has '1': True; token ids"),
        ({**COMPLETION, "logit_bias": {"1": 101}}, "logit_bias", "has 101; -100 to 100"),
        ({**COMPLETION, "prompt": []}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": [1, "a"]}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": [[1], []]}, "prompt", "none of them empty"),
        ({**COMPLETION, "prompt": [True]}, "prompt", "must be a string"),
        ({**COMPLETION, "prompt": ["x"] * 65}, "prompt", "has 65 prompts; at most 64"),
        ({**COMPLETION, "prompt": {"{a}": 1}}, "prompt", "(got {'{a}': 1})"),
    ],
)
def test_bad_completions(body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(CompletionRequest, json.dumps(body).encode())
    assert message in str(caught.value)
    assert caught.value.param == param


TEXT = {"type": "text", "text": "x"}
CALLS = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "at least 1 item"),
        ("hi", "messages", "valid list"),
        (
            [{"role": "user"}],
            "messages[0].content",
            "a message needs content or tool_calls (got None)",
        ),
        ([{"role": "robot", "content": "x"}], "messages[0].role", "(got 'robot')"),
        (
            [{"role": "tool", "content": "x"}],
            "messages[0].tool_call_id",
            "role='tool', which needs it (got None)",
        ),
        (
            [{"role": "user", "content": "x", "tool_call_id": "a"}],
            "messages[0].tool_call_id",
            "role='tool', which needs it (got 'a')",
        ),
        (
            [{"role": "user", "tool_calls": CALLS}],
            "messages[0].tool_calls",
            "only allowed with role='assistant' (got ['f'])",
        ),
        (
            [{"role": "user", "content": "x", "refusal": "no"}],
            "messages[0].refusal",
            "only allowed with role='assistant' (got 'no')",
        ),
        (
            [{"role": "function", "name": "f", "content": "x"}],
            "messages[0].role",
            "'assistant' or 'tool' (got 'function')",
        ),
        (
            [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}],
            "messages[0].function_call",
            "is not supported; send tool_calls",
        ),
        (
            [{"role": "assistant", "content": "x", "audio": {"id": "a"}}],
            "messages[0].audio",
            "is not supported (got {'id': 'a'})",
        ),
        ([{"role": "user", "content": 5}], "messages[0].content", "string or a list of text parts"),
        (
            [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1].type",
            "are not supported; there are: text (got 'image_url')",
        ),
        ([{"role": "user", "content": [{"type": "{x}"}]}], "messages[0].content[0].type", "'{x}'"),
        ([{"role": "user", "content": [{"type": []}]}], "messages[0].content[0].type", "(got [])"),
        (
            [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}],
            "messages[0].content[0].type",
            "there are: text (got 'refusal')",
        ),
        (
            [{"role": "assistant", "content": [{"type": "input_audio", "input_audio": {}}]}],
            "messages[0].content[0].type",
            "there are: text, refusal (got 'input_audio')",
        ),
        (
            [{"role": "user", "content": ["x"]}],
            "messages[0].content[0]",
            'such as {"type": "text", "text": "..."} (got \'x\')',
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            "messages[0].content[0].text",
            "must be a string (got None)",
        ),
        (
            [{"role": "user", "content": [{**TEXT, "colour": 1}]}],
            "messages[0].content[0].colour",
            "is no key of a text part (got 1)",
        ),
        ([{"role": "user", "content": "x", "y": 1}], "messages[0].y", "unknown parameter"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}],
            "messages[0].tool_calls[0].id",
            "valid string",
        ),
    ],
)
def test_bad_messages(messages: Any, param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(messages=messages)
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"model": "m", "prompt": NaN}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b"\xff\xfe",
        b'{"a":' * 1000,
    ],
)
def test_bodies_that_are_not_a_json_object(body: bytes) -> None:
    with pytest.raises(RequestError, match="JSON") as caught:
        parse_request(CompletionRequest, body)
    assert caught.value.param is None


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_has_an_answer(code: str) -> None:
    error = ERRORS[code]("why")
    body = responses.error_response(error, words="why").error
    assert (body.message, body.code) == ("why", code)
    assert body.type in {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "rate_limit_error",
        "server_error",
    }


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
        (allowed("none", "weather"), "needs allowed_tools with a mode"),
        (allowed("auto"), "needs allowed_tools with a mode"),
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
