"""Answers in pieces: calls of tools and thinking, told from the text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesaic.actors.text.answer_parser import AnswerParser
from moesaic.actors.text.json_end import MOST_DEPTH, JsonEnd
from moesaic.actors.text.marked_text import MarkedText
from moesaic.actors.text.thinking import Thinking
from moesaic.actors.text.tool_calls import BEGIN, END, read_calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "parameters": {}}</tool_call>'
WEATHER, TIME = ("weather", '{"city": "Köln"}'), ("time", "{}")
KNOWN, OPENED = Thinking(), Thinking(opened=True)

Found = tuple[str, str, list[tuple[str, str]]]  # content, reasoning, calls


def split(
    *pieces: str | MarkedText, thinking: Thinking | None = None, most_calls: int | None = None
) -> Found:
    parser = AnswerParser(thinking, most_calls=most_calls)
    marked = (MarkedText(piece) if isinstance(piece, str) else piece for piece in pieces)
    parsed = [*map(parser.push, marked), parser.flush()]
    return (
        "".join(one.content.visible for one in parsed),
        "".join(one.reasoning.visible for one in parsed),
        [(call.name, call.arguments) for one in parsed for call in one.calls],
    )


def found(*pieces: str) -> tuple[str, list[tuple[str, str]]]:
    content, reasoning, calls = split(*pieces)
    assert not reasoning
    return content, calls


def call(arguments: str, name: str = "f") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


# ---- calls --------------------------------------------------------------------------------------


def test_a_call_is_taken_out_of_the_text() -> None:
    assert found(f"Let me see. {CALL} Wait.") == ("Let me see.  Wait.", [WEATHER])


@pytest.mark.parametrize("between", ["", "\n", "\n\n  "])
def test_several_calls_leave_no_text(between: str) -> None:
    assert found(f"{between}{CALL}{between}{OTHER}{between}") == ("", [WEATHER, TIME])


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"q": "what does </tool_call> mean"}', {"q": "what does </tool_call> mean"}),
        ('{"q": "<tool_call>{}</tool_call>"}', {"q": "<tool_call>{}</tool_call>"}),
        ('{"code": "a\n\tb"}', {"code": "a\n\tb"}),
        ('{"q": "\\"}</tool_call>"}', {"q": '"}</tool_call>'}),
        ('{"q": "\\\\"}', {"q": "\\"}),
        ("null", {}),
        ('""', {}),
        ('" "', {}),
        ("[]", {}),
        ('"null"', {}),
        ('"{\\"x\\": 1}"', {"x": 1}),
        ('"{\\"x\\": \\"a\\nb\\"}"', {"x": "a\nb"}),
        ('"\\"{}\\""', {}),
        ('{"a": [1, [2.5, null], true], "c": -1e3}', {"a": [1, [2.5, None], True], "c": -1e3}),
        ('{"half": "\\ud83d"}', {"half": "\ud83d"}),
    ],
)  # fmt: skip
def test_each_makes_exactly_one_right_call(arguments: str, read: object) -> None:
    text, calls = found(f"A {call(arguments)} Z")
    assert text == "A  Z"
    ((name, written),) = calls
    assert name == "f"
    assert json.loads(written) == read
    written.encode()


def test_arguments_that_are_no_json_reach_the_client_as_they_are() -> None:
    assert found(call('"Paris"')) == ("", [("f", "Paris")])


@pytest.mark.parametrize(
    ("behind", "text", "more"),
    [
        ("", "", []),
        ("\n", "", []),
        ("\nDone.", "\nDone.", []),
        (f"\n{OTHER}", "", [TIME]),
        (OTHER, "", [TIME]),
        ('\n{"name": "g", "arguments": {}}\n</tool_call>', "", [("g", "{}")]),
        (', {"name": "g", "arguments": {}}</tool_call>!', "!", [("g", "{}")]),
        ('\n{"name": "Bob"} is a record', '\n{"name": "Bob"} is a record', []),
        ("\n{broken", "\n{broken", []),
        ("\n[1, 2", "\n[1, 2", []),
        ("</tool_cal", "</tool_cal", []),
    ],
)
def test_behind_complete_json(behind: str, text: str, more: list[tuple[str, str]]) -> None:
    whole = f'<tool_call>{{"name": "f", "arguments": {{}}}}{behind}'
    assert found(whole) == (text, [("f", "{}"), *more])
    assert found(*whole) == (text, [("f", "{}"), *more])


def test_a_list_of_calls_and_calls_as_tools_are_told() -> None:
    listed = '[{"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}]'
    assert found(f"<tool_call>{listed}</tool_call>")[1] == [("a", "{}"), ("b", '{"x": 1}')]
    nested = '{"type": "function", "function": {"name": "a", "arguments": {}}}'
    assert found(f"<tool_call>{nested}</tool_call>") == ("", [("a", "{}")])


NO_CALLS = [
    "a < b <tool",
    "<tool_call>no json</tool_call>",
    '<tool_call>{"arguments": {}}</tool_call>',
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"name": ""}</tool_call>',
    '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": "\\d"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}</tool_call>",
    "<tool_call>" + "[" * 5000,
    '<tool_call>{"name": "cut',
    '<tool_call>\n{"name": "f", "arguments": {"a": "x</tool_call>',
    "<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</tool_call>",
    "</tool_call>",
    " \n",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert found(text) == (text, [])
    assert found(*text) == (text, [])


@pytest.mark.parametrize("text", NO_CALLS[1:10])
def test_a_call_behind_one_that_is_none(text: str) -> None:
    assert found(text + CALL) == (text, [WEATHER])


@pytest.mark.parametrize(
    "cut", ['{"name": "cut', '{"name": "f", "arguments": {"a": "x', '{"name": "f", "arguments": {']
)
def test_a_call_behind_one_that_was_never_finished(cut: str) -> None:
    assert found(f"<tool_call>{cut}</tool_call>{CALL}") == (
        f"<tool_call>{cut}</tool_call>",
        [WEATHER],
    )


def test_text_is_sent_as_soon_as_it_can_be_no_call() -> None:
    parser = AnswerParser(most_calls=None)
    assert parser.push(MarkedText("a <tool")).content.text == "a "
    assert parser.push(MarkedText("box")).content.text == "<toolbox"


def test_a_call_is_given_as_soon_as_its_json_is_complete() -> None:
    parser = AnswerParser(most_calls=None)
    assert [one.name for one in parser.push(MarkedText(CALL[: -len(END) - 1])).calls] == ["weather"]


def test_calls_have_ids_of_their_own() -> None:
    first, second = (read_calls('{"name": "f"}')[0].id for _ in range(2))
    assert first != second


def test_one_call_is_the_end() -> None:
    parser = AnswerParser(most_calls=1)
    parsed = parser.push(MarkedText(f"Sure. {CALL}{OTHER} and more"))
    assert parser.full
    assert (parsed.content.text, [one.name for one in parsed.calls]) == ("Sure. ", ["weather"])
    assert split("[", CALL, thinking=None, most_calls=0) == (f"[{CALL}", "", [])


# ---- thinking -----------------------------------------------------------------------------------

MAYBE = f"maybe {OTHER}"


@pytest.mark.parametrize(
    ("text", "thinking", "parts"),
    [
        (f"<think>\n{MAYBE}\n</think>\n\n{CALL}", KNOWN, ("", MAYBE, [WEATHER])),
        (f"<think>{MAYBE}</think>Hello\n{CALL}", KNOWN, ("Hello\n", MAYBE, [WEATHER])),
        (f"\n<think>{MAYBE}</think>\n\nHi\n", KNOWN, ("Hi\n", MAYBE, [])),
        (f"\n{MAYBE}\n\n</think>\n{CALL}", OPENED, ("", MAYBE, [WEATHER])),
        (f"<think>\n{MAYBE}</think>{CALL}", OPENED, ("", MAYBE, [WEATHER])),
        ("<think>\n\n</think>\n\nHi", KNOWN, ("Hi", "", [])),
        ("\n</think>\nHi", OPENED, ("Hi", "", [])),
        (f"<think>{MAYBE}\n", KNOWN, ("", MAYBE, [])),
        (f"{MAYBE}\n", OPENED, ("", MAYBE, [])),
        ("a\n\nb </thin", OPENED, ("", "a\n\nb </thin", [])),
        (f"Hi {CALL}", KNOWN, ("Hi ", "", [WEATHER])),
        ("<thin", KNOWN, ("<thin", "", [])),
        ("", OPENED, ("", "", [])),
        # A template that is not known to think, and a model that does all the same.
        (f"<think>{MAYBE}</think>\n{CALL}", None, (f"<think>{MAYBE}</think>", "", [WEATHER])),
        (f"\n<think>{MAYBE}</think>\nHi", None, (f"\n<think>{MAYBE}</think>\nHi", "", [])),
        (f"<think>{MAYBE}", None, (f"<think>{MAYBE}", "", [])),
        # Inside of a text it is thinking if it has an end.
        (f"So <think>{MAYBE}</think>{CALL}", None, (f"So <think>{MAYBE}</think>", "", [WEATHER])),
        (f"So <think>{MAYBE}</think>{CALL}", KNOWN, (f"So <think>{MAYBE}</think>", "", [WEATHER])),
        (f"Models write <think>. {CALL}", KNOWN, ("Models write <think>. ", "", [WEATHER])),
        (f"<think>a</think>b<think>{MAYBE}</think>", KNOWN, (f"b<think>{MAYBE}</think>", "a", [])),
    ],
)  # fmt: skip
def test_nothing_within_thinking_is_a_call(
    text: str, thinking: Thinking | None, parts: Found
) -> None:
    assert split(text, thinking=thinking) == parts
    assert split(*text, thinking=thinking) == parts


def test_thinking_is_split_where_no_tools_are_offered() -> None:
    parts = split(f"<think>hm</think>\n{CALL}", thinking=KNOWN, most_calls=0)
    assert parts == (CALL, "hm", [])


def test_other_marks_of_thinking() -> None:
    marks = Thinking("[THINK]", "[/THINK]")
    assert split(f"[THINK]{MAYBE}[/THINK]{CALL}", thinking=marks) == ("", MAYBE, [WEATHER])


def test_thinking_is_sent_as_it_comes() -> None:
    parser = AnswerParser(OPENED)
    said = [parser.push(MarkedText(one)).reasoning.text for one in ("let", " me\n", "see")]
    assert said == ["let", " me", "\nsee"]


# ---- special tokens -----------------------------------------------------------------------------


def special(text: str, *marks: str) -> MarkedText:
    """These marks are special tokens of the tokenizer."""
    ranges = [
        (at, at + len(mark))
        for mark in marks
        for at in range(len(text))
        if text.startswith(mark, at)
    ]
    return MarkedText(text, tuple(sorted(ranges)))


def test_marks_that_are_special_tokens() -> None:
    text = special(f"Hi<pad> {CALL}", BEGIN, END, "<pad>")
    assert split(text) == ("Hi ", "", [WEATHER])
    inside = special(call('{"q": "</tool_call> and <pad>"}'), BEGIN, END, "<pad>")
    assert split(inside) == ("", "", [("f", '{"q": "</tool_call> and <pad>"}')])
    thought = special(f"<think>{MAYBE}</think>{CALL}", "<think>", "</think>", BEGIN, END)
    assert split(thought, thinking=KNOWN)[2] == [WEATHER]


@pytest.mark.parametrize("text", NO_CALLS)
def test_marks_of_what_is_no_call_are_shown_even_if_they_are_special_tokens(text: str) -> None:
    assert split(special(text, BEGIN, END)) == (text, "", [])


# ---- how it is cut ------------------------------------------------------------------------------

PARTS = [
    CALL, OTHER, CALL[: -len(END)], "a < b", "<tool", "<tool_call>", "</tool_call>", "x\n", "\n",
    " ", "<think>", "</think>", "</thi", '{"name": "f", "arguments": {}}', "{", '"', "}", ",",
    "<pad>",
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    st.sampled_from([None, KNOWN, OPENED]),
    st.sampled_from([0, 1, None]),
    st.data(),
)
def test_how_it_is_cut_makes_no_difference(
    whole: str, thinking: Thinking | None, most_calls: int | None, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    marked = special(whole, BEGIN, END, "<pad>")
    pieces = [marked[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    once = split(marked, thinking=thinking, most_calls=most_calls)
    assert split(*pieces, thinking=thinking, most_calls=most_calls) == once


@pytest.mark.parametrize(
    "text",
    [
        call(json.dumps({"text": "word </tool_call> " * 6_000})),
        call(json.dumps({"text": "<tool_call>x" * 9_000}))[:-20],
        '<tool_call>{"name": "' + "<tool_call>x" * 9_000 + '"x',
        "<tool_call>x" * 9_000,
        "a <think> b " + call(json.dumps({"text": "word " * 20_000})),
        "<tool_call>" + "[1, " * 25_000,
        CALL * 1_200,
    ],
    ids=range(7),
)
def test_long_answers_take_time_in_proportion(text: str) -> None:
    """100,000 characters that arrive in small pieces, or at once."""
    marked = special(text, BEGIN, END)
    began = time.process_time()
    pieces = [marked[at : at + 8] for at in range(0, len(text), 8)]
    one, other = split(*pieces), split(marked)
    assert one == other
    assert time.process_time() - began < 10


# ---- the end of JSON ----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(JSON) | st.dictionaries(st.text(), JSON), st.sampled_from([None, 1]), st.booleans())
@example({"a": '\\"'}, None, True)
def test_the_end_of_json(value: object, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert JsonEnd().push(f" {text}}}]", 1) == len(text) + 1
    reader = JsonEnd()
    assert [reader.push(one) for one in text] == [None] * (len(text) - 1) + [1]


@pytest.mark.parametrize(
    "text",
    ["x", '"', "1", "{1", "{,", '{"a",', '{"a":}', '{"a":1 2', "[1 2", "[,", "[1,]", '{"a":1,}',
     "[}", "{]", '{"a":1]', "[1}", "[<", "[" * (MOST_DEPTH + 1)],
)  # fmt: skip
def test_no_json_is_found_at_once(text: str) -> None:
    reader = JsonEnd()
    assert reader.push(text[:-1]) is None
    with pytest.raises(ValueError, match=r"."):
        reader.push(text[-1])
