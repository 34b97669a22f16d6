"""The OpenAI-compatible requests; a bad one is refused with the name of the wrong field.

Unknown keys fail. Keys of OpenAI's API that this service does not support pass with their neutral
value only. So a client that sends OpenAI's defaults works, and no setting is silently ignored.
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
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from ....proto.errors import RequestError
from ...text.answer_form import AnswerForm
from ...text.tool_calls import Calls
from .content import Content, without_hints
from .refusals import misfit, refused, short
from .sampling import MAX_CHOICES, SamplingOptions, Strict
from .template_options import TemplateOptions
from .tools import Choice, JsonSchema, MessageToolCall, Tool, ToolChoice, Tools

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_PROMPTS = 64
MAX_LOGPROBS = 20

# Keys of OpenAI's API that this service lacks, with the values that mean "not used".
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
# Hints to OpenAI's own service, which change no answer here.
_IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
)
# Keys of an assistant's message that clients send back as they got them, even when empty.
_EMPTY_IN_MESSAGE = (
    "annotations",
    "audio",
    "function_call",
    "reasoning",
    "reasoning_content",
    "refusal",
    "tool_calls",
)
# Keys of OpenAI's messages that are not supported, with what to send instead.
_NOT_IN_MESSAGE = {
    "audio": "",
    "function_call": "; send tool_calls, and the result in a message with role='tool'",
}


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
    """The fields that both kinds of request have."""

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
    """Return any form of a prompt as a list of prompts."""
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
            raise misfit(
                "echo",
                "is not allowed with logprobs, since this service has none of prompt tokens",
                self.echo,
            )
        if len(self.prompt) * self.choices > MAX_CHOICES:
            most, prompts = MAX_CHOICES // len(self.prompt), len(self.prompt)
            raise misfit(
                "n",
                f"may be at most {most} with {prompts} prompts, "
                f"since a request may have at most {MAX_CHOICES} choices",
                self.choices,
            )
        return self


def _drop_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    value = {k: v for k, v in value.items() if v or k not in _EMPTY_IN_MESSAGE}
    for name, instead in _NOT_IN_MESSAGE.items():
        if name in value:
            raise misfit(name, f"is not supported{instead}", value[name])
    return value


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    # An earlier answer's thinking, under DeepSeek's name and under OpenRouter's.
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def thinking(self) -> str | None:
        return self.reasoning_content or self.reasoning

    @model_validator(mode="after")
    def _fitting(self) -> Message:
        if self.role != "assistant":
            for name in ("reasoning_content", "reasoning"):
                if value := getattr(self, name):
                    raise misfit(name, "is only allowed with role='assistant'", value)
        if self.content is None and not (self.tool_calls or self.refusal or self.thinking):
            raise misfit("content", "a message needs content or tool_calls", None)
        if self.tool_calls and self.role != "assistant":
            calls = [call.function.name for call in self.tool_calls]
            raise misfit("tool_calls", "are only allowed with role='assistant'", calls)
        if self.refusal and self.role != "assistant":
            raise misfit("refusal", "is only allowed with role='assistant'", self.refusal)
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise misfit(
                "tool_call_id",
                "is required with role='tool', and not allowed with other roles",
                self.tool_call_id,
            )
        return self

    def for_template(self) -> dict[str, Any]:
        text = (self.content or "") + (self.refusal or "")
        message: dict[str, Any] = {"role": self.role, "content": text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


class ChatRequest(_Generation):
    messages: Annotated[list[Annotated[Message, BeforeValidator(_drop_empty)]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    response_format: JsonSchema = None
    chat_template_kwargs: TemplateOptions | None = None

    @field_validator("tool_choice")
    @classmethod
    def _of_the_tools(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if choice is None or "tools" not in info.data:  # the error in tools is reported instead
            return choice
        if not names and (choice.mode in ("required", "named") or choice.names):
            raise PydanticCustomError("tool_choice", "is only allowed when tools are specified")
        for name in choice.names or ():
            if name not in names:
                raise PydanticCustomError(
                    "tool_choice",
                    "names the function {name}; the tools are {names}",
                    {"name": repr(name), "names": ", ".join(names)},
                )
        return choice

    @property
    def _offered(self) -> list[tuple[int, Tool]]:
        """The tools that the model is told about, with their positions in the request."""
        choice = self.tool_choice or ToolChoice()
        allowed = choice.names if choice.mode != "named" else None
        return [
            (number, tool)
            for number, tool in enumerate(self.tools or ())
            if choice.mode != "none" and (allowed is None or tool.function.name in allowed)
        ]

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools in the form that chat templates take."""
        return [tool.for_template() for _, tool in self._offered]

    @property
    def calls(self) -> Calls:
        """How many calls the answer may have."""
        if not self._offered:
            return "none"
        if self.tool_choice is not None and self.tool_choice.mode == "named":
            return "named"
        return "one" if self.parallel_tool_calls is False else "many"

    @property
    def form(self) -> AnswerForm | None:
        choice = self.tool_choice or ToolChoice()
        forced = choice.mode in ("required", "named")
        tools = [
            (number, tool)
            for number, tool in self._offered
            if choice.mode != "named" or tool.function.name in (choice.names or ())
        ]
        held = forced or self.response_format is not None
        if not held and not any(tool.function.strict for _, tool in tools):
            return None
        return AnswerForm(
            json_schema=None if forced else self.response_format,
            tools=tuple(
                tool.form(
                    f"tools[{number}].function.parameters",
                    held=forced or bool(tool.function.strict),
                )
                for number, tool in tools
            ),
            forced=forced,
            many=self.calls not in ("one", "named"),
        )

    @model_validator(mode="before")
    @classmethod
    def _without_hints(cls, body: Any) -> Any:
        return without_hints(body)

    @model_validator(mode="after")
    def _top_of_some(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise misfit("top_logprobs", "is only allowed with logprobs=true", self.top_logprobs)
        return self

    @property
    def top_tokens(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_budget(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


R = TypeVar("R", bound=BaseModel)


def parse_request(kind: type[R], body: bytes) -> R:
    """Return the checked request; RequestError says which field is wrong and why."""
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
                f"{name}={short(value)} is not supported by this service; leave {name} out",
                param=name,
            )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise refused(error) from None


def _same(value: Any, allowed: Any) -> bool:
    # In Python 1 == True and 0 == False; in JSON they differ.
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
