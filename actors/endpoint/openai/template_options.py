"""``chat_template_kwargs``: what a chat request passes to the model's chat template."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

MAX_OPTIONS = 64
MAX_OPTIONS_CHARS = 8192

_NAME = r"^[a-zA-Z][a-zA-Z0-9_]{0,63}$"
# Names that the request sets elsewhere, options of the rendering itself, functions that templates
# call, and names of parameters of the Python functions in between.
_RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
    "conversations", "dict", "joiner", "cycler", "lipsum", "max_length", "messages", "namespace",
    "padding", "raise_exception", "range", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "sanitize_control_tokens", "self", "strftime_now", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip


def _check_options(value: Any) -> dict[str, Any]:
    def wrong(why: str) -> PydanticCustomError:
        return PydanticCustomError("chat_template_kwargs", "{why}", {"why": why})

    if not isinstance(value, dict) or len(value) > MAX_OPTIONS:
        raise wrong(f"must be an object of at most {MAX_OPTIONS} names")
    for name in value:
        # The tokenizer sets the special tokens.
        if name in _RESERVED or name.endswith("_token"):
            raise wrong(f"has the name {name!r}, which the service sets itself; leave it out")
        if not re.fullmatch(_NAME, name):
            raise wrong(
                f"has the name {name[:70]!r}; a name begins with a letter and has at most 64 "
                "letters, digits and _"
            )
    if (length := len(json.dumps(value, ensure_ascii=False))) > MAX_OPTIONS_CHARS:
        raise wrong(f"has {length} characters as JSON; at most {MAX_OPTIONS_CHARS} are allowed")
    return value


TemplateOptions = Annotated[
    dict[str, Any],
    PlainValidator(
        _check_options,
        json_schema_input_type=Annotated[
            dict[Annotated[str, Field(pattern=_NAME)], Any], Field(max_length=MAX_OPTIONS)
        ],
    ),
]
