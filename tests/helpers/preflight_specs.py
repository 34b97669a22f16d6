"""Specs of one model, what a preflight finds in them, and what tests take from the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from moesaic.actors.preflight.findings import Finding
from moesaic.actors.preflight.preflight import preflight
from moesaic.cluster.spec.spec import Spec, parse_spec

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
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[tensor]
        save_file(tensors, file, metadata={"format": "pt"})

    return change
