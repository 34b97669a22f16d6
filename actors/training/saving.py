"""Checkpoints of a training run: from its owners to a folder, and back.

The folder is that of `models/export/`. Masters are written for 16-bit weights alone; weights of the
wide type are their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...cluster.expert_keys import SHARED, TRUNK, ExpertKey, is_shared
from ...cluster.spec.text import bytes_of
from ...cluster.training.run_plan import Trained
from ...models.export.plan import ExportPlan
from ...models.export.training_checkpoint import TrainingCheckpoint
from ...models.export.write_checkpoint import write_checkpoint
from ...models.trunk.trunk import load_trunk
from ...proto.errors import BadInput, CheckpointError
from ...proto.wire import wide

# (kind, key) -> its tensors after the last commit, valid inside the block
ReadTensors = Callable[
    [Literal["weights", "state"], ExpertKey], AbstractContextManager[Mapping[str, Tensor]]
]

_MASTER = ".master"
# The expert whose state in a checkpoint has that of what all experts of its layer share, too.
_WITH_SHARED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What is saved of a run, and where it is read."""

    model: str
    trunk: PreTrainedModel
    trained: Mapping[ExpertKey, Trained]
    blocks: Mapping[ExpertKey, Sequence[str]]  # names of the trunk's parameters
    read: ReadTensors

    def write(self, folder: Path, plan: ExportPlan, *, step: int, about: Mapping[str, Any]) -> None:
        """Write a checkpoint; nothing may be committed meanwhile. Raises CheckpointError."""
        write_checkpoint(
            folder,
            plan,
            self.trunk,
            lambda layer: self._experts(plan, layer, "weights"),
            step=step,
            run=about,
            state=lambda layer: self._experts(plan, layer, "state"),
            trunk_state=self._trunk_state(),
            source=Path(self.trunk.name_or_path) if self.trunk.name_or_path else None,
            into=True,
        )

    def _experts(
        self, plan: ExportPlan, layer: int, kind: Literal["weights", "state"]
    ) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        for expert in range(plan.layers[layer].num_experts):
            key = ExpertKey(self.model, layer, expert)
            if kind == "weights":
                with self.read("weights", key) as tensors:
                    yield expert, tensors
                continue
            keys = [key, key._replace(expert=SHARED)] if expert == _WITH_SHARED else [key]
            with ExitStack() as stack:
                state: dict[str, Tensor] = {}
                for own in keys:
                    if own in self.trained and self.trained[own].groups:
                        tensors = stack.enter_context(self.read("state", own))
                        state |= _stored(tensors, plan.dtype)
                yield expert, state

    def _trunk_state(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.trunk.named_parameters())
        for key, names in self.blocks.items():
            with self.read("state", key) as tensors:
                for name in names:
                    mine = {k: t for k, t in tensors.items() if k.rpartition(".")[0] == name}
                    yield from _stored(mine, parameters[name].dtype).items()


def _stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: t for k, t in state.items() if not (dtype == wide(dtype) and k.endswith(_MASTER))}


class LoadedRun:
    """A checkpoint as the owners of a run take it."""

    def __init__(self, checkpoint: TrainingCheckpoint, saved: SavedRun) -> None:
        """Check it whole. Raises CheckpointError if it is damaged, or of another model."""
        self._checkpoint = checkpoint
        self._saved = saved
        checkpoint.check()
        experts = {ExpertKey(saved.model, *place) for place in checkpoint.experts}
        trained = {key for key in saved.trained if key.layer != TRUNK and not is_shared(key)}
        if other := trained - experts:
            raise CheckpointError(
                f"{checkpoint.path}: it has no {min(other)}; it is a checkpoint of another model"
            )
        trunk = saved.trunk
        loaded = load_trunk(checkpoint.path, dtype=trunk.dtype, device=torch.device("cpu"))
        self.parameters: dict[str, Tensor] = dict(loaded.named_parameters())
        self._trunk_state: dict[str, Tensor] = dict(checkpoint.trunk_state())
        for name, parameter in trunk.named_parameters():
            found = self.parameters.get(name)
            if found is not None and found.shape != parameter.shape:
                sizes = f"{tuple(found.shape)}, and {tuple(parameter.shape)} in the trunk"
                raise CheckpointError(
                    f"{checkpoint.path}: {name} is {sizes}; it is a checkpoint of another model"
                )

    def check_frozen(self) -> None:
        """Check that experts' tensors that are not trained are as in the checkpoint.

        Raises CheckpointError.
        """
        saved = self._saved
        for layer, expert in self._checkpoint.experts:
            key = ExpertKey(saved.model, layer, expert)
            stored = self._checkpoint.weights(layer, expert)
            shared = key._replace(expert=SHARED)
            trained = {
                name
                for own in (key, shared)
                if own in saved.trained
                for name in saved.trained[own].groups
            }
            if stored.keys() <= trained:
                continue
            with saved.read("weights", key) as served:
                for name in stored.keys() - trained:
                    if not torch.equal(stored[name], served[name]):
                        raise CheckpointError(
                            f"{self._checkpoint.path}: {name} of {key} is not trained by this run, "
                            "and is another one in the pool; let the cluster serve the "
                            "checkpoint's folder to go on from it"
                        )

    def copy_frozen(self) -> None:
        """Give the trunk the parameters and buffers that no owner has."""
        owned = {name for names in self._saved.blocks.values() for name in names}
        with torch.no_grad():
            for name, parameter in self._saved.trunk.named_parameters():
                if name in self.parameters and name not in owned:
                    parameter.copy_(self.parameters[name])

    def state(self, key: ExpertKey) -> dict[str, Tensor]:
        """Return the state of a key, as an owner takes it. Raises CheckpointError."""
        names = self._saved.trained[key].groups
        if key.layer == TRUNK:
            weights, stored = self.parameters, self._trunk_state
        else:
            expert = _WITH_SHARED if is_shared(key) else key.expert
            weights = self._checkpoint.weights(key.layer, expert)
            stored = self._checkpoint.state(key.layer, expert)
        found = {k: t for k, t in stored.items() if k.rpartition(".")[0] in names}
        for name in names:
            if not any(kind.rpartition(".")[0] == name for kind in found):
                raise CheckpointError(
                    f"{self._checkpoint.path}: it has no optimizer's state of {name} of {key}, "
                    "which its run did not train"
                )
            if name + _MASTER not in found:
                found[name + _MASTER] = weights[name].detach()
        return found


def shard_bytes(size: int | str) -> int:
    """Return what `save_pretrained` means by a shard's size. Raises BadInput."""
    try:
        return size if isinstance(size, int) else bytes_of(size)
    except ValueError as error:
        raise BadInput(f"max_shard_size: {error}") from error
