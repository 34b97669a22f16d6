"""The names of experts, layers, and versions of experts' weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Used instead of an expert's number for the tensors that all experts of a layer share.
SHARED = (1 << 32) - 1
# Used instead of a layer's number for the parameters of a model's trunk.
TRUNK = (1 << 32) - 1
# What a model's experts are when the model is added.
FIRST_VERSION = 1


class ExpertKey(NamedTuple):
    model: str
    layer: int
    expert: int

    def __str__(self) -> str:
        if self.layer == TRUNK:
            return f"block {self.expert} of the trunk of {self.model}"
        if self.expert == SHARED:
            return f"shared tensors of layer {self.layer} of {self.model}"
        return f"expert {self.expert} of layer {self.layer} of {self.model}"


class LayerKey(NamedTuple):
    model: str
    layer: int

    def expert(self, expert: int) -> ExpertKey:
        return ExpertKey(self.model, self.layer, expert)


class ExpertVersion(NamedTuple):
    """One version of one expert's weights."""

    key: ExpertKey
    version: int

    def __str__(self) -> str:
        first = self.version == FIRST_VERSION
        return str(self.key) if first else f"version {self.version} of {self.key}"


def trunk_block(model: str, block: int) -> ExpertKey:
    """Return the key of some of a trunk's parameters, which are trained together."""
    return ExpertKey(model, TRUNK, block)


def is_shared(key: ExpertKey) -> bool:
    """Return whether a key is that of what all experts of a layer share."""
    return key.expert == SHARED and key.layer != TRUNK


def first_versions(keys: Iterable[ExpertKey]) -> list[ExpertVersion]:
    return [ExpertVersion(key, FIRST_VERSION) for key in keys]
