"""Calls of tools in texts that arrive in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.actors.marked_text import MarkedText
from moesaic.actors.tools import ToolSearch

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "parameters": {}}</tool_call>'


def found(*pieces: str) -> tuple[str, list[tuple[str, str]]]:
    search = ToolSearch()
    text, calls = "", []
    for piece in pieces:
        more, some = search.push(MarkedText(piece))
        text += more.text
        calls += [(call.name, call.arguments) for call in some]
    return text + search.flush().text, calls


def test_a_call_is_taken_out_of_the_text() -> None:
    assert found(f"Let me see. {CALL} Wait.") == (
        "Let me see.  Wait.",
        [("weather", '{"city": "Köln"}')],
    )


def test_several_calls() -> None:
    assert found(CALL + OTHER) == ("", [("weather", '{"city": "Köln"}'), ("time", "{}")])


@given(st.data())
def test_how_it_is_cut_makes_no_difference(data: st.DataObject) -> None:
    parts = st.sampled_from([CALL, OTHER, "a < b", "<tool", "<tool_call>", "</tool_call>", "x\n"])
    whole = "".join(data.draw(st.lists(parts, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert found(*pieces) == found(whole)


@pytest.mark.parametrize(
    "text",
    [
        "a < b <tool",
        "<tool_call>no json</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "cut',
        "</tool_call>",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert found(text) == (text, [])
    assert found(*text) == (text, [])


def test_text_is_sent_as_soon_as_it_can_be_no_call() -> None:
    search = ToolSearch()
    assert search.push(MarkedText("a <tool")) == (MarkedText("a "), [])
    assert search.push(MarkedText("box")) == (MarkedText("<toolbox"), [])


def test_arguments_that_are_a_string_already_and_ids_of_their_own() -> None:
    search = ToolSearch()
    call = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    _, calls = search.push(MarkedText(call + call))
    assert [json.loads(one.arguments) for one in calls] == [{"a": 1}] * 2
    assert calls[0].id != calls[1].id


def test_marks_that_are_special_tokens() -> None:
    search = ToolSearch()
    begin, end = (MarkedText(mark, ((0, len(mark)),)) for mark in ("<tool_call>", "</tool_call>"))
    call = MarkedText('{"name": "f"}')
    text, calls = search.push(MarkedText("a ") + begin + call + end + begin + MarkedText("b") + end)
    assert [one.name for one in calls] == ["f"]
    assert text.visible == "a b"
