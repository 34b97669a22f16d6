"""A trunk that is open for training: what a trainer sees of it, before it has an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ...proto.errors import BadInput
from ..trunk.experts_layers import ExpertsLayer
from .stand_ins import StandIns
from .whole_saves import WholeSaves

_ATTRIBUTE = "trainable_trunk"


class TrainableTrunk:
    """Stand-ins in a trunk, and saves that never lack the experts; `close` undoes both.

    ``layers`` are those of the same model with its experts' parameters, as of the meta model;
    ``dtype`` is the experts'. `trainable_trunk_of` finds it by its model. Raises BadInput if the
    model is open already.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Iterable[ExpertsLayer], dtype: torch.dtype
    ) -> None:
        self.model = model
        self.stand_ins = StandIns(model, layers, dtype)
        self._saves = WholeSaves(model)
        self._claimed = False
        setattr(model, _ATTRIBUTE, self)

    def claim(self, save: Callable[[Path, int | str | None], None]) -> None:
        """Take the trunk for an optimizer, whose run saves it. Raises BadInput if one has it."""
        if self._claimed:
            raise BadInput(
                "model: another PoolOptimizer trains it; close() that one first. Parameters with "
                "other hyperparameters go into groups of one optimizer"
            )
        self._claimed = True
        self._saves.save = save

    def release(self) -> None:
        self._claimed = False
        self._saves.save = None

    def close(self) -> None:
        self._saves.close()
        self.stand_ins.close()
        vars(self.model).pop(_ATTRIBUTE, None)


def trainable_trunk_of(model: nn.Module) -> TrainableTrunk:
    """Return what a trunk was opened as. Raises BadInput if it is not open for training."""
    found = vars(model).get(_ATTRIBUTE)
    if not isinstance(found, TrainableTrunk):
        raise BadInput(
            f"model: {type(model).__name__}: it is not open for training; give the model that the "
            "cluster has opened for it"
        )
    return found
