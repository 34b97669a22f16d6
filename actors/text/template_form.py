"""The form in which one chat template takes messages, tool calls and tools.

Templates differ: some join a call's arguments as a string, some need a mapping; some know the role
``developer``; some write calls only where the content is None. Each question is tried once, with a
small conversation whose texts are recognised in what the template writes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from ...proto.errors import RequestError
from .template_source import Messages, TemplateSource

# Of the same length: a template that only writes a text's length would not pass on the text.
_USER, _OTHER_USER = "moesaicuser1", "moesaicuser2"
_SYSTEM, _ANSWER = "moesaicsystem", "moesaicanswer"
_TOOL = "moesaictool"
# Arguments that show how a template writes each kind of value.
_KEY, _VALUE, _FLAG = "moesaickey", "moesaicvalue", "moesaicflag"
_NESTED, _INNER, _LEAF = "moesaicnested", "moesaicinner", "moesaicleaf"
_ARGUMENTS = {_KEY: _VALUE, _FLAG: True, _NESTED: {_INNER: _LEAF}}
_WORDS = (_KEY, _VALUE, _FLAG, _NESTED, _INNER, _LEAF)
# Wrong ways to write them: Python's repr of a mapping or a bool, and JSON within a JSON string.
_WRONG = re.compile(rf"'(?:{_KEY}|{_FLAG}|{_NESTED}|{_INNER})'|{_FLAG}[^\w=]\W*True|\\+\"{_KEY}")
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")

Arguments = Literal["mapping", "text", "values"]
Blank = Literal["empty", "null", "absent"]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template takes an earlier tool call.

    ``arguments``: as a mapping; as JSON text; or as a mapping from names to texts, where values
    other than strings are JSON. ``takes_text``: text that is not a JSON object is written as it
    is. ``blank``: the content of a message that has calls and no text. ``short_ids``: ids need
    nine letters and digits, as Mistral's do.
    """

    arguments: Arguments = "mapping"
    takes_text: bool = False
    blank: Blank = "empty"
    short_ids: bool = False


