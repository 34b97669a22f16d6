"""The configuration of a model's folder, read by transformers or by an extension's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    PretrainedConfig,
)

from ...proto.errors import CheckpointError, UnsupportedModel, describe_error
from ..folder.files import is_whole
from ..folder.quantised import FIELDS, quantisation_of
from . import extensions

# Transformers raises these for values of which it cannot build a model.
CANNOT_BUILD = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


def short(value: Any) -> str:
    many = isinstance(value, list) and len(value) > 8
    return f"[{', '.join(map(repr, value[:3]))}, ...]" if many else repr(value)


def read_config(path: Path) -> PretrainedConfig:
    """Read the configuration of a model folder.

    Raises CheckpointError if it is missing or unreadable, and UnsupportedModel for an unknown
    quantisation and for an architecture whose package is missing or broken.
    """
    if not is_whole(path / "config.json"):
        raise CheckpointError(f"{path}: {_what_without_config(path)}")
    try:
        config = _config_of_extension(path)
        if config is None:
            # Code in the model's folder is never run, and transformers does not ask the user.
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (*CANNOT_BUILD, OSError, StrictDataclassError) as error:
        text = " ".join((str(error) or describe_error(error)).split())
        raise CheckpointError(f"{path}/config.json: {text}") from error
    quantisation_of(config, path)
    return config


def _what_without_config(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return (
            "holds an adapter (adapter_config.json) instead of a model; merge it into its base "
            "model and give the folder of the result"
        )
    if gguf := sorted(file.name for file in path.glob("*.gguf")):
        return f"no config.json; {gguf[0]} is a GGUF file, which only `moesaic upcycle` reads"
    return "no config.json; give the folder of a Hugging Face model"


def _config_of_extension(path: Path) -> PretrainedConfig | None:
    """Return the configuration of a model that an extension brings; None for any other."""
    try:
        values: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"not a valid JSON file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"holds {short(values)} instead of an object with model_type and the model's other "
            "fields"
        )
    for field in FIELDS:
        if values.get(field) is not None and not isinstance(values[field], dict):
            raise ValueError(f"{field}: {short(values[field])} is not a mapping")
    architectures = values.get("architectures") or [None]
    if not isinstance(architectures, list):
        raise ValueError(f"architectures: {short(architectures)} is not a list")
    found = extensions.find_class(str(architectures[0])) or extensions.find(
        str(values.get("model_type"))
    )
    return config_from_dict(values | {"model_type": found.model_type}) if found else None


def config_from_dict(values: dict[str, Any]) -> PretrainedConfig:
    """Make the configuration that ``PretrainedConfig.to_dict`` described.

    Raises UnsupportedModel without a model_type, and where its package is missing or broken.
    """
    rest = dict(values)
    model_type = rest.pop("model_type", None)
    if not model_type:
        raise UnsupportedModel("model_type: missing from the model's configuration")
    extensions.find(model_type)
    return AutoConfig.for_model(model_type, **rest)


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that a spec calls ``name``."""
    return getattr(torch, name)
