"""The content of a chat message: its text parts, and keys of clients that are ignored.

Clients put hints for other services into messages (`cache_control`), and send earlier answers back
with what their own library added to them. Such keys are known by name and ignored; any other
unknown key is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator, ValidationInfo
from typing_extensions import TypedDict

from .refusals import misfit

# The first is LiteLLM's and OpenRouter's, the second OpenAI's.
_CACHE = ("cache_control", "prompt_cache_breakpoint")
_HINTS: dict[str, tuple[str, ...]] = {
    # `parsed`: what the openai library's `parse` made of the text. `annotations` (OpenAI) and
    # `provider_specific_fields` (LiteLLM) hold the parts of an answer that are not text.
    "messages.*": (*_CACHE, "annotations", "parsed", "provider_specific_fields"),
    # LangChain keeps these keys of streamed parts.
    "messages.*.content.*": (*_CACHE, "annotations", "citations", "id", "index"),
    # `index`: the position of a call in a streamed answer.
    "messages.*.tool_calls.*": (*_CACHE, "index", "extra_content", "provider_specific_fields"),
    "messages.*.tool_calls.*.function": ("parsed_arguments", "provider_specific_fields"),
    "tools.*": _CACHE,
    "tools.*.function": _CACHE,
}


def without_hints(value: Any, path: str = "") -> Any:
    """Return a chat request's body without the hints in it."""
    if isinstance(value, list):
        return [without_hints(one, f"{path}.*") for one in value]
    if not isinstance(value, dict):
        return value
    dropped = _HINTS.get(path, ())
    return {
        key: without_hints(one, f"{path}.{key}" if path else str(key))
        for key, one in value.items()
        if key not in dropped
    }


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


class RefusalPart(TypedDict):
    """A refusal, which only an assistant's message may have."""

    type: Literal["refusal"]
    refusal: str


def _check_content(value: Any, message: ValidationInfo) -> str:
    """Return a message's text: a string, or its text parts joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise misfit("", "must be a string or a list of text parts", value)
    kinds = ("text", "refusal") if message.data.get("role") == "assistant" else ("text",)
    return "".join(_text_of(part, f"[{n}]", kinds) for n, part in enumerate(value))


def _text_of(part: Any, path: str, kinds: tuple[str, ...]) -> str:
    if not isinstance(part, dict):
        raise misfit(path, 'must be a part such as {"type": "text", "text": "..."}', part)
    kind = part.get("type")
    if kind not in kinds:
        raise misfit(
            f"{path}.type",
            f"this type of part is not supported here; use {' or '.join(kinds)}",
            kind,
        )
    if not isinstance(part.get(kind), str):
        raise misfit(f"{path}.{kind}", "must be a string", part.get(kind))
    if more := sorted(set(part) - {"type", kind}):
        why = f"is not a key of a {kind} part; leave it out"
        raise misfit(f"{path}.{more[0]}", why, part[more[0]])
    return part[kind]


Content = Annotated[
    str,
    PlainValidator(_check_content, json_schema_input_type=str | list[TextPart | RefusalPart]),
]
