"""What a run decides by what its workers bring."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ....cluster.training.orders import GroupUpdate
from ....cluster.training.steps import Squares
from ....proto.errors import BadInput, CallError
from .coordination import ExpertSums


def expert_sums(found: Squares) -> ExpertSums:
    """Return what workers hear of the experts' gradients."""
    squares: dict[tuple[int, str], list[float]] = {}
    for key, named in found.items():
        for name, square in named.items():
            squares.setdefault((key.layer, name), []).append(square)
    return ExpertSums(
        squares={at: math.fsum(all_of_them) for at, all_of_them in squares.items()},
        not_finite=tuple(
            f"{name} of {key}"
            for key, named in found.items()
            for name, square in named.items()
            if not math.isfinite(square)
        ),
    )


def agreed(
    brought: Mapping[str, Mapping[int, GroupUpdate] | None],
) -> Mapping[int, GroupUpdate]:
    """Return how all workers want to update their groups.

    Workers that bring None go along with the others. Raises BadInput if these disagree.
    """
    said = {name: groups for name, groups in brought.items() if groups is not None}
    if not said:
        raise CallError("commit: no worker has gradients, so none says how to apply them")
    first = next(iter(said))
    for index, group in said[first].items():
        if not (math.isfinite(group.coefficient) and group.coefficient >= 0):
            raise BadInput(
                f"group {index}: its gradients cannot be multiplied by {group.coefficient}"
            )
    for name, groups in said.items():
        if groups != said[first]:
            raise BadInput(
                f"the workers disagree about the step: {first} has {said[first]}, and {name} has "
                f"{groups}; give all of them the same schedule, and clip by max_grad_norm"
            )
    return said[first]
