"""The size of a key-value cache, as configurations say it, and as models make it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from moesaic.models.trunk.describe import cache_sizes
from tests.helpers.models.architectures import ARCHITECTURES, tiny_model

TOKENS = 6
# The tiny configurations have keys of other architectures, or names that are not known.
LARGER = {"dots1", "glm4_moe", "inkling2_text", "inkling_text", "mimo_v2_flash", "zaya"}


def cached_bytes(name: str) -> int | None:
    """What transformers' cache has of one token; None if it has no such cache."""
    model: Any = tiny_model(name)
    if model.config.is_encoder_decoder:
        return None
    out = model(torch.arange(TOKENS)[None], use_cache=True)
    layers = getattr(out.past_key_values, "layers", [])
    found = [
        t for one in layers for t in (getattr(one, "keys", None), getattr(one, "values", None))
    ]
    tensors = [t for t in found if isinstance(t, torch.Tensor) and t.numel()]
    return sum(t.nbytes for t in tensors) // TOKENS if tensors else None


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_cache_has_the_size_that_is_said_or_more(name: str) -> None:
    said, _ = cache_sizes(tiny_model(name).config, torch.float32)
    cached = cached_bytes(name)
    if cached is not None:
        assert said < cached if name in LARGER else said == cached


def test_a_configuration_without_names_that_are_known() -> None:
    assert cache_sizes(PretrainedConfig(), torch.float32) == (0, 0)
