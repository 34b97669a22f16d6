"""Every check of a request says which field is wrong and what its value is: a walk over all
validators of the HTTP schemas."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from pydantic import BaseModel, model_validator

from moesaic.actors.endpoint.embeddings import EmbeddingRequest
from moesaic.actors.endpoint.openai import requests
from moesaic.actors.endpoint.openai.refusals import misfit
from moesaic.actors.endpoint.openai.requests import ChatRequest, CompletionRequest, parse_request
from moesaic.proto.errors import RequestError

OPENAI = Path(requests.__file__).resolve().parent
# They check no fields of a request.
OTHERS = {"answers.py", "refusals.py", "openapi.py"}
USER: dict[str, Any] = {"role": "user", "content": "x"}
CALL = {"id": "a", "function": {"name": "f", "arguments": "{}"}}


def completion(**more: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return CompletionRequest, {"model": "m", "prompt": "x", **more}


def chat(**more: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return ChatRequest, {"model": "m", "messages": [USER], **more}


def message(**more: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return chat(messages=[USER, {**USER, **more}])


def part(one: Any, role: str = "user") -> tuple[type[BaseModel], dict[str, Any]]:
    return message(role=role, content=[{"type": "text", "text": "y"}, one])


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def tool_choice(choice: Any, **more: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return chat(tool_choice=choice, **{"tools": [named("f")], **more})


def answer_form(form: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return chat(response_format=form)


def embedding(text: Any) -> tuple[type[BaseModel], dict[str, Any]]:
    return EmbeddingRequest, {"model": "m", "input": text}


MANY = {"schema": {}, "unknown": 1}
# One for each `raise` of the schemas: what is asked, the field, and the value that is named.
EXAMPLES: list[tuple[tuple[type[BaseModel], dict[str, Any]], str, str]] = [
    (completion(stop=list("abcde")), "stop", "['a', 'b', 'c', 'd', 'e']"),
    (completion(stop=[""]), "stop", "['']"),
    (completion(prompt=["x"] * 65), "prompt", "['x', 'x'"),
    (completion(prompt=[]), "prompt", "[]"),
    (completion(echo=True, logprobs=0), "echo", "True"),
    (completion(n=33, prompt=["a", "b"]), "n", "33"),
    (completion(logit_bias=3), "logit_bias", "3"),
    (completion(logit_bias={"a": 1}), "logit_bias", "{'a': 1}"),
    (completion(logit_bias={"1": 101}), "logit_bias", "{'1': 101}"),
    (completion(moesaic={"max_dropped": 0.5}), "moesaic.max_dropped", "0.5"),
    (message(content=5), "messages[1].content", "5"),
    (part("y"), "messages[1].content[1]", "'y'"),
    (part({"type": "image_url"}), "messages[1].content[1].type", "'image_url'"),
    (part({"type": "text"}), "messages[1].content[1].text", "None"),
    (part({"type": "text", "text": "y", "z": 0}), "messages[1].content[1].z", "0"),
    (
        part({"type": "refusal", "refusal": 1}, "assistant"),
        "messages[1].content[1].refusal",
        "1",
    ),
    (chat(messages=[USER, {"role": "user"}]), "messages[1].content", "None"),
    (message(audio={"id": "a"}), "messages[1].audio", "{'id': 'a'}"),
    (message(tool_calls=[CALL]), "messages[1].tool_calls", "['f']"),
    (message(refusal="no"), "messages[1].refusal", "'no'"),
    (message(role="tool"), "messages[1].tool_call_id", "None"),
    (message(reasoning="no"), "messages[1].reasoning", "'no'"),
    (chat(chat_template_kwargs=[]), "chat_template_kwargs", "[]"),
    (chat(chat_template_kwargs={"tools": 1}), "chat_template_kwargs", "{'tools': 1}"),
    (chat(chat_template_kwargs={"a-b": 1}), "chat_template_kwargs", "{'a-b': 1}"),
    (chat(chat_template_kwargs={"x": "y" * 9000}), "chat_template_kwargs", "{'x': 'yyyy"),
    (chat(top_logprobs=2), "top_logprobs", "2"),
    (tool_choice("required", tools=[]), "tool_choice", "'required'"),
    (tool_choice(named("g")), "tool_choice", "{'type': 'function'"),
    (tool_choice("must"), "tool_choice", "'must'"),
    (tool_choice({"type": "custom"}), "tool_choice", "{'type': 'custom'}"),
    (tool_choice({"type": "allowed_tools"}), "tool_choice", "{'type': 'allowed_tools'}"),
    (tool_choice({"type": "function"}), "tool_choice", "{'type': 'function'}"),
    (answer_form("json"), "response_format", "'json'"),
    (answer_form({"type": "xml"}), "response_format", "{'type': 'xml'}"),
    (answer_form({"type": "text", "x": 1}), "response_format", "{'type': 'text', 'x': 1}"),
    (answer_form({"type": "json_schema", "json_schema": {}}), "response_format", "{'type'"),
    (answer_form({"type": "json_schema", "json_schema": MANY}), "response_format", "{'type'"),
    (embedding(["x"] * 2049), "input", "['x'"),
    (embedding([""]), "input", "['']"),
]


def refusal(asked: tuple[type[BaseModel], dict[str, Any]]) -> RequestError:
    kind, body = asked
    with pytest.raises(RequestError) as caught:
        parse_request(kind, json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    ("asked", "field", "value"), EXAMPLES, ids=[f"{n}-{one[1]}" for n, one in enumerate(EXAMPLES)]
)
def test_a_refusal_begins_with_the_field_and_ends_with_the_value(
    asked: tuple[type[BaseModel], dict[str, Any]], field: str, value: str
) -> None:
    error = refusal(asked)
    assert error.param == field
    assert str(error).startswith(f"{field}: ")
    said, _, got = str(error).removeprefix(f"{field}: ").partition(" (got ")
    assert len(said.split()) >= 3
    assert got.startswith(value)


def schemas() -> Iterator[tuple[Path, ast.Module]]:
    for file in [*sorted(OPENAI.glob("*.py")), OPENAI.parent / "embeddings.py"]:
        if file.name not in OTHERS:
            yield file, ast.parse(file.read_text())


def test_there_is_an_example_of_every_check() -> None:
    raises = {
        (file.name, node.lineno)
        for file, tree in schemas()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        # What is no validator's names its field itself.
        and ast.unparse(node.exc.func) != "RequestError"
    }
    assert len(raises) > 20
    lines: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        file = Path(frame.f_code.co_filename)
        if file.parent.name not in ("openai", "endpoint"):
            return None
        lines.add((file.name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for asked, *_ in EXAMPLES:
            refusal(asked)
    finally:
        sys.settrace(before)
    assert sorted(raises - lines) == []


def test_a_check_of_a_whole_part_names_one_of_its_fields() -> None:
    """Pydantic says of a model's validator where the model is, and nothing of the field."""
    checks = [
        (file.name, node)
        for file, tree in schemas()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("model_validator" in ast.unparse(one) for one in node.decorator_list)
    ]
    assert len(checks) >= 4
    for file, check in checks:
        for node in ast.walk(check):
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert ast.unparse(node.exc).startswith("misfit("), f"{file}:{node.lineno}"


def test_the_path_of_a_part_and_of_its_field_are_joined() -> None:
    class Inner(BaseModel):
        a: int = 0

        @model_validator(mode="after")
        def _never(self) -> Inner:
            raise misfit("a", "is never right", self.a)

    class Outer(BaseModel):
        inner: list[Inner] = []

    error = refusal((Outer, {"inner": [{"a": 7}]}))
    assert (str(error), error.param) == ("inner[0].a: is never right (got 7)", "inner[0].a")
    error = refusal((Inner, {"a": "8"}))
    assert (str(error), error.param) == ("a: is never right (got 8)", "a")
