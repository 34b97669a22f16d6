"""What requests hand to the chat template: its variables, and what clients send back of answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from moesaic.actors.endpoint.openai.requests import ChatRequest, parse_request
from moesaic.actors.endpoint.openai.template_options import MAX_OPTIONS, MAX_OPTIONS_CHARS
from moesaic.proto.errors import RequestError

USER = {"role": "user", "content": "hi"}


def chat(**body: Any) -> ChatRequest:
    asked = {"model": "m", "messages": [USER]} | body
    return parse_request(ChatRequest, json.dumps(asked).encode())


def test_variables_of_the_template() -> None:
    assert chat().chat_template_kwargs is None
    assert chat(chat_template_kwargs=None).chat_template_kwargs is None
    for options in ({}, {"enable_thinking": False}, {"documents": [{"title": "a", "text": "b"}]}):
        assert chat(chat_template_kwargs=options).chat_template_kwargs == options


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("enable_thinking", "must be an object"),
        ([], "must be an object"),
        ({"messages": []}, "has the name 'messages'"),
        ({"tools": []}, "has the name 'tools'"),
        ({"add_generation_prompt": False}, "has the name 'add_generation_prompt'"),
        ({"tokenize": True}, "has the name 'tokenize'"),
        ({"chat_template": "{{ 1 }}"}, "has the name 'chat_template'"),
        ({"continue_final_message": True}, "has the name 'continue_final_message'"),
        ({"raise_exception": 1}, "has the name 'raise_exception'"),
        ({"self": 1}, "has the name 'self'"),
        ({"bos_token": ""}, "has the name 'bos_token'"),
        ({"a-b": 1}, "has the name 'a-b'"),
        ({"_x": 1}, "has the name '_x'"),
        ({"": 1}, "has the name ''"),
        ({"a\n": 1}, "letters, digits and _"),
        ({"x" * 65: 1}, "letters, digits and _"),
        ({f"x{n}": n for n in range(MAX_OPTIONS + 1)}, "at most 64 names"),
        ({"x": "y" * MAX_OPTIONS_CHARS}, "8201 characters as JSON; at most 8192"),
    ],
)
def test_variables_that_are_refused(options: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        chat(chat_template_kwargs=options)
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_clients_send_back(name: str) -> None:
    said = {"role": "assistant", "content": "Hi.", name: "hm"}
    message = chat(messages=[USER, said, USER]).messages[1].for_template()
    assert message == {"role": "assistant", "content": "Hi.", "reasoning_content": "hm"}
    # An answer that was cut within its thinking has no content.
    message = chat(messages=[USER, said | {"content": None}, USER]).messages[1].for_template()
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}
    for empty in ("", None):
        message = chat(messages=[USER, said | {name: empty}]).messages[1].for_template()
        assert message == {"role": "assistant", "content": "Hi."}
    with pytest.raises(RequestError, match=f"{name}: is only allowed with role='assistant'"):
        chat(messages=[USER | {name: "hm"}])


def test_calls_as_they_were_streamed() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": " {"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call | {"index": 0}]}
    asked = chat(messages=[USER, said])
    assert asked.messages[1].for_template()["tool_calls"] == [call]
