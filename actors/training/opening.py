"""What a run trains, from what an optimizer has in its groups."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ...cluster.expert_keys import ExpertKey, trunk_block
from ...cluster.training.run_plan import RunPlan, Trained
from ...kernels.training.update_rules import UpdateRule
from ...models.training.groups import TrainedTensors
from ...models.training.trunk_blocks import trunk_blocks
from ...models.trunk.experts_layers import ExpertsLayer, expert_shapes
from ...proto.wire import wide
from .run import LearningTrunk


def plan_run(
    run: int,
    model: str,
    trunk: LearningTrunk,
    layers: Iterable[ExpertsLayer],
    trained: TrainedTensors,
    rule: UpdateRule,
    *,
    redundancy: int,
    exact: bool,
) -> RunPlan:
    """Return the plan of a run that trains ``trained``, under keys of ``model``.

    ``layers`` are those of the trunk's model with its experts' parameters.
    """
    wide_bytes = wide(trunk.learning.dtype).itemsize
    tensors: dict[ExpertKey, Trained] = {}
    for layer in layers:
        groups = trained.experts.get(layer.layer)
        if groups:
            shapes = expert_shapes(layer)
            nbytes = sum(math.prod(shapes[name]) * wide_bytes for name in groups)
            for expert in range(layer.num_experts):
                tensors[ExpertKey(model, layer.layer, expert)] = Trained(
                    groups=groups, nbytes=nbytes
                )
    parameters = dict(trunk.model.named_parameters())
    for number, groups in enumerate(trunk_blocks(trunk.model, trained.trunk)):
        nbytes = sum(
            parameters[name].numel() * wide(parameters[name].dtype).itemsize for name in groups
        )
        tensors[trunk_block(model, number)] = Trained(groups=groups, nbytes=nbytes)
    return RunPlan(
        run=run,
        model=model,
        optimizer=rule.name,
        settings=rule.values({}),
        tensors=tensors,
        redundancy=redundancy,
        exact=exact,
    )
