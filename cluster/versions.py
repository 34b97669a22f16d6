"""Versions of experts' weights: a number names their content, and is never used for another.

Version 1 is what the model was added with. Each change of a model's weights has the next number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .expert_keys import FIRST_VERSION, ExpertKey, ExpertVersion, LayerKey

# Versions of one expert that a host can hold.
VERSIONS_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class LayerVersions:
    """The version of each expert of one layer."""

    most: int  # of the experts that are not in `others`
    others: Mapping[int, int] = field(default_factory=dict)

    def of(self, expert: int) -> int:
        return self.others.get(expert, self.most)

    def others_of(self, ids: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return (expert, version) of the experts in ``ids`` that have another version."""
        if not self.others:
            return ()
        return tuple((e, v) for e in np.unique(ids).tolist() if (v := self.others.get(e)))


@dataclass(frozen=True)
class WeightVersions:
    """The version of each expert's weights that is served.

    A training step changes all experts of a model, so that one number stands for them; an update
    of some experts names each.
    """

    models: Mapping[str, int] = field(default_factory=dict)  # 1 if a model is not there
    experts: Mapping[ExpertKey, int] = field(default_factory=dict)  # where it is another one

    def of(self, key: ExpertKey) -> int:
        found = self.experts.get(key)
        return self.models.get(key.model, FIRST_VERSION) if found is None else found

    def served(self, key: ExpertKey) -> ExpertVersion:
        return ExpertVersion(key, self.of(key))

    def layer(self, key: LayerKey) -> LayerVersions:
        return LayerVersions(self.models.get(key.model, FIRST_VERSION), self._others.get(key, {}))

    def updated(self, experts: Mapping[ExpertKey, int]) -> WeightVersions:
        """Return these versions, with others of some experts."""
        merged = {**self.experts, **experts}
        return WeightVersions(
            self.models,
            {k: v for k, v in merged.items() if v != self.models.get(k.model, FIRST_VERSION)},
        )

    def only(self, model: str) -> WeightVersions:
        """Return the versions of one model's experts."""
        return WeightVersions(
            {name: version for name, version in self.models.items() if name == model},
            {key: version for key, version in self.experts.items() if key.model == model},
        )

    def without(self, model: str) -> WeightVersions:
        """Return the versions of all other models' experts."""
        return WeightVersions(
            {name: version for name, version in self.models.items() if name != model},
            {key: version for key, version in self.experts.items() if key.model != model},
        )

    def trained(self, model: str, version: int) -> WeightVersions:
        """Return these versions, with one number for all experts of a model."""
        others = {k: v for k, v in self.experts.items() if k.model != model}
        return WeightVersions({**self.models, model: version}, others)

    @cached_property
    def _others(self) -> dict[LayerKey, dict[int, int]]:
        found: dict[LayerKey, dict[int, int]] = {}
        for key, version in self.experts.items():
            found.setdefault(LayerKey(key.model, key.layer), {})[key.expert] = version
        return found
