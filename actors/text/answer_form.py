"""The form that an answer must have (JSON of a schema, tool calls, or either), and its grammar.

The grammar is in llguidance's variant of Lark (https://github.com/guidance-ai/llguidance,
docs/syntax.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .thinking import Thinking
from .tool_calls import BEGIN, END

ANY_OBJECT = '{"type": "object"}'

# Whitespace is fixed, because an unsure model may generate it without end. Calls may have the
# spaces that chat templates write, since models are trained on those.
COMPACT: dict[str, Any] = {"whitespace_flexible": False}
_SPACED = {**COMPACT, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolForm:
    """A tool that may be called; ``schema`` is that of its arguments, in JSON."""

    name: str
    schema: str = ANY_OBJECT
    param: str = "tools"  # the schema's place in the request


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerForm:
    """The form of an answer.

    ``json_schema``: the schema, in JSON, of a text that is not a call; None: any text.
    ``tools``: calls must be of these. ``forced``: the answer consists of calls only. ``many``:
    it may have several calls. ``thinking``: what may come before all this.
    """

    json_schema: str | None = None
    tools: tuple[ToolForm, ...] = ()
    forced: bool = False
    many: bool = True
    thinking: Thinking | None = None

    @property
    def schema_alone(self) -> str | None:
        """The schema, where the form has nothing else."""
        return None if self.tools or self.thinking is not None else self.json_schema


def lark(form: AnswerForm, token_of: Callable[[str], int | None]) -> str:
    """Return the grammar; ``token_of`` gives the id of a mark that is one special token."""
    return _Lark(form, token_of).text()


class _Lark:
    def __init__(self, form: AnswerForm, token_of: Callable[[str], int | None]) -> None:
        self._form = form
        self._token_of = token_of
        self._rules: list[str] = []

    def text(self) -> str:
        thinking, answer = self._form.thinking, self._answer()
        if thinking is None:
            start = answer
        elif thinking.opened:
            start = f"{self._thought(thinking)} {answer}"
        else:
            thought = f"{self._mark(thinking.begin)} {self._thought(thinking)} {answer}"
            start = f"{thought} | {self._thoughtless(thinking, answer)}"
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"

    def _thought(self, thinking: Thinking) -> str:
        self._until("thought", thinking.end, past=(BEGIN, END))
        self._rules.append(r"NEWLINES: /\n{0,2}/")
        return "thought NEWLINES"

    def _thoughtless(self, thinking: Thinking, answer: str) -> str:
        """Return the rule of an answer without thinking.

        Where it may be any text, it must not begin with the mark of thinking. Otherwise
        thinking would match as such a text as well, and a call's mark in it as a call.
        """
        form = self._form
        any_text = form.tools and not form.forced and form.json_schema is None
        if not any_text or self._token_of(thinking.begin) is not None:
            return answer
        self._until("first", BEGIN, unlike=thinking.begin)
        self._rules.append("other: UNLIKE")
        return f"(first body {self._mark(END)} {answer} | other)"

    def _answer(self) -> str:
        form = self._form
        if not form.tools:
            return self._schema()
        bodies = [self._body(number, tool) for number, tool in enumerate(form.tools)]
        self._rules.append(f"body: {' | '.join(bodies)}")
        self._rules.append(f"call: {self._mark(BEGIN)} body {self._mark(END)}")
        calls = r'call ("\n" call)*' if form.many else "call"
        if form.forced:
            return calls
        if form.json_schema is not None:
            return f"({self._schema()} | {calls})"
        self._until("before", BEGIN)
        self._rules.append("rest: TEXT")
        return f"(before body {self._mark(END)})* rest"

    def _schema(self) -> str:
        schema = self._form.json_schema
        assert schema is not None
        self._rules.append(f"answer: {_json(schema, COMPACT)}")
        return "answer"

    def _body(self, number: int, tool: ToolForm) -> str:
        before = f'\n{{"name": {json.dumps(tool.name)}, "arguments": '
        arguments = _json(tool.schema, _SPACED)
        self._rules.append(f'body_{number}: {json.dumps(before)} {arguments} "}}\\n"')
        return f"body_{number}"

    def _until(
        self, rule: str, mark: str, *, past: Sequence[str] = (), unlike: str | None = None
    ) -> None:
        """Add a rule for any text up to a mark and that mark, as a special token or as spelled.

        ``past``: marks that may stand in the text, which holds no other special tokens.
        ``unlike``: what the text must not begin with.
        """
        name, but = "TEXT", ""
        if unlike is not None:
            name, but = "UNLIKE", f" & ~/{_regex(unlike)}(?s:.*)/"
        if (text := f"{name}: /(?s:.*)/{but}") not in self._rules:
            self._rules.append(text)
        self._rules.append(f"{rule.upper()}: /(?s:.*){_regex(mark)}/{but}")
        self._rules.append(f"{rule}_spelled[lazy]: {rule.upper()}")
        token = self._token_of(mark)
        end = f"{rule}_spelled" if token is None else f"({rule}_spelled | {name} <[{token}]>)"
        tokens = [str(one) for other in past if (one := self._token_of(other)) is not None]
        some = f"(TEXT <[{','.join(tokens)}]>)* " if tokens else ""
        self._rules.append(f"{rule}: {some}{end}")

    def _mark(self, mark: str) -> str:
        token = self._token_of(mark)
        return json.dumps(mark) if token is None else f"<[{token}]>"


def _regex(text: str) -> str:
    """Return a pattern, for use between slashes, that matches just this text."""
    return re.escape(text).replace("/", r"\/")


def _json(schema: str, options: dict[str, Any]) -> str:
    # Replaces "x-guidance" in a request's schema, which must not set these options.
    return "%json " + json.dumps({**json.loads(schema), "x-guidance": options})
