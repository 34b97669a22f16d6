"""The OpenAI-compatible requests, and how a bad one is refused: by name.

Unknown keys fail. Keys that OpenAI has and this service does not support yet pass with their
neutral value only, so that a client that sends its defaults works and none is silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json
from typing_extensions import TypedDict

from ..proto.errors import RequestError
from .http_sampling import MAX_CHOICES, SamplingOptions, Strict
from .http_tools import Call, JsonSchema, Tools

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 64
MAX_LOGPROBS = 20

# What OpenAI's API has and this one does not: the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
# Hints to OpenAI's own service: they change no answer here.
_IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
# Parts of an assistant's message that clients send back as they got them.
_EMPTY_IN_MESSAGE = ("annotations", "audio", "function_call", "refusal", "tool_calls")


def _one_or_more_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_stops(stops: list[str]) -> list[str]:
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError(
            "stop",
            "has {count} strings; at most {most} are allowed",
            {"count": len(stops), "most": MAX_STOPS},
        )
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise PydanticCustomError(
                "stop",
                "has a string of {length} characters; 1 to {most} are allowed",
                {"length": len(stop), "most": MAX_STOP_CHARS},
            )
    return stops


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Stops = Annotated[
    list[str],
    BeforeValidator(
        _one_or_more_stops,
        json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)],
    ),
    AfterValidator(_check_stops),
]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Generation(SamplingOptions):
    """What both kinds of request have."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: _Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_prompt(value: Any) -> list[str] | list[list[int]]:
    """Every form of a prompt as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if is_ids(value):
        return [value]
    if isinstance(value, list) and value:
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError(
                "prompt",
                "has {count} prompts; at most {most} are allowed",
                {"count": len(value), "most": MAX_PROMPTS},
            )
        if all(isinstance(item, str) for item in value) or all(map(is_ids, value)):
            return value
    raise PydanticCustomError(
        "prompt",
        "must be a string, a list of token ids, or a list of strings or of lists of token ids "
        "(none of them empty)",
    )


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Several = Field(min_length=1, max_length=MAX_PROMPTS)
_Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        _check_prompt,
        json_schema_input_type=str
        | Annotated[list[str], _Several]
        | _Ids
        | Annotated[list[_Ids], _Several],
    ),
]


class CompletionRequest(_Generation):
    prompt: _Prompts
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = False

    @property
    def top_tokens(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _fitting(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "echo", "echo with logprobs is not supported: a prompt's tokens have none here"
            )
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise PydanticCustomError(
                "n",
                "{prompts} prompts and n={n} make more than {most} choices",
                {"prompts": len(self.prompt), "n": self.choices, "most": MAX_CHOICES},
            )
        return self


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


def _check_content(value: Any) -> str:
    """A message's text: a string, or text parts that are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError(
                "content",
                "has a part of type {kind}; only text parts are supported",
                {"kind": repr(kind)},
            )
        texts.append(part["text"])
    return "".join(texts)


_Content = Annotated[
    str, PlainValidator(_check_content, json_schema_input_type=str | list[TextPart])
]


def _drop_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if v or k not in _EMPTY_IN_MESSAGE}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fitting(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("content", "a message needs content, or tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "tool_calls belong to role='assistant' alone")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError(
                "tool_call_id", "tool_call_id belongs to role='tool', which needs it"
            )
        return self

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ChatRequest(_Generation):
    messages: Annotated[list[Annotated[Message, BeforeValidator(_drop_empty)]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: JsonSchema = None

    @property
    def json_schema(self) -> str | None:
        return self.response_format

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.for_template() for tool in self.tools or ()]

    @model_validator(mode="after")
    def _top_of_some(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs belongs to logprobs=true alone")
        return self

    @property
    def top_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_budget(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


R = TypeVar("R", bound=BaseModel)


def parse_request(kind: type[R], body: bytes) -> R:
    """The checked request; RequestError says which field is wrong and why."""
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise RequestError("the body must be a JSON object")
    data = {key: value for key, value in data.items() if key not in _IGNORED}
    for name, neutral in _UNSUPPORTED.items():
        value = data.pop(name, None)
        if value is not None and not any(_same(value, allowed) for allowed in neutral):
            raise RequestError(
                f"{name}={_short(value)} is not supported by this service", param=name
            )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _first(error, kind) from None


def _same(value: Any, allowed: Any) -> bool:
    # In Python 1 == True and 0 == False; in JSON they differ.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _first(error: ValidationError, kind: type[BaseModel]) -> RequestError:
    """One clear message out of pydantic's list: the first wrong field."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        # Names of union members and of validators are no part of the request.
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() or not path:
            path += f".{step}" if path else step
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown parameter {path!r}", param=path)
    if first["type"] == "missing":
        return RequestError(f"missing parameter {path!r}", param=path)
    value = first["input"]
    said = first["msg"][0].lower() + first["msg"][1:]
    return RequestError(f"{path}: {said} (got {_short(value)})", param=path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
