"""Write the spec, key by key, as a page of Markdown: `moesaic spec docs` makes docs/spec.md."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .spec import Spec

_HEAD = """\
# The spec

A cluster is described by one YAML file. It is checked as a whole before anything starts: unknown
keys and impossible values are errors that name the key's path. `moesaic spec check FILE` checks a
file as `up` would, and `moesaic spec schema` prints the JSON schema for editors. This page is
generated from the code by `moesaic spec docs`.
"""
_TAIL = """\
## From the environment

An environment variable can override any key. Its name is `MOESAIC__` and the key's path, with `__`
between keys; in a list, the entry's number counts from 0. Values are YAML and are checked like the
file's; a name that fits no key is an error.

```sh
MOESAIC__ENDPOINT__PORT=9000 MOESAIC__HOSTS__0__COUNT=4 moesaic spec check deploy/local.yaml
```

A variable can also set a whole part, such as `MOESAIC__BALANCE='{redundancy: 1}'`.
"""
_BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "length >= {}",
    "maxLength": "length <= {}",
}


def spec_page() -> str:
    """Return the whole page."""
    return "\n".join([_HEAD, *key_tables(Spec), _TAIL])


def key_tables(spec: type[BaseModel]) -> list[str]:
    """Return a section with a table for each part of a spec, the whole first."""
    schema = spec.model_json_schema()
    parts = [_part(spec, "", schema, schema["$defs"])]
    return parts + [
        _part(model, path, schema["$defs"][model.__name__], schema["$defs"])
        for path, model in _below(spec, "")
    ]


def _below(model: type[BaseModel], path: str) -> list[tuple[str, type[BaseModel]]]:
    """Return (path, model) of all parts of a model, each before its own parts."""
    found = []
    for name, field in model.model_fields.items():
        inner, many = _model_in(field.annotation)
        if inner is not None:
            here = f"{path}{name}{'[]' if many else ''}"
            found += [(here, inner), *_below(inner, f"{here}.")]
    return found


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the model inside an annotation, and whether the annotation is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in get_args(annotation):
        found, many = _model_in(inner)
        if found is not None:
            return found, many or get_origin(annotation) is tuple
    return None, False


def _part(model: type[BaseModel], path: str, schema: dict[str, Any], parts: dict[str, Any]) -> str:
    lines = [f"## `{path}`" if path else "## The keys", ""]
    lines += [schema["description"], ""]
    lines += ["| key | type | default | bounds | meaning |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        said = schema["properties"][name]
        default = "needed" if field.is_required() else _default(field)
        cells = [f"`{name}`", _type(said, parts), default, _bounds(said), said["description"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is not None and _model_in(field.annotation)[0] is not None:
        return "see below" if value else "none"
    return "`" + yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0] + "`"


def _type(said: dict[str, Any], parts: dict[str, Any]) -> str:
    if "$ref" in said:
        return "mapping"
    if "anyOf" in said:
        return " or ".join(_type(one, parts) for one in said["anyOf"])
    if "enum" in said or "const" in said:
        return ", ".join(f"`{one}`" for one in said.get("enum", [said.get("const")]))
    match said.get("type"):
        case None:
            return "number or string"  # whatever its own validator takes
        case "array":
            return f"list of {_type(said['items'], parts)}s"
        case "object":
            values = said.get("additionalProperties")
            return "mapping" + (f" to {_type(values, parts)}s" if isinstance(values, dict) else "")
        case kind:
            return str(kind)


def _bounds(said: dict[str, Any]) -> str:
    found = [words.format(said[key]) for key, words in _BOUNDS.items() if key in said]
    if "pattern" in said:
        found.append(f"`{said['pattern']}`")
    for one in (*said.get("anyOf", ()), *([said["items"]] if "items" in said else ())):
        if "$ref" not in one and (inner := _bounds(one)):
            found.append(inner)
    return ", ".join(found)
