"""Parameter groups of an optimizer: their form, and which tensors of the pool are in which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...proto.errors import BadInput
from .stand_ins import StandIns


def expert_group(index: int) -> int:
    """Return the owners' number of the experts in the parameter group with this index.

    The trunk has other numbers: a trainer multiplies its gradients in place, those of experts later
    on their owners.
    """
    return 2 * index


def trunk_group(index: int) -> int:
    return 2 * index + 1


@dataclass(frozen=True, slots=True)
class TrainedTensors:
    """The owners' group of each tensor that is trained."""

    experts: Mapping[int, Mapping[str, int]]  # layer -> name in the pool -> group
    trunk: Mapping[str, int]  # name of the parameter -> group


def parameter_groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Return groups as `torch.optim` has them, from any form that it takes.

    These are an iterable of parameters, of (name, parameter), or of dicts with "params" and
    hyperparameters. None stands for all parameters that require gradients. Raises BadInput for
    tensors that are not the model's parameters.
    """
    if params is None:
        params = [one for one in model.parameters() if one.requires_grad]
        if not params:
            raise BadInput(
                "params: no parameter of the model requires gradients; call "
                "model.requires_grad_(True), or that of the modules that are to be trained"
            )
    if isinstance(params, Tensor):
        raise BadInput("params: one tensor; give a list of the model's parameters")
    given = list(params)
    if not given:
        raise BadInput("params: []: give the model's parameters, or leave it out to train all")
    if not isinstance(given[0], dict):
        given = [{"params": given}]
    known = {id(one) for one in model.parameters()}
    groups = []
    for index, group in enumerate(given):
        if not isinstance(group, dict) or "params" not in group:
            raise BadInput(
                f'params[{index}]: {type(group).__name__}: it must be a dict with "params"'
            )
        found = group["params"]
        found = [found] if isinstance(found, Tensor) else list(found)
        for place, one in enumerate(found):
            _check(f"params[{index}]: number {place}", one, known)
        groups.append({**group, "params": found})
    return groups


def _check(where: str, given: object, known: set[int]) -> None:
    name = ""
    if isinstance(given, tuple) and len(given) == 2:
        name, given = f", {given[0]}", given[1]
    if not isinstance(given, Tensor):
        raise BadInput(f"{where}{name}: {type(given).__name__}: it must be a parameter")
    if id(given) in known:
        return
    if not given.is_leaf:
        raise BadInput(
            f"{where}{name}: it is the result of a computation; give the model's parameters"
        )
    raise BadInput(
        f"{where}{name}: a tensor of shape {tuple(given.shape)} that is no parameter of the model; "
        "PoolOptimizer trains the parameters of its model alone: take them from "
        "model.named_parameters() after the model was opened"
    )


def trained_tensors(
    model: nn.Module, stand_ins: StandIns, groups: Sequence[Mapping[str, Any]]
) -> TrainedTensors:
    """Return what is in the groups and requires gradients."""
    index_of = {id(one): index for index, group in enumerate(groups) for one in group["params"]}
    experts: dict[int, dict[str, int]] = {}
    for one in stand_ins:
        if id(one.parameter) in index_of and one.parameter.requires_grad:
            group = expert_group(index_of[id(one.parameter)])
            experts.setdefault(one.layer, {})[one.name] = group
    standing = {id(one.parameter) for one in stand_ins}
    trunk = {
        name: trunk_group(index_of[id(one)])
        for name, one in model.named_parameters()
        if one.requires_grad and id(one) in index_of and id(one) not in standing
    }
    if not experts and not trunk:
        raise BadInput("params: none of them requires gradients, so nothing would be trained")
    return TrainedTensors(experts, trunk)
