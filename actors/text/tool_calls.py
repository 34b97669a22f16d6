"""The form in which models call tools: JSON between ``<tool_call>`` and ``</tool_call>``.

Templates of Qwen, Hermes and similar models ask for it. Calls in other forms stay text.
"""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal, NamedTuple

BEGIN, END = "<tool_call>", "</tool_call>"

# How many calls are wanted. "named": one, of a tool that the request names; OpenAI's API gives such
# an answer the finish reason of a text.
Calls = Literal["none", "one", "many", "named"]

# Not strict: models write raw newlines in strings, which JSON does not allow.
_DECODER = json.JSONDecoder(strict=False)


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str  # JSON, as in OpenAI's API


def read_calls(text: str, *, marked: bool = True) -> list[ToolCall]:
    """Return the calls in a JSON text, one or a list of them; none where it is anything else.

    ``marked``: the text follows a mark of its own. Without one, an object without arguments is
    no call.
    """
    try:
        found, _ = _DECODER.raw_decode(text)
        found = found if isinstance(found, list) else [found]
        return [_call(one, marked=marked) for one in found]
    except ValueError:
        return []


def _call(found: Any, *, marked: bool) -> ToolCall:
    """Return one call. Raises ValueError where ``found`` is none."""
    if isinstance(found, dict) and isinstance(found.get("function"), dict):
        found = found["function"]  # models may repeat the form in which tools are described
    if not isinstance(found, dict):
        raise ValueError("a call is an object")
    name = found.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    name.encode()  # raises ValueError for half a surrogate pair
    if not marked and not {"arguments", "parameters"} & found.keys():
        raise ValueError("a call has arguments")
    arguments = _arguments(found.get("arguments", found.get("parameters")))
    return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments)


def _arguments(found: Any) -> str:
    """Return arguments as JSON. Raises ValueError for numbers that JSON does not have."""
    if isinstance(found, str):
        found = _decoded(found)
    if isinstance(found, str):  # not JSON; the client gets it as it is
        text = found
    else:
        # Models write missing arguments as null, "" or [].
        text = json.dumps(found or {}, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON must escape
        text = json.dumps(found, allow_nan=False)
    return text


def _decoded(text: str) -> Any:
    """Return arguments that are JSON in a string, maybe encoded twice; else ``text``."""
    found: Any = text.strip()
    while isinstance(found, str) and found:
        try:
            found, _ = _DECODER.raw_decode(found)
        except (ValueError, RecursionError):
            return text
        found = found.strip() if isinstance(found, str) else found
    return (found or {}) if isinstance(found, dict) or not found else text
