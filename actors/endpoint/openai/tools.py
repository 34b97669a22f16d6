"""The fields of a chat request about tools and the form of its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from ....proto.errors import RequestError
from ...text.answer_form import ANY_OBJECT, ToolForm
from .sampling import Strict

MAX_TOOLS = 128


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments must follow the schema in `parameters`


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude={"function": {"strict"}}, exclude_none=True)

    def form(self, param: str, *, held: bool) -> ToolForm:
        """Return the form of this tool's calls.

        ``held``: arguments must follow the tool's schema, which is at ``param`` in the
        request. Raises RequestError where that schema is not an object's.
        """
        schema = self.function.parameters
        if not held or not schema:
            return ToolForm(name=self.function.name, schema=ANY_OBJECT, param=param)
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise RequestError(
                f"{param}: arguments are an object, so the schema's type must be 'object' "
                f"(got {kind!r})",
                param=param,
            )
        text = json.dumps({**schema, "type": "object"})
        return ToolForm(name=self.function.name, schema=text, param=param)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """``tool_choice``: whether calls are wanted, and of which tools.

    ``names`` is None where all tools may be called.
    """

    mode: Literal["none", "auto", "required", "named"] = "auto"
    names: tuple[str, ...] | None = None


class NamedFunction(TypedDict):
    name: str


class NamedTool(TypedDict):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(TypedDict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(TypedDict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_of(value: Any) -> ToolChoice | None:
    if value is None or isinstance(value, str):
        if value not in (None, "none", "auto", "required"):
            raise _wrong_choice(f"is {value!r}; use none, auto, required, or a function")
        return None if value is None else ToolChoice(value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function":
        return ToolChoice("named", (_named(value),))
    if kind != "allowed_tools":
        raise _wrong_choice(
            f"has the type {kind!r}; use none, auto, required, "
            '{"type": "function", "function": {"name": ...}}, or the type allowed_tools'
        )
    allowed = value.get("allowed_tools")
    if (
        set(value) != {"type", "allowed_tools"}
        or not isinstance(allowed, dict)
        or set(allowed) != {"mode", "tools"}
        or allowed["mode"] not in ("auto", "required")
        or not isinstance(allowed["tools"], list)
        or not allowed["tools"]
    ):
        raise _wrong_choice(
            'of type allowed_tools must be {"type": "allowed_tools", "allowed_tools": {"mode": '
            '"auto" or "required", "tools": [...]}}'
        )
    return ToolChoice(allowed["mode"], tuple(map(_named, allowed["tools"])))


def _named(value: Any) -> str:
    """Return the name in ``{"type": "function", "function": {"name": ...}}``."""
    function = value.get("function") if isinstance(value, dict) else None
    if (
        not isinstance(function, dict)
        or value.get("type") != "function"
        or set(value) != {"type", "function"}
        or set(function) != {"name"}
        or not isinstance(function["name"], str)
    ):
        raise _wrong_choice(
            'must name a function as {"type": "function", "function": {"name": ...}}'
        )
    return function["name"]


def _wrong_choice(why: str) -> PydanticCustomError:
    return PydanticCustomError("tool_choice", "{why}", {"why": why})


Choice = Annotated[
    ToolChoice | None,
    PlainValidator(
        _choice_of,
        json_schema_input_type=Literal["none", "auto", "required"]
        | NamedTool
        | AllowedChoice
        | None,
    ),
]


class FunctionCall(Strict):
    name: str
    arguments: str


class MessageToolCall(Strict):
    """A call that the model made earlier, as clients send it back."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Return the call for a chat template.

        The arguments stay text: templates differ in whether they expect text or an object.
        """
        return self.model_dump()


def _schema_of(value: Any) -> str | None:
    """Return ``response_format`` as a JSON schema in JSON; None: any text."""

    def wrong(why: str) -> PydanticCustomError:
        return PydanticCustomError("response_format", "{why}", {"why": why})

    if value is None:
        return None
    if not isinstance(value, dict):
        raise wrong("must be an object with a type")
    kind = value.get("type")
    wanted = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong(f"has the type {kind!r}; use text, json_object or json_schema")
    if set(value) != wanted:
        raise wrong(f"of type {kind} must have the keys {sorted(wanted)} and no others")
    if kind != "json_schema":
        return None if kind == "text" else '{"type": "object"}'
    named = value["json_schema"]
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise wrong("needs a json_schema object with a schema")
    if unknown := set(named) - {"name", "description", "schema", "strict"}:
        raise wrong(f"has the unknown keys {sorted(unknown)} in json_schema")
    return json.dumps(named["schema"])


class NamedSchema(TypedDict):
    schema: dict[str, Any]
    name: NotRequired[str]
    description: NotRequired[str]
    strict: NotRequired[bool | None]


class ResponseFormat(TypedDict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NotRequired[NamedSchema]


JsonSchema = Annotated[
    str | None, PlainValidator(_schema_of, json_schema_input_type=ResponseFormat | None)
]
