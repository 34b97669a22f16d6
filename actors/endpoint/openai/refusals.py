"""Refuse a wrong request with the path of its first wrong field, and the value found there."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from ....proto.errors import RequestError

_MISFIT = "misfit"


def misfit(field: str, why: str, value: Any) -> PydanticCustomError:
    """Return the error that a validator raises for a field below the validator's own path.

    A model's validator names one of its fields; a field's validator a part of its value
    (``[1].type``).
    """
    return PydanticCustomError(_MISFIT, "{why}", {"why": why, "field": field, "value": value})


def refused(error: ValidationError) -> RequestError:
    """Turn pydantic's list of errors into one clear message about the first wrong field."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        # pydantic also lists names of union members and validators, which the request lacks.
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() or not path:
            path = _below(path, step)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown parameter {path!r}", param=path)
    if first["type"] == "missing":
        return RequestError(f"missing parameter {path!r}", param=path)
    said, value = first["msg"][:1].lower() + first["msg"][1:], first["input"]
    if first["type"] == _MISFIT:
        context = first.get("ctx", {})
        path, said, value = _below(path, context["field"]), context["why"], context["value"]
    return RequestError(f"{path}: {said} (got {short(value)})", param=path)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _below(path: str, field: str) -> str:
    dot = "." if path and field and not field.startswith("[") else ""
    return f"{path}{dot}{field}"
