"""The endpoint's OpenAPI document, out of the very classes that check requests and word answers.

Bodies are read and parsed by `ingress.py` itself, so FastAPI does not know them; they are added
here. Hints that are ignored and parameters that are refused are no part of the document.
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
    """``openapi_extra`` of a path that takes ``request`` and answers whole, or in a stream of
    ``chunk``."""
    # Of one event: before OpenAPI 3.2 there is no word for a schema of the whole stream.
    events = {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "string",
                "description": f"the JSON of a {chunk.__name__} or, of the last event, of an "
                f"{ErrorResponse.__name__}; or `[DONE]`",
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
    """Every answer that is none."""
    return {
        status: {"description": "See `error.message`", "content": _json(ErrorResponse)}
        for status in ("4XX", "5XX")
    }


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


def document(app: FastAPI) -> None:
    """Let ``/openapi.json`` of ``app`` tell of bodies and answers, too."""
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
            # As they are read: how answers leave out what is None is not for a schema.
            _, ours = models_json_schema(
                [(one, "validation") for one in _BODIES], ref_template=_REF
            )
            schemas.update(ours["$defs"])
            # FastAPI's own form of errors, which no answer here has.
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
        return found

    app.openapi = openapi