class TemplateForm:
    """What one template needs; each property is found out when it is first used."""

    def __init__(self, source: TemplateSource) -> None:
        self._source = source

    @cached_property
    def content(self) -> Literal["text", "parts"]:
        """Whether a message's content is a string, or a list with one text part."""
        if not self._reaches_user(_text) and self._reaches_user(_parts):
            return "parts"
        return "text"

    @cached_property
    def developer(self) -> Literal["developer", "system"]:
        """The role under which the template takes a developer's message.

        A template that writes the name of any role, but does not know this one, would show
        the model a role that it was never trained on.
        """
        if "developer" in self._source.text:
            rendered = self._source.attempt([self._say("developer", _SYSTEM), self._user])
            if rendered is not None and _SYSTEM in rendered:
                return "developer"
        return "system"

    @cached_property
    def tools(self) -> Literal["given", "filled"] | None:
        """How the template takes tools.

        ``filled``: with an empty description and empty parameters where they have none.
        None: the template does not tell the model about tools.
        """
        bare = {"type": "function", "function": {"name": _TOOL}}
        full = filled(bare)
        for messages in ([self._user], [self._say("system", _SYSTEM), self._user]):
            for form, tool in (("given", bare), ("filled", full)):
                if _TOOL in (self._source.attempt(messages, [tool]) or ""):
                    return "given" if form == "given" else "filled"
        return None

    @cached_property
    def calls(self) -> CallForm:
        tools = [filled({"type": "function", "function": {"name": _TOOL}})] if self.tools else []
        plain = (self._source.attempt([self._user], tools) or "").count("None")
        for turns, form in product(self._histories(), _forms()):
            rendered = self._source.attempt(self._history(form, turns), tools)
            if rendered is None or rendered.count("None") > plain:
                continue
            if _well_written(rendered, form.arguments):
                text = CallForm("text", True, form.blank, form.short_ids)
                verbatim = self._source.attempt(self._history(text, turns), tools)
                takes_text = verbatim is not None and _well_written(verbatim, "text")
                return CallForm(form.arguments, takes_text, form.blank, form.short_ids)
        return CallForm()

    def fit(self, messages: Messages) -> list[dict[str, Any]]:
        """Return the conversation in the template's form.

        Raises RequestError for arguments of a call that the template cannot take.
        """
        fitted = list[dict[str, Any]]()
        for index, message in enumerate(messages):
            one = dict(message)
            if one["role"] == "developer":
                one["role"] = self.developer
            content = one.get("content") or ""
            if calls := one.get("tool_calls"):
                one["tool_calls"] = [
                    self._call(call, f"messages[{index}].tool_calls[{nth}]")
                    for nth, call in enumerate(calls)
                ]
            if calls and not content.strip() and self.calls.blank != "empty":
                one["content"] = None
                if self.calls.blank == "absent":
                    del one["content"]
            elif self.content == "parts":
                one["content"] = _parts("" if calls and not content.strip() else content)
            else:
                one["content"] = "" if calls and not content.strip() else content
            if "tool_call_id" in one:
                one["tool_call_id"] = self._id(one["tool_call_id"])
            fitted.append(one)
        return fitted

    def fit_tools(self, tools: Messages) -> list[dict[str, Any]]:
        return [filled(tool) if self.tools == "filled" else dict(tool) for tool in tools]

    def _call(self, call: Mapping[str, Any], path: str) -> dict[str, Any]:
        function = dict(call["function"])
        function["arguments"] = self._arguments(
            function.get("arguments"), f"{path}.function.arguments"
        )
        return {**call, "id": self._id(call["id"]), "function": function}

    def _arguments(self, given: Any, path: str) -> Any:
        """Return a call's arguments, JSON text as in the API, in the template's form."""
        if given is None or (isinstance(given, str) and given.strip() in ("", "null")):
            given = "{}"
        value = given if isinstance(given, Mapping) else json_object(given)
        if value is None:
            if self.calls.takes_text:
                return given
            raise RequestError(
                f"{path} is not a JSON object, and the chat template takes nothing else "
                f"(got {_short(given)})",
                param=path,
            )
        match self.calls.arguments:
            case "mapping":
                return value
            case "text":
                return given if isinstance(given, str) else _json(value)
            case "values":
                return {k: v if isinstance(v, str) else _json(v) for k, v in value.items()}

    def _id(self, given: str) -> str:
        if not self.calls.short_ids or _SHORT_ID.fullmatch(given):
            return given
        # A hash, so that a call and its answer get the same id.
        return hashlib.blake2b(given.encode(), digest_size=8).hexdigest()[:9]

    @property
    def _user(self) -> dict[str, Any]:
        return self._say("user", _USER)

    def _say(self, role: str, text: str) -> dict[str, Any]:
        content = _parts(text) if self.content == "parts" else text
        return {"role": role, "content": content}

    def _reaches_user(self, form: Any) -> bool:
        first = self._source.attempt([{"role": "user", "content": form(_USER)}])
        if first is None or _USER in first:
            return first is not None
        return first != self._source.attempt([{"role": "user", "content": form(_OTHER_USER)}])

    def _histories(self) -> Iterator[Sequence[dict[str, Any]]]:
        """Yield what may follow a call.

        Some templates require a certain order; some do not support answers of tools.
        """
        answer = self._say("tool", _ANSWER)
        yield (answer,)
        yield (answer, self._say("assistant", _ANSWER), self._user)
        yield ()

    def _history(self, form: CallForm, turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        identity = "moesaic01" if form.short_ids else "call_moesaic"
        arguments: Any = _ARGUMENTS
        if form.arguments == "text":
            arguments = _json(_ARGUMENTS)
        elif form.arguments == "values":
            arguments = {k: v if isinstance(v, str) else _json(v) for k, v in _ARGUMENTS.items()}
        function = {"name": _TOOL, "arguments": arguments}
        calling: dict[str, Any] = {"role": "assistant"}
        if form.blank != "absent":
            empty = _parts("") if self.content == "parts" else ""
            calling["content"] = None if form.blank == "null" else empty
        calling["tool_calls"] = [{"id": identity, "type": "function", "function": function}]
        followed = [
            {**turn, "tool_call_id": identity} if turn["role"] == "tool" else turn for turn in turns
        ]
        return [self._user, calling, *followed]


def _forms() -> Iterator[CallForm]:
    """Yield every form that is tried, the most usual first."""
    ids: tuple[bool, ...] = (False, True)
    blanks: tuple[Blank, ...] = ("empty", "null", "absent")
    arguments: tuple[Arguments, ...] = ("mapping", "text", "values")
    for short_ids, blank, form in product(ids, blanks, arguments):
        yield CallForm(form, form == "text", blank, short_ids)


def _well_written(rendered: str, arguments: Arguments) -> bool:
    if arguments == "text":
        return _json(_ARGUMENTS) in rendered
    return all(word in rendered for word in _WORDS) and not _WRONG.search(rendered)


def json_object(text: Any) -> dict[str, Any] | None:
    """Return the JSON object in ``text``; None if there is none that can be written as text."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
        # JSON can escape half of a surrogate pair, which no text can hold. A number beyond all
        # floats (1e400) is read as infinity, which JSON does not have.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def filled(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tool with the keys that a function may leave out: description and parameters."""
    function = {"description": "", **tool["function"]}
    parameters = {"type": "object", "properties": {}, **(function.get("parameters") or {})}
    return {**tool, "function": {**function, "parameters": parameters}}


def _text(text: str) -> Any:
    return text


def _parts(text: str) -> Any:
    return [{"type": "text", "text": text}]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
