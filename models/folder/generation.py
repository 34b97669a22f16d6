"""The generation configuration of a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ...proto.errors import CheckpointError, describe_error
from .files import is_whole

_FILE = "generation_config.json"
# Transformers raises these for a file that is not JSON, or has impossible values.
_CANNOT_READ = (OSError, ValueError, TypeError, AttributeError, LookupError, RuntimeError)


def generation_config(path: Path) -> GenerationConfig:
    """Read the generation configuration of folder ``path``, as transformers does.

    Older models have its fields in config.json. Raises CheckpointError for an unusable file.
    """
    if not is_whole(path / _FILE):
        return GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True
        )
    try:
        found = GenerationConfig.from_pretrained(path)
    except _CANNOT_READ as error:
        words = " ".join(describe_error(error).split())[:400].rstrip(".")
        raise CheckpointError(
            f"{path}/{_FILE}: cannot be read: {words}; correct the file, or remove it"
        ) from error
    ends: Any = found.eos_token_id
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise CheckpointError(
                f"{path}/{_FILE}: eos_token_id: {ends!r} is neither a token's number nor a list of "
                "such numbers"
            )
    return found
