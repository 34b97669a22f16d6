"""What is wrong with a schema that no grammar can be made of: where, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ...proto.errors import RequestError
from ..text.answer_form import AnswerForm

# Of a schema: what keeps it from being a grammar, in llguidance's words; "" where nothing does.
Check = Callable[[dict[str, Any]], str]

# Of the schemas of one request, in JSON, together. Each step of a batch waits for every grammar in
# it, and much larger ones take seconds or gigabytes.
MOST_CHARACTERS = 200_000
MOST_REPEATS = 10_000
_REPEATS = ("minItems", "maxItems", "minProperties", "maxProperties")

# How many parts of a schema are looked at for the one at fault.
_MOST_LOOKS = 500
# Keys whose values are schemas by name, and schemas or lists of them. What else a schema holds
# (enum, const, default, ...) is data.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = (
    "additionalProperties", "items", "prefixItems", "additionalItems", "contains", "propertyNames",
    "not", "if", "then", "else", "anyOf", "oneOf", "allOf",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip

# llguidance's words -> ours, and what to do.
_WORDS: tuple[tuple[str, str], ...] = (
    (r"Unimplemented keys: \[(?P<what>.*)\]", "{what} cannot be enforced; leave it out"),
    (r"Unknown format: (?P<what>.*)", "the format {what!r} is not known; use a pattern instead"),
    (r"Invalid type: (?P<what>.*)",
     "there is no type {what!r}; use string, number, integer, boolean, null, array or object"),
    (r"oneOf constraints are not supported.*",
     "oneOf whose alternatives may overlap cannot be enforced; use anyOf"),
    (r"Resource '(?P<what>.*)' is not present in a registry.*",
     "{what} is not in the schema, and nothing is fetched; put what it names into $defs"),
    (r"Pointer '(?P<what>.*)' does not exist", "#{what} is not in the schema; correct the $ref"),
    (r"Unsatisfiable schema: (?P<what>.*)", "no answer can meet it: {what}; correct the schema"),
    (r".*recursion limit exceeded.*", "it is nested too deeply; flatten it, or use $ref"),
    (r".*(?P<what>too big|too large|too complex|too many|limit|max is).*",
     "its grammar is too large; use fewer or shorter alternatives, patterns and bounds"),
    (r"(?P<what>.*not disjoint)", "{what}; use patterns of which no key meets two"),
)  # fmt: skip
# Errors that belong to no part in particular.
_OF_THE_WHOLE = re.compile("recursion limit|too big|too large|too complex|limit for this grammar")

Place = tuple[str, str, str]  # the request's parameter, its place in it, and the schema there


def check_size(form: AnswerForm) -> None:
    """Raises RequestError for schemas that would take too much time or memory."""
    places = _places(form)
    characters = sum(len(text) for _, _, text in places)
    if characters > MOST_CHARACTERS:
        param, place, text = max(places, key=lambda one: len(one[2]))
        raise RequestError(
            f"{place}: the schemas have {characters} characters, of which {len(text)} are here; "
            f"at most {MOST_CHARACTERS} can be enforced",
            param=param,
        )
    for param, place, text in places:
        for key in _REPEATS:
            for number in re.findall(rf'"{key}": *([0-9][0-9.eE+]*)', text):
                if float(number) > MOST_REPEATS:
                    raise RequestError(
                        f"{place}: {key} is {number}; at most {MOST_REPEATS} can be enforced",
                        param=param,
                    )


def _places(form: AnswerForm) -> list[Place]:
    found = [(tool.param, tool.param, tool.schema) for tool in form.tools]
    if form.json_schema is None:
        return found
    return [("response_format", "response_format.json_schema.schema", form.json_schema), *found]


def refusal(form: AnswerForm, error: str, raw_check: Check) -> RequestError:
    """``error``: llguidance's for the whole grammar."""
    error, check = _reason(error), lambda schema: _reason(raw_check(schema))
    places = _places(form)
    for param, place, text in places:
        try:
            schema = json.loads(text)
        except ValueError as wrong:
            return RequestError(f"{place}: it is no JSON: {wrong}", param=param)
        if not isinstance(schema, dict):
            return RequestError(
                f"{place}: a schema is an object; got {_short(schema)}", param=param
            )
        if fault := check(schema):
            return RequestError(f"{place}: {explained(schema, fault, check)}", param=param)
    # Each can be had, but not all together.
    names = " and ".join(place for _, place, _ in places)
    return RequestError(f"{names}: {in_words(error)}", param=places[0][0])


def _reason(error: str) -> str:
    """Without the references that led to it: a part has the same reason as the whole."""
    lines = error.splitlines()
    return "\n".join(line for line in lines if not line.startswith("  while processing "))


def explained(schema: dict[str, Any], error: str, check: Check) -> str:
    """``error`` of ``schema``, with the part of it that is at fault."""
    path, part = _locate(schema, error, check)
    where = ".".join(path) + ": " if path else ""
    found = re.match(r"regex parse error:.*^error: (?P<why>.*)", error, re.DOTALL | re.MULTILINE)
    if found is None:
        return where + in_words(error)
    patterns = [part["pattern"]] if "pattern" in part else list(part.get("patternProperties", ()))
    named = [one for one in patterns if check({"type": "string", "pattern": one})] or patterns
    why = found["why"].strip()
    shown = ", ".join(map(_short, named))
    return f"{where}the pattern {shown} cannot be used: {why}; write it without"


def in_words(error: str) -> str:
    """An error of llguidance's, with what to do about it."""
    line = next(
        (line.strip() for line in error.splitlines() if line.strip()), "no reason was given"
    )
    for pattern, words in _WORDS:
        if found := re.fullmatch(pattern, line):
            what = found.groupdict().get("what", "")
            return words.format(what=what)
    return f"{line[:200]}; correct the schema"


def _locate(schema: dict[str, Any], error: str, check: Check) -> tuple[list[str], dict[str, Any]]:
    """The innermost part that has the same error, and the way to it."""
    path: list[str] = []
    part, looks = schema, 0
    if _OF_THE_WHOLE.search(error):
        return path, part
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    while True:
        for step, child in _children(part):
            looks += 1
            if looks > _MOST_LOOKS:
                return path, part
            if check({**shared, **child}) == error:
                path.append(step)
                part = child
                break
        else:
            return path, part


def _children(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            found = ((f"{key}.{name}", one) for name, one in value.items())
        elif key in _SCHEMAS and isinstance(value, list):
            found = ((f"{key}[{n}]", one) for n, one in enumerate(value))
        elif key in _SCHEMAS:
            found = iter([(key, value)])
        else:
            continue
        yield from ((step, one) for step, one in found if isinstance(one, dict))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
