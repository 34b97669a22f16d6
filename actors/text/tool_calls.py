"""The form in which models call tools: JSON between ``<tool_call>`` and ``</tool_call>``.

Templates of Qwen, Hermes and their like ask for it. Other models' calls stay text.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal, NamedTuple

BEGIN, END = "<tool_call>", "</tool_call>"

# How many calls are wanted. An answer that is one of a named tool ends as text does.
Calls = Literal["none", "one", "many", "named"]

# Raw newlines in strings are no JSON, but models write them.
_DECODER = json.JSONDecoder(strict=False)


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str  # JSON, as OpenAI has it


def read_calls(text: str, *, marked: bool = True) -> list[ToolCall]:
    """The calls that a JSON text makes, one or a list of them; none where it is anything else.

    ``marked``: it stands behind a mark of its own. Without one, what has no arguments is no call.
    """
    try:
        found, _ = _DECODER.raw_decode(text)
        found = found if isinstance(found, list) else [found]
        return [_call(one, marked=marked) for one in found]
    except ValueError:
        return []


def _call(found: Any, *, marked: bool) -> ToolCall:
    """Raises ValueError where it is none."""
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]  # as tools are told to the model
    if not isinstance(found, dict):
        raise ValueError("a call is an object")
    name = found.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    name.encode()  # half a surrogate pair is a ValueError
    if not marked and not {"arguments", "parameters"} & found.keys():
        raise ValueError("a call has arguments")
    arguments = _arguments(found.get("arguments", found.get("parameters")))
    return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments)


def _arguments(found: Any) -> str:
    """As JSON. Raises ValueError for numbers that JSON does not have."""
    if isinstance(found, str):
        found = _decoded(found)
    if isinstance(found, str):  # whatever it is, the client is to see it
        text = found
    else:
        # No arguments are null, "" or, for some models, [].
        text = json.dumps(found or {}, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can have only escaped
        text = json.dumps(found, allow_nan=False)
    return text


def _decoded(text: str) -> Any:
    """Arguments that are JSON in a string, also twice; ``text`` where they are none."""
    found: Any = text.strip()
    while isinstance(found, str) and found:
        try:
            found, _ = _DECODER.raw_decode(found)
        except (ValueError, RecursionError):
            return text
        found = found.strip() if isinstance(found, str) else found
    return (found or {}) if isinstance(found, dict) or not found else text
