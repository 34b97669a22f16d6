"""Check whether everything that a conversation says reaches the prompt.

Templates silently leave messages out: a system message that is not the first, answers of tools that
they do not know, text next to calls. So each kind of conversation (its roles in their order, and
what each message has, but not what it says) is rendered once with texts that can be recognised. The
finding is kept, so that further requests of the same kind cost nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from .template_form import TemplateForm, filled, json_object
from .template_source import Messages, TemplateSource
from .thinking import Thinking

T = TypeVar("T")

_KINDS_KEPT = 4096
_END_KEPT = 128  # characters
_TOOL = "moesaictool"

_MARK = re.compile(r"moesaicthese\d{6,}c\d{4,}(?:value|name)?")

# If a template changes the texts that it writes, each text costs one more rendering. So only the
# first and the last texts are checked, since templates treat those differently.
_MOST_COMPARED = 32

# blank: no visible text; thought: only thinking, which templates strip from answers; answer:
# thinking and more; marked: a mark that ends thinking, in a message that is not an answer.
Text = Literal["blank", "thought", "answer", "marked", "text"]


class Turn(NamedTuple):
    """The structure of a message, whatever it says."""

    role: str
    text: Text
    reasons: bool
    named: bool
    calls: tuple[tuple[int, bool], ...]  # each call's number, and whether it has arguments
    answers: int | None  # the number of the call


class Omission(NamedTuple):
    """What was left out: the text of ``messages[at]``, one of its calls, or the tools.

    ``at`` is None for the tools.
    """

    at: int | None
    call: int | None = None


class ReachFinding(NamedTuple):
    """What was found for one kind of conversation.

    ``opened``: a prompt that ends with ``end`` ends within thinking. A prompt with another end
    is looked at again, since in some templates (Nemotron's) a message decides (``/no_think``).
    """

    lost: Omission | None = None
    opened: bool = False
    end: str | None = None


class Reach:
    """What one template leaves out, by kind of conversation."""

    def __init__(
        self, source: TemplateSource, form: TemplateForm, thinking: Thinking | None
    ) -> None:
        self._source = source
        self._form = form
        self._marks = thinking or Thinking()
        self._found: OrderedDict[bytes, ReachFinding] = OrderedDict()
        self._lock = threading.Lock()

    def look(
        self, messages: Messages, tools: Messages, options: Mapping[str, Any] | None, rendered: str
    ) -> tuple[Omission | None, bool]:
        """Return what is missing in the prompt ``rendered``, and whether it ends within thinking.

        ``rendered`` must be what the template made of this conversation.
        """
        found = self._finding(messages, tools, options, rendered)
        if found.end is not None and rendered.endswith(found.end):
            return found.lost, found.opened
        return found.lost, rendered.rstrip().endswith(self._marks.begin)

    def _finding(
        self, messages: Messages, tools: Messages, options: Mapping[str, Any] | None, rendered: str
    ) -> ReachFinding:
        turns = self._turns(messages)
        named = json.dumps(options or {}, sort_keys=True)
        kind = hashlib.blake2b(repr((turns, bool(tools), named)).encode(), digest_size=16).digest()
        with self._lock:
            if kind in self._found:
                self._found.move_to_end(kind)
                return self._found[kind]
        finding = self._find(turns, bool(tools), options)
        if finding is None:
            # The template does not render our texts, so the messages themselves are compared.
            finding = self._compare(messages, turns, tools, options, rendered)
        with self._lock:
            self._found[kind] = finding
            while len(self._found) > _KINDS_KEPT:
                self._found.popitem(last=False)
        return finding

    def _turns(self, messages: Messages) -> list[Turn]:
        numbers: dict[str, int] = {}

        def number(identity: str) -> int:
            return numbers.setdefault(identity, len(numbers))

        return [
            Turn(
                message["role"],
                self._kind_of(message),
                bool(message.get("reasoning_content")),
                "name" in message,
                tuple(
                    (number(call["id"]), _has_arguments(call["function"].get("arguments")))
                    for call in message.get("tool_calls") or ()
                ),
                number(message["tool_call_id"]) if "tool_call_id" in message else None,
            )
            for message in messages
        ]

    def _kind_of(self, message: Mapping[str, Any]) -> Text:
        content = message.get("content") or ""
        if not content.strip():
            return "blank"
        if self._marks.end not in content:
            return "text"
        if message["role"] != "assistant":
            return "marked"
        return "answer" if content.rpartition(self._marks.end)[2].strip() else "thought"

    def _find(
        self, turns: Sequence[Turn], tools: bool, options: Mapping[str, Any] | None
    ) -> ReachFinding | None:
        """Return the finding for such turns; None where the template does not render our texts."""
        offered = [filled({"type": "function", "function": {"name": _TOOL}})] if tools else []

        def rendered(other: Omission | None = None) -> str | None:
            fitted = self._form.fit(self._conversation(turns, other))
            return self._source.attempt(fitted, offered, options)

        found = rendered()
        if found is None:
            return None
        marks = list(_MARK.finditer(found))
        seen = {mark.group() for mark in marks}
        # Whether the prompt ends within thinking: only the part after the last text counts, since
        # users may write such marks in messages.
        behind = found[marks[-1].end() if marks else 0 :]
        opened, end = self._is_open(behind), behind[-_END_KEPT:]
        if tools and _TOOL not in found:
            return ReachFinding(Omission(None), opened, end)
        missed = [lost for lost, mark in _marks_of(turns) if mark not in seen]
        for lost in _ends(missed):
            # A template may have changed the text instead of leaving it out. It was left out only
            # if the prompt stays the same with another text in its place.
            if rendered(lost) == found:
                return ReachFinding(lost, opened, end)
        return ReachFinding(None, opened, end)

    def _conversation(self, turns: Sequence[Turn], other: Omission | None) -> list[dict[str, Any]]:
        """Return such a conversation, with a mark for each text.

        The text of ``other`` gets a different mark.
        """
        messages = list[dict[str, Any]]()
        for index, turn in enumerate(turns):
            mark = _mark(Omission(index), other)
            thought = f"{self._marks.begin}\nmoesaicthought\n{self._marks.end}\n\n"
            content = {
                "blank": "",
                "thought": thought,
                "answer": thought + mark,
                "marked": mark + self._marks.end,
                "text": mark,
            }
            message: dict[str, Any] = {"role": turn.role, "content": content[turn.text]}
            if turn.reasons:
                message |= reasoning("moesaicthought")
            if turn.named:
                message["name"] = "moesaicname"
            if turn.calls:
                message["tool_calls"] = [
                    _call(call, _mark(here, other), another=here == other)
                    for nth, call in enumerate(turn.calls)
                    for here in (Omission(index, nth),)
                ]
            if turn.answers is not None:
                message["tool_call_id"] = _identity(turn.answers)
            messages.append(message)
        return messages

    def _is_open(self, end: str) -> bool:
        return end.rfind(self._marks.begin) > end.rfind(self._marks.end)

    def _compare(
        self,
        messages: Messages,
        turns: Sequence[Turn],
        tools: Messages,
        options: Mapping[str, Any] | None,
        rendered: str,
    ) -> ReachFinding:
        said = [index for index, turn in enumerate(turns) if turn.text not in ("blank", "thought")]
        for index in _ends(said):
            message = messages[index]
            # Of the same length: a template that only writes the length would not pass on the text.
            length = len(message["content"])
            another = ("y" if message["content"].startswith("x") else "x") * length
            changed = [*messages[:index], {**message, "content": another}, *messages[index + 1 :]]
            if self._source.attempt(self._form.fit(changed), tools, options) == rendered:
                return ReachFinding(Omission(index))
        return ReachFinding()


def _ends(found: Sequence[T]) -> Sequence[T]:
    half = _MOST_COMPARED // 2
    return found if len(found) <= _MOST_COMPARED else [*found[:half], *found[-half:]]


def reasoning(text: str) -> dict[str, str]:
    """Return an earlier answer's thinking under all the names by which templates look for it."""
    return {"reasoning_content": text, "reasoning": text, "thinking": text}


def _marks_of(turns: Sequence[Turn]) -> Iterator[tuple[Omission, str]]:
    """Yield each text that must reach the prompt, with its mark."""
    for index, turn in enumerate(turns):
        if turn.text not in ("blank", "thought"):
            yield Omission(index), _mark(Omission(index))
        for nth, (_, has_arguments) in enumerate(turn.calls):
            mark = _mark(Omission(index, nth))
            yield Omission(index, nth), f"{mark}{'value' if has_arguments else 'name'}"


def _mark(what: Omission, other: Omission | None = None) -> str:
    kind = "other" if what == other else "these"
    return f"moesaic{kind}{what.at:06d}c{0 if what.call is None else what.call + 1:04d}"


def _call(call: tuple[int, bool], mark: str, *, another: bool) -> dict[str, Any]:
    number, has_arguments = call
    # Another call differs in everything, also in its id: Kimi's templates write only that.
    arguments = {"moesaickey": f"{mark}value"} if has_arguments or another else {}
    function = {"name": f"{mark}name", "arguments": json.dumps(arguments)}
    identity = f"othr{number:05d}" if another else _identity(number)
    return {"id": identity, "type": "function", "function": function}


def _identity(number: int) -> str:
    return f"call{number:05d}"


def _has_arguments(given: Any) -> bool:
    if given is None:
        return False
    if isinstance(given, str):
        return given.strip() not in ("", "null") and json_object(given) != {}
    return bool(given)
