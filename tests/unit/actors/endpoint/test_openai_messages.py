"""Messages are read in every form that clients send, and refused by name in any other."""

from __future__ import annotations

import json
from typing import Any

import openai.types.chat
import pytest

from moesaic.proto.errors import RequestError
from tests.helpers.endpoint.openai_requests import CACHED, CALLS, chat


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "ab"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = openai.types.chat.ChatCompletionMessage(role="assistant", content="hi")
    back = {**answer.model_dump(), "tool_calls": [], "function_call": None}
    assert chat(messages=[back]).messages[0].content == "hi"


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


TEXT = {"type": "text", "text": "x"}


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
            "is required with role='tool', and not allowed with other roles (got None)",
        ),
        (
            [{"role": "user", "content": "x", "tool_call_id": "a"}],
            "messages[0].tool_call_id",
            "is required with role='tool', and not allowed with other roles (got 'a')",
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
            "is not supported here; use text (got 'image_url')",
        ),
        ([{"role": "user", "content": [{"type": "{x}"}]}], "messages[0].content[0].type", "'{x}'"),
        ([{"role": "user", "content": [{"type": []}]}], "messages[0].content[0].type", "(got [])"),
        (
            [{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}],
            "messages[0].content[0].type",
            "use text (got 'refusal')",
        ),
        (
            [{"role": "assistant", "content": [{"type": "input_audio", "input_audio": {}}]}],
            "messages[0].content[0].type",
            "use text or refusal (got 'input_audio')",
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
            "is not a key of a text part; leave it out (got 1)",
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
