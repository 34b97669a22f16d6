"""The endpoint's OpenAPI document, made from the classes that check requests and format answers.

`ingress.py` reads and parses bodies itself, so FastAPI does not know their schemas; they are added
here. Hints that are ignored and parameters that are refused are not in the document.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .requests import ChatRequest, CompletionRequest
from .responses import ChatChunk, ChatCompletion, Completion, ErrorResponse

_REF = "#/components/schemas/{model}"
_BODIES = (CompletionRequest, ChatRequest, Completion, ChatCompletion, ChatChunk, ErrorResponse)


def generation(
    request: type[BaseModel], answer: type[BaseModel], chunk: type[BaseModel]
) -> dict[str, Any]:
    """Return the ``openapi_extra`` of a path that generates text.

    It takes ``request`` and answers with ``answer``, or with a stream of ``chunk``.
    """
    # The schema of one event: before OpenAPI 3.2 a whole stream cannot be described.
    events = {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "string",
                "description": f"The JSON of a {chunk.__name__}. The last event is `[DONE]`, or "
                f"the JSON of an {ErrorResponse.__name__}.",
            }
        },
    }
    return {
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {
            "200": {
                "description": "The answer; events with `stream: true`",
                "content": {**_json(answer), "text/event-stream": {"schema": events}},
            },
            **errors(),
        },
    }


def errors() -> dict[str, Any]:
    """Return the descriptions of all error responses."""
    return {
        status: {"description": "See `error.message`", "content": _json(ErrorResponse)}
        for status in ("4XX", "5XX")
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def document(app: FastAPI) -> None:
    """Make ``/openapi.json`` of ``app`` include bodies and answers."""
    found: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not found:
            found.update(
                get_openapi(
                    title="Moesaic",
                    version=version("moesaic"),
                    description="The OpenAI API over a pool of experts.",
                    routes=app.routes,
                )
            )
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            _, ours = models_json_schema(
                [(one, "validation") for one in _BODIES], ref_template=_REF
            )
            schemas.update(ours["$defs"])
            # FastAPI's own error format, which this service never sends.
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
        return found

    app.openapi = openapi
