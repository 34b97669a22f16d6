"""Specs of one model, what a preflight finds in them, and what tests take from the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.actors.preflight.findings import Finding
from moesaic.actors.preflight.preflight import preflight
from moesaic.cluster.spec.spec import Spec, parse_spec
from tests.helpers.models.model_folders import edit

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"


def spec_of(folder: Path | str, **more: Any) -> Spec:
    model = {"name": "m", "path": str(folder), **more.pop("model", {})}
    free = {"endpoint": {"port": 0}, "monitoring": {"port": 0}}
    return parse_spec({"name": "a", "models": [model], **free, **more})


def found(spec: Spec) -> list[tuple[str, str]]:
    return [(one.severity, one.path) for one in preflight(spec).findings]


def only(spec: Spec) -> Finding:
    (one,) = preflight(spec).findings
    return one


def remove(*names: str) -> Callable[[Path], Any]:
    return lambda folder: [(folder / name).unlink() for name in names]


def without(tensor: str) -> Callable[[Path], Any]:
    return edit(f"^{re.escape(tensor)}$", lambda _: None)
