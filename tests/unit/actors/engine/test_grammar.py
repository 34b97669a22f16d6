"""Answers of a JSON schema, with tokens drawn by chance: whatever the model wants, they fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, grammar_from
from transformers import PreTrainedTokenizerFast

from moesaic.actors.engine.engine import Sampling
from moesaic.actors.engine.grammar import Grammars
from moesaic.actors.engine.sampling import RequestSampler, choose
from moesaic.actors.engine.vllm_backend.requests import structure
from moesaic.actors.text.answer_form import AnswerForm, ToolForm
from moesaic.actors.text.answer_parser import AnswerParser
from moesaic.actors.text.marked_text import MarkedText
from moesaic.actors.text.thinking import Thinking
from moesaic.proto.errors import RequestError
from tests.helpers.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY, EOS = 330, [2]  # a model's vocabulary may be larger than its tokenizer's
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"enum": ["red", "blue"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: TOKENIZER, VOCABULARY, EOS)


def of_schema(schema: dict[str, Any] | str) -> AnswerForm:
    return AnswerForm(json_schema=schema if isinstance(schema, str) else json.dumps(schema))


def answer(grammars: Grammars, schema: dict[str, Any], seed: int, most: int = 400) -> list[int]:
    asked = Sampling(max_tokens=most, temperature=1.0, seed=seed)
    sampler = RequestSampler(asked, [1], (), grammars.begin(of_schema(schema)))
    assert not sampler.plain
    generator = torch.Generator().manual_seed(0)
    tokens: list[int] = []
    for _ in range(most):
        logits_V = torch.zeros(VOCABULARY)
        (token,) = choose(logits_V[None], [sampler], generator).tolist()
        sampler.chose(token, logits_V)
        if token in EOS:
            return tokens
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_whatever_is_drawn_fits(grammars: Grammars, schema: dict[str, Any]) -> None:
    for seed in range(8):
        text = TOKENIZER.decode(answer(grammars, schema, seed))
        assert isinstance(text, str)
        if schema.get("properties", {}).keys() == {"a"}:
            continue  # more properties may follow without end
        jsonschema.validate(json.loads(text), schema)


def test_a_greedy_answer_ends_where_it_is_complete(grammars: Grammars) -> None:
    grammar = grammars.begin(of_schema('{"enum": ["red"]}'))
    for token in TOKENIZER('"red"').input_ids:
        assert grammar.allowed()[token]
        grammar.take(token)
    assert np.flatnonzero(grammar.allowed()).tolist() == EOS
    grammar.take(EOS[0])
    assert np.flatnonzero(grammar.allowed()).tolist() == EOS


def test_it_goes_on_behind_what_was_generated(grammars: Grammars) -> None:
    ids = TOKENIZER('"red"').input_ids
    grammar = grammars.begin(of_schema('{"enum": ["red", "blue"]}'), already=ids[:-1])
    assert grammar.allowed()[ids[-1]]


def test_tokens_beyond_the_tokenizer_never_come(grammars: Grammars) -> None:
    allowed_V = grammars.begin(of_schema('{"type": "object"}')).allowed()
    assert allowed_V.shape == (VOCABULARY,)
    assert not allowed_V[len(TOKENIZER) :].any()


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="ends a text"):
        Grammars(lambda: TOKENIZER, VOCABULARY, []).begin(of_schema('{"type": "object"}'))


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}', '{"$ref": "#/nowhere"}', "[1]"])
def test_a_schema_that_is_none_is_refused(grammars: Grammars, schema: str) -> None:
    with pytest.raises(RequestError, match="response_format") as caught:
        grammars.begin(of_schema(schema))
    assert caught.value.param == "response_format"


SHORT = {"type": "string", "pattern": "^(?=a)b"}
ODD: list[tuple[dict[str, Any], str]] = [
    (SHORT, "the pattern '^(?=a)b' cannot be used: look-around, including look-ahead"),
    ({"type": "object", "properties": {"x": {"type": "string", "pattern": "(?<!a)b"}}},
     r"properties.x: the pattern '(?<!a)b' cannot be used: look-around"),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"anyOf": [{"type": "null"}, SHORT]}}},
     r"$defs.A.anyOf[1]: the pattern '^(?=a)b' cannot be used: look-around"),
    ({"type": "string", "pattern": "(a)\\1"}, "cannot be used: backreferences are not supported"),
    ({"type": "string", "pattern": "("}, "the pattern '(' cannot be used: unclosed group"),
    ({"type": "string", "pattern": "a\n(?=b)"}, r"the pattern 'a\n(?=b)' cannot be used: look-"),
    ({"type": "array", "items": {"type": "string", "pattern": "[z-a]"}}, "items: the pattern"),
    ({"type": "object", "patternProperties": {"^ok": {}, "^(?!x)": {"type": "string"}}},
     "the pattern '^(?!x)' cannot be used: look-around"),
    ({"type": "object", "patternProperties": {"^a": {"type": "null"}, "^ab": {"type": "integer"}}},
     "are not disjoint; use patterns so that no key matches two"),
    ({"properties": {"a": {"not": {"type": "string"}}}},
     'properties.a: "not" cannot be enforced; leave it out'),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, '"if", "then" cannot be enforced'),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems" cannot be enforced; leave it out'),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, '"dependentRequired" cannot be'),
    ({"properties": {"p": {"type": "string", "format": "password"}}},
     "properties.p: the format 'password' is not known; use a pattern"),
    ({"$ref": "https://example.com/a.json"}, "https://example.com/a.json is not in the schema"),
    ({"$ref": "#/$defs/nowhere"}, "#/$defs/nowhere is not in the schema; correct the $ref"),
    ({"type": "nothing"}, "there is no type 'nothing'; use string, number"),
    ({"type": 7}, "type must be a string or array of strings; correct the schema"),
    ({"enum": []}, "no answer can meet the schema: anyOf is empty; correct it"),
    ({"enum": "a"}, "enum must be an array; correct the schema"),
    ({"properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
     "properties.a: oneOf whose alternatives may overlap cannot be enforced; use anyOf"),
    ({"type": "integer", "minimum": 5, "maximum": 3},
     "no answer can meet the schema: minimum (5) is"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]},
     "no answer can meet the schema"),
    ({"properties": []}, "properties must be an object"),
    ({"enum": ["x" * 100 for _ in range(3_000)]}, "at most 200000 can be enforced"),
    ({"items": {"minItems": 10**9}}, "minItems is 1000000000; at most 10000 can be enforced"),
    ({"type": "object", "maxProperties": 1e30}, "maxProperties is 1e+30; at most 10000 can be"),
    ({"allOf": [{"anyOf": [{"properties": {f"{k}{j}": {"const": j}}} for j in range(8)]}
                for k in range(8)]}, "the schema's grammar is too large; use fewer"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "words"), ODD, ids=lambda one: str(one)[:40])
def test_a_refusal_names_the_place_the_reason_and_what_to_do(
    grammars: Grammars, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        grammars.begin(of_schema(schema))
    assert str(caught.value).startswith("response_format.json_schema.schema: ")
    assert words in str(caught.value)
    assert "regex parse error" not in str(caught.value)
    assert caught.value.param == "response_format"
    tools = (
        ToolForm(name="ok", param="tools[0].function.parameters"),
        ToolForm(name="f", schema=json.dumps(schema), param="tools[1].function.parameters"),
    )
    with pytest.raises(RequestError) as caught:
        grammars.begin(AnswerForm(tools=tools, forced=True))
    assert str(caught.value).startswith("tools[1].function.parameters: ")
    assert words in str(caught.value)
    assert caught.value.param == "tools[1].function.parameters"


def test_a_schema_that_is_nested_too_deeply_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}}
    for form in (
        of_schema(schema),
        AnswerForm(tools=(ToolForm(name="f", schema=json.dumps(schema)),), forced=True),
    ):
        with pytest.raises(RequestError, match="nested too deeply; flatten it"):
            grammars.begin(form)


# ---- calls of tools -----------------------------------------------------------------------------

MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "maxLength": 4}},
}
WEATHER = ToolForm(name="weather", schema=json.dumps(CITY))
NOW = ToolForm(name="now", schema='{"type": "object", "additionalProperties": false}')
KNOWN, OPENED = Thinking(), Thinking(opened=True)
GOOD = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
BAD = '<tool_call>\n{"name": "weather", "arguments": {"city": 3, "days": 2}}\n</tool_call>'
UNKNOWN = '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>'


def tokenizer_with(kind: str) -> PreTrainedTokenizerFast:
    """With the marks as special tokens, as tokens of their own, or as text."""
    tokenizer = tiny_tokenizer()
    if kind == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    elif kind == "added":
        tokenizer.add_tokens(MARKS)
    return tokenizer


class Marked(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    grammars: Grammars

    def accepts(self, form: AnswerForm, text: str) -> bool:
        """Whether it may be an answer, and end there."""
        grammar = self.grammars.begin(form)
        for token in self.tokenizer(text).input_ids:
            if not grammar.allowed()[token]:
                return False
            grammar.take(token)
        return bool(grammar.allowed()[EOS[0]])

    def drawn(self, form: AnswerForm, seed: int, most: int = 300, split: int = 0) -> str:
        """An answer that is drawn by chance; ``split``: it goes on elsewhere after so many."""
        asked = Sampling(max_tokens=most, temperature=1.0, seed=seed)
        sampler = RequestSampler(asked, [1], (), self.grammars.begin(form))
        tokens: list[int] = []
        while len(tokens) < most:
            if split and len(tokens) == split:
                sampler = RequestSampler(asked, [1], tokens, self.grammars.begin(form, tokens))
            logits_V = torch.zeros(VOCABULARY)
            (token,) = choose(logits_V[None], [sampler], torch.Generator()).tolist()
            sampler.chose(token, logits_V)
            if token in EOS:
                break
            tokens.append(token)
        assert sampler.fault is None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.fixture(scope="module", params=["special", "added", "text"])
def marked(request: pytest.FixtureRequest) -> Marked:
    tokenizer = tokenizer_with(request.param)
    return Marked(tokenizer, Grammars(lambda: tokenizer, VOCABULARY, EOS))


def calls_in(text: str, thinking: Thinking | None = None) -> tuple[str, list[tuple[str, Any]]]:
    parser = AnswerParser(thinking, most_calls=None)
    parsed = [parser.push(MarkedText(text)), parser.flush()]
    calls = [(call.name, json.loads(call.arguments)) for one in parsed for call in one.calls]
    return "".join(one.content.text for one in parsed), calls


FORCED = AnswerForm(tools=(WEATHER, NOW), forced=True)
ONE = AnswerForm(tools=(WEATHER, NOW), forced=True, many=False)


@pytest.mark.parametrize("thinking", [None, KNOWN, OPENED])
@pytest.mark.parametrize("split", [0, 9])
def test_a_forced_call_is_valid_whatever_is_drawn(
    marked: Marked, thinking: Thinking | None, split: int
) -> None:
    finished = 0
    for seed in range(6):
        form = replace(ONE, thinking=thinking)
        text = marked.drawn(form, seed, split=split)
        content, calls = calls_in(text, thinking)
        if not calls:  # it would still think
            assert thinking is not None
            continue
        finished += 1
        ((name, arguments),) = calls
        assert content == ""
        jsonschema.validate(arguments, CITY if name == "weather" else json.loads(NOW.schema))
    assert finished or thinking is not None


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (FORCED, [GOOD, f"{GOOD}\n{GOOD}"], ["", "hi", BAD, UNKNOWN, f"hi {GOOD}", f"{GOOD}\nhi"]),
        (ONE, [GOOD], [f"{GOOD}\n{GOOD}", "hi", ""]),
        (replace(ONE, thinking=OPENED), [f"hm</think>\n\n{GOOD}", f"\n{UNKNOWN}</think>{GOOD}"],
         [GOOD, "hm</think>hi", f"hm</think>{BAD}"]),
        (replace(ONE, thinking=KNOWN), [GOOD, f"<think>\nhm\n</think>\n\n{GOOD}"],
         [f"hm</think>{GOOD}", f"<think>hm {GOOD}"]),
        (AnswerForm(tools=(WEATHER, NOW)),
         ["", "hi", "a < b <tool", GOOD, f"hi {GOOD}", f"hi\n{GOOD}\n{GOOD} there"],
         [BAD, f"hi {BAD}", UNKNOWN, f"{GOOD}{BAD}", "hi <tool_call>x"]),
        (AnswerForm(tools=(WEATHER,), thinking=OPENED),
         ["hm</think>hi", f"hm\n</think>\n\n{GOOD}\n"], [f"hm</think>{BAD}"]),
        (AnswerForm(tools=(WEATHER, NOW), thinking=KNOWN),
         ["", "hi", "<", "<thin", f"<this{GOOD}", f"hi {GOOD}", GOOD, f"{GOOD}\n{GOOD} ok",
          "<think>\nhm\n</think>\n\nhi", f"<think>\nhm</think>{GOOD}\n{GOOD} ok",
          f"<think>\n<tool_call> or {BAD}?\n</think>\n\nhi {GOOD}"],
         [BAD, f"hi {BAD}", f"<think>hm</think>{BAD}", "<think>\nhm"]),
        (AnswerForm(tools=(WEATHER,), json_schema='{"enum": ["red"]}'),
         ['"red"', GOOD, f"{GOOD}\n{GOOD}"], ["hi", BAD, f'"red"{GOOD}', ""]),
        (AnswerForm(json_schema='{"enum": ["red"]}', thinking=OPENED),
         ['hm</think>\n\n"red"', '</think>"red"'], ['"red"', 'hm</think>"blue"']),
        (AnswerForm(json_schema='{"enum": ["red"]}', thinking=KNOWN),
         ['"red"', '<think>\nhm</think>\n"red"'], ['hm</think>"red"', "<think>"]),
    ],
    ids=range(10),
)  # fmt: skip
def test_what_an_answer_may_be(
    marked: Marked, form: AnswerForm, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert marked.accepts(form, text), text
    for text in bad:
        assert not marked.accepts(form, text), text


def test_text_around_strict_calls_is_free_also_by_chance(marked: Marked) -> None:
    form = AnswerForm(tools=(WEATHER,))
    begin = marked.tokenizer("<tool_call>").input_ids
    grammar = marked.grammars.begin(form, already=[*marked.tokenizer("so ").input_ids, *begin])
    newline, brace = marked.tokenizer("\n").input_ids[0], marked.tokenizer("x").input_ids[0]
    assert grammar.allowed()[newline]
    assert not grammar.allowed()[brace]
    assert not grammar.allowed()[EOS[0]]


def test_vllm_takes_the_same_grammar(marked: Marked) -> None:
    """Its guidance backend reads a grammar as Lark, and checks it without a tokenizer first."""
    free = AnswerForm(tools=(WEATHER,))
    for form in (FORCED, replace(ONE, thinking=OPENED), free, replace(free, thinking=KNOWN)):
        asked = structure(form, marked.grammars.text)
        assert asked.keys() == {"grammar"}
        assert LLMatcher.validate_grammar(grammar_from("grammar", asked["grammar"])) == ""
    plain = AnswerForm(json_schema='{"enum": [1]}')
    assert structure(plain, marked.grammars.text) == {"json": '{"enum": [1]}'}


def test_a_schema_that_becomes_too_much_is_a_fault_and_no_end(grammars: Grammars) -> None:
    many = {f"p{n}": {"type": "string"} for n in range(3_000)}  # all of them may be left out
    grammar = grammars.begin(of_schema({"type": "object", "properties": many}))
    assert grammar.fault is None
    grammar.take(TOKENIZER("{").input_ids[0])
    assert isinstance(grammar.fault, RequestError)
    assert "the schema's grammar is too large; use fewer" in str(grammar.fault)
