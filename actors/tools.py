"""Tools: what a chat template is told of them, and the calls in what the model answers.

The form of calls is the one that templates of Qwen, Hermes and their like ask for: JSON between
``<tool_call>`` and ``</tool_call>``. Other models' calls stay text.
"""

from __future__ import annotations

import json
import secrets
from typing import NamedTuple

from .marked_text import MarkedText
from .text import possible_start

_BEGIN, _END = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str  # JSON, as OpenAI has it


class ToolSearch:
    """Takes the calls out of a text that arrives in pieces; how it is cut makes no difference.

    What stands between the marks and is no call stays in the text, marks and all.
    """

    def __init__(self) -> None:
        self._held = MarkedText()  # from the begin mark on, where one was found
        self._inside = False

    def push(self, text: MarkedText) -> tuple[MarkedText, list[ToolCall]]:
        """``(text that is none, calls that are complete)``"""
        self._held += text
        out = MarkedText()
        calls: list[ToolCall] = []
        while True:
            held = self._held.text
            if not self._inside:
                start = held.find(_BEGIN)
                if start < 0:
                    break
                out += self._held[:start]
                self._held, self._inside = self._held[start:], True
                continue
            end = held.find(_END, len(_BEGIN))
            if end < 0:
                return out, calls
            if (call := _call(held[len(_BEGIN) : end])) is not None:
                calls.append(call)
            else:
                out += self._held[: end + len(_END)]
            self._held, self._inside = self._held[end + len(_END) :], False
        safe = len(self._held) - possible_start(self._held.text, (_BEGIN,))
        out += self._held[:safe]
        self._held = self._held[safe:]
        return out, calls

    def flush(self) -> MarkedText:
        """What was held back, when the text ends."""
        held, self._held, self._inside = self._held, MarkedText(), False
        return held


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{secrets.token_hex(12)}", found["name"], arguments)
