"""What a chat request says of tools, and of the form of its answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from .http_sampling import Strict

MAX_TOOLS = 128


class Function(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    # Calls are not forced into the parameters' schema.
    strict: Literal[False] | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude={"function": {"strict"}}, exclude_none=True)


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionCall(Strict):
    name: str
    arguments: str


class Call(Strict):
    """A call that the model made earlier, as clients send it back."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def for_template(self) -> dict[str, Any]:
        """Arguments stay the text that they are: templates differ in what they take."""
        return self.model_dump()


def _schema_of(value: Any) -> str | None:
    """``response_format`` as a JSON schema in JSON; None: any text."""

    def wrong(why: str) -> PydanticCustomError:
        return PydanticCustomError("response_format", "{why}", {"why": why})

    if not isinstance(value, dict):
        raise wrong("must be an object with a type")
    kind = value.get("type")
    wanted = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema"):
        raise wrong(f"has the type {kind!r}; there are text, json_object and json_schema")
    if set(value) != wanted:
        raise wrong(f"of type {kind} has the keys {sorted(wanted)}, and no others")
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
