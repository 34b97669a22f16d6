"""Checks objects of custom resources as Kubernetes' API server would: defaults first, then the
schema, and no field that it would drop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def read_schema(crds: Path, name: str) -> dict[str, Any]:
    """The schema of the version that is stored; ``name`` is that of its file."""
    crd = yaml.safe_load((crds / f"{name}.yaml").read_text())
    (version,) = (one for one in crd["spec"]["versions"] if one["storage"])
    assert version["name"] == "v1"
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """Unknown fields become errors, where the server would drop them without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if isinstance(schema.get("properties"), dict):
        found["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        keeps = schema.get("x-kubernetes-preserve-unknown-fields")
        # A branch of anyOf repeats a part of what stands beside it.
        if not keeps and schema.get("type") == "object" and "additionalProperties" not in schema:
            found["additionalProperties"] = False
    return found


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        found = dict(value)
        for key, part in schema.get("properties", {}).items():
            if key not in found and "default" in part:
                found[key] = copy.deepcopy(part["default"])
        rest = schema.get("additionalProperties")
        for key, one in found.items():
            part = schema.get("properties", {}).get(key, rest)
            if isinstance(part, dict):
                found[key] = with_defaults(one, part)
        return found
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [with_defaults(one, schema["items"]) for one in value]
    return value


def check(value: dict[str, Any], schema: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    # metadata is of every kind, and its schema is not in the CRD.
    rest = {key: one for key, one in value.items() if key != "metadata"}
    schema = {**schema, "required": [k for k in schema.get("required", []) if k != "metadata"]}
    jsonschema.Draft202012Validator(schema).validate(with_defaults(rest, schema))
