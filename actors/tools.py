"""Tools: what a chat template is told of them, and the calls in what the model answers.

The form of calls is the one that templates of Qwen, Hermes and their like ask for: JSON between
``<tool_call>`` and ``</tool_call>``. Other models' calls stay text.
"""

from __future__ import annotations

import json
import secrets
from typing import NamedTuple

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
        self._held = ""
        self._inside = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """``(text that is none, calls that are complete)``"""
        self._held += text
        out: list[str] = []
        calls: list[ToolCall] = []
        while True:
            mark = _END if self._inside else _BEGIN
            before, found, behind = self._held.partition(mark)
            if not found:
                break
            if not self._inside:
                out.append(before)
            elif (call := _call(before)) is not None:
                calls.append(call)
            else:
                out.append(_BEGIN + before + _END)
            self._held, self._inside = behind, not self._inside
        if not self._inside:
            safe = len(self._held) - possible_start(self._held, (_BEGIN,))
            out.append(self._held[:safe])
            self._held = self._held[safe:]
        return "".join(out), calls

    def flush(self) -> str:
        """What was held back, when the text ends."""
        held = (_BEGIN if self._inside else "") + self._held
        self._held, self._inside = "", False
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
