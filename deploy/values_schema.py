"""Puts the spec's JSON schema into that of the chart's values (`make spec`).

Then Helm refuses, before it installs anything, what `moesaic spec check` would refuse key by key.
What pods need (Ray's address, where things listen) is in the chart's own part of the schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesaic.cluster.spec.spec import Spec

SCHEMA = Path(__file__).with_name("chart") / "values.schema.json"


def spec_definitions() -> dict[str, Any]:
    """Return the definitions of the spec's parts, and of the whole as `Spec`, without texts."""
    schema = Spec.model_json_schema()
    parts = schema.pop("$defs")
    return {name: _bare(part) for name, part in sorted({**parts, "Spec": schema}.items())}


def with_spec(schema: dict[str, Any]) -> str:
    """Return the values' schema as text, with the spec's definitions of today."""
    return json.dumps({**schema, "$defs": spec_definitions()}, indent=1) + "\n"


def _bare(part: dict[str, Any]) -> dict[str, Any]:
    texts = {"title", "description", "default"}
    found: dict[str, Any] = {}
    for key, value in part.items():
        if key in ("properties", "patternProperties"):
            found[key] = {name: _bare(one) for name, one in value.items()}
        elif isinstance(value, dict):
            found[key] = _bare(value)
        elif isinstance(value, list):
            found[key] = [_bare(one) if isinstance(one, dict) else one for one in value]
        elif key not in texts:
            found[key] = value
    return {key: value for key, value in found.items() if key not in texts}


if __name__ == "__main__":
    SCHEMA.write_text(with_spec(json.loads(SCHEMA.read_text())))
