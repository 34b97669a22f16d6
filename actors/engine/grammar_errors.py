"""Explain why a schema cannot become a grammar: which part is wrong, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ...proto.errors import RequestError
from ..text.answer_form import AnswerForm

# Takes a schema and returns llguidance's error for it, or "".
Check = Callable[[dict[str, Any]], str]

# For all schemas of one request together, as JSON. Each step of a batch waits for every grammar in
# it, and much larger schemas take seconds or gigabytes.
MOST_CHARACTERS = 200_000
MOST_REPEATS = 10_000
_REPEATS = ("minItems", "maxItems", "minProperties", "maxProperties")

# How many parts of a schema are checked to find the one at fault.
_MOST_LOOKS = 500
# Keys whose values map names to schemas, and keys whose values are schemas or lists of them. All
# other values (enum, const, default, ...) are data.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = (
    "additionalProperties", "items", "prefixItems", "additionalItems", "contains", "propertyNames",
    "not", "if", "then", "else", "anyOf", "oneOf", "allOf",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip

# Pattern of llguidance's message -> our message, with what to do.
_WORDS: tuple[tuple[str, str], ...] = (
    (r"Unimplemented keys: \[(?P<what>.*)\]", "{what} cannot be enforced; leave it out"),
    (r"Unknown format: (?P<what>.*)", "the format {what!r} is not known; use a pattern instead"),
    (r"Invalid type: (?P<what>.*)",
     "there is no type {what!r}; use string, number, integer, boolean, null, array or object"),
    (r"oneOf constraints are not supported.*",
     "oneOf whose alternatives may overlap cannot be enforced; use anyOf"),
    (r"Resource '(?P<what>.*)' is not present in a registry.*",
     "{what} is not in the schema, and references are not fetched; put its target into $defs"),
    (r"Pointer '(?P<what>.*)' does not exist", "#{what} is not in the schema; correct the $ref"),
    (r"Unsatisfiable schema: (?P<what>.*)", "no answer can meet the schema: {what}; correct it"),
    (r".*recursion limit exceeded.*", "the schema is nested too deeply; flatten it, or use $ref"),
    (r".*(?P<what>too big|too large|too complex|too many|limit|max is).*",
     "the schema's grammar is too large; use fewer or shorter alternatives, patterns and bounds"),
    (r"(?P<what>.*not disjoint)", "{what}; use patterns so that no key matches two of them"),
)  # fmt: skip
# Errors that no single part of a schema causes.
_OF_THE_WHOLE = re.compile("recursion limit|too big|too large|too complex|limit for this grammar")

SchemaPath = tuple[str, str, str]  # the request's parameter, its place in it, and the schema there


def check_size(form: AnswerForm) -> None:
    """Raise RequestError for schemas that would take too much time or memory."""
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


def _places(form: AnswerForm) -> list[SchemaPath]:
    found = [(tool.param, tool.param, tool.schema) for tool in form.tools]
    if form.json_schema is None:
        return found
    return [("response_format", "response_format.json_schema.schema", form.json_schema), *found]


def refusal(form: AnswerForm, error: str, raw_check: Check) -> RequestError:
    """Return the error for a form; ``error`` is llguidance's message about the whole grammar."""
    error, check = _reason(error), lambda schema: _reason(raw_check(schema))
    places = _places(form)
    for param, place, text in places:
        try:
            schema = json.loads(text)
        except ValueError as wrong:
            return RequestError(f"{place}: the schema is not valid JSON: {wrong}", param=param)
        if not isinstance(schema, dict):
            return RequestError(
                f"{place}: a schema must be a JSON object (got {_short(schema)})", param=param
            )
        if fault := check(schema):
            return RequestError(f"{place}: {explained(schema, fault, check)}", param=param)
    # Each schema works alone; only all of them together do not.
    names = " and ".join(place for _, place, _ in places)
    return RequestError(f"{names}: {explain(error)}", param=places[0][0])


def _reason(error: str) -> str:
    """Remove the references that led to the error, so that a part's reason equals the whole's."""
    lines = error.splitlines()
    return "\n".join(line for line in lines if not line.startswith("  while processing "))


def explained(schema: dict[str, Any], error: str, check: Check) -> str:
    """Return ``error`` in our words, with the path of the part of ``schema`` that is at fault."""
    path, part = _locate(schema, error, check)
    where = ".".join(path) + ": " if path else ""
    found = re.match(r"regex parse error:.*^error: (?P<why>.*)", error, re.DOTALL | re.MULTILINE)
    if found is None:
        return where + explain(error)
    patterns = [part["pattern"]] if "pattern" in part else list(part.get("patternProperties", ()))
    named = [one for one in patterns if check({"type": "string", "pattern": one})] or patterns
    why = found["why"].strip()
    shown = ", ".join(map(_short, named))
    return f"{where}the pattern {shown} cannot be used: {why}; write it in another way"


def explain(error: str) -> str:
    """Return llguidance's error in our words, with what to do about it."""
    line = next(
        (line.strip() for line in error.splitlines() if line.strip()), "no reason was given"
    )
    for pattern, words in _WORDS:
        if found := re.fullmatch(pattern, line):
            what = found.groupdict().get("what", "")
            return words.format(what=what)
    return f"{line[:200]}; correct the schema"


def _locate(schema: dict[str, Any], error: str, check: Check) -> tuple[list[str], dict[str, Any]]:
    """Return the path to the innermost part that has the same error, and that part."""
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
