"""The gradients of experts in one attempt at a step, as a trainer sees them: by their stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from ...models.training.groups import TrainedTensors
from ...models.training.pool_gradient import PoolGradient, Recorded
from ...models.training.stand_ins import StandIn, StandIns
from ...proto.errors import BadInput, StepLost
from .training_run import TrainingRun

_NO_NORM = (
    "{} workers compute this step, and the gradients of the trunk that are here are one worker's; "
    "clip_grad_norm_ would take them for those of all. Clip with PoolOptimizer(max_grad_norm=...), "
    "which sees the norm of the whole step; `grad_norm` of the optimizer tells it after step()"
)


class ExpertGradients:
    """Gives stand-ins their gradients, and tells what became of them.

    A stand-in has one from the first backward pass of its layer on. That it is gone, after a
    `zero_grad` of any kind, is noticed at the next forward pass (`before_forward`) or at the step.
    """

    def __init__(
        self,
        run: TrainingRun,
        stand_ins: StandIns,
        trained: TrainedTensors,
        clear_all: Callable[[], None],
    ) -> None:
        """Listen to a run. ``clear_all`` is called when gradients are lost with their step."""
        self._run = run
        self._clear_all = clear_all
        self._stand_ins = stand_ins
        self._group_of = trained.experts
        self._of_layer = {
            layer: tuple(one for one in stand_ins.layers[layer] if one.name in names)
            for layer, names in trained.experts.items()
        }
        self._attempt: object = object()  # what gradients of now are known by
        self._learned: set[int] = set()  # layers whose gradients were added up in the attempt
        self._asked = False  # for the norm: nothing can be added any more
        run.listen(self._on_learned)

    def clear(self) -> None:
        """Take the gradients from all stand-ins, and begin another attempt here."""
        for one in self._stand_ins:
            one.parameter.grad = None
        self._begin()

    def drop(self) -> None:
        """Let hosts forget what they have added up, if that is anything."""
        if self._has_some or not self._run.is_open:
            self._run.drop()
        self._begin()

    @property
    def _has_some(self) -> bool:
        return self._asked or bool(self._learned) or self._run.has_gradients

    def _drop_unasked(self) -> None:
        """Do what `drop` does. Raises StepLost if that changes this worker's part of the step."""
        run = self._run
        before = run.step, run.number, run.workers
        if self._has_some:
            run.drop()
        self._begin()
        if (run.step, run.number, run.workers) != before:
            raise StepLost(
                f"{run.workers} workers take part from now on, and this is number {run.number} of "
                "them; call zero_grad(), and compute this worker's part of the step anew"
            )

    def before_forward(self, *, trunk_has_some: bool) -> None:
        """Notice dropped gradients. Raises BadInput if none can be added to those that there are.

        If no expert is trained, they were dropped if the trunk has none.
        """
        standing = [one for one in self._stand_ins if one.parameter.requires_grad]
        have = {one.layer for one in standing if self._is_current(one)}
        if not have and (standing or not trunk_has_some):
            self._drop_unasked()
            return
        if gone := {one.layer for one in standing if one.layer in self._learned} - have:
            raise BadInput(
                f"the gradients of layers {sorted(gone)} were dropped, and those of {sorted(have)} "
                "were not; a step goes on with all or with none: call zero_grad() of the optimizer"
            )
        scaled = any(self._is_current(one) and _factor(one) != 1.0 for one in standing)
        if self._asked or scaled:
            what = "multiplied" if scaled else "asked for their norm"
            raise BadInput(
                f"forward pass: the gradients of this step were {what} already, so no more can be "
                "added to them; call step(), or zero_grad() if the step was skipped, first"
            )

    def layers(self) -> set[int]:
        """Return the layers that have gradients now. Raises BadInput if a part of one has."""
        found = set()
        for layer, stand_ins in self._of_layer.items():
            have = [one for one in stand_ins if self._is_current(one)]
            if have and len(have) < len(stand_ins):
                lacking = next(one.target for one in stand_ins if one not in have)
                raise BadInput(
                    f"{have[0].target} has a gradient and {lacking} has none; the tensors of a "
                    "layer's experts are updated together. To train only some of them, freeze the "
                    "others before the PoolOptimizer is made"
                )
            if have:
                found.add(layer)
        return found

    def without(self, layers: set[int]) -> frozenset[int]:
        """Return all other layers whose experts are trained."""
        return frozenset(self._of_layer.keys() - layers)

    def squares(self, factors: Mapping[int, float]) -> dict[str, tuple[float, float]]:
        """Return (sum of squares, factor) of each gradient that some worker has, by parameter.

        The sum is that before the multiplication by `factors` of its group. It ends the collection
        of gradients.
        """
        squares = self._squares()
        return {
            one.target: (
                squares[one.layer, one.name],
                factors.get(self._group_of[layer][one.name], 1.0),
            )
            for layer in sorted({layer for layer, _ in squares})
            for one in self._of_layer[layer]
        }

    def factors(self, layers: Iterable[int]) -> dict[int, float]:
        """Return by what the gradients of each group were multiplied.

        Raises BadInput if it is not one number for a group.
        """
        found: dict[int, tuple[float, str]] = {}
        for layer in sorted(layers):
            for one in self._of_layer[layer]:
                own = _factor(one)
                factor, target = found.setdefault(
                    self._group_of[layer][one.name], (own, one.target)
                )
                if own != factor and not math.isnan(own + factor):
                    raise BadInput(
                        f"the gradient of {target} was multiplied by {factor}, that of "
                        f"{one.target} by {own}; within a parameter group all must be multiplied "
                        "by the same: clip them together, or put them into groups of their own"
                    )
        return {group: factor for group, (factor, _) in found.items()}

    def _begin(self) -> None:
        self._attempt = object()
        self._learned.clear()
        self._asked = False

    def _on_learned(self, layer: int) -> None:
        for one in self._stand_ins.layers.get(layer, ()):
            if not one.parameter.requires_grad or self._is_current(one):
                continue
            if layer in self._learned:
                raise BadInput(
                    f"the gradients of {one.target} were dropped between two backward passes of "
                    "one step; call zero_grad() before the first forward pass of a step"
                )
            PoolGradient.of(one.parameter, self._recorded(one))
        self._learned.add(layer)

    def _recorded(self, one: StandIn) -> Recorded:
        attempt = self._attempt

        def square() -> float:
            if self._attempt is not attempt:
                raise BadInput(f"the gradient of {one.target} belongs to a step that is over")
            found = self._squares()
            if (one.layer, one.name) not in found:
                raise BadInput(
                    f"{one.target} requires gradients, and the optimizer does not train it: hosts "
                    "know no norm of it; freeze it with requires_grad_(False), or give it in params"
                )
            return found[one.layer, one.name]

        no_norm = _NO_NORM.format(self._run.workers) if self._run.workers > 1 else ""
        return Recorded(one.target, attempt, square, no_norm=no_norm)

    def _is_current(self, one: StandIn) -> bool:
        """Return whether it has a gradient of now. Raises BadInput for one that is not ours."""
        grad = one.parameter.grad
        if grad is None:
            return False
        if not isinstance(grad, PoolGradient):
            raise BadInput(
                f"the gradient of {one.target} was replaced by a tensor; that of experts is on "
                "their hosts, and can only be multiplied by a number, or dropped by zero_grad()"
            )
        return grad.recorded.attempt is self._attempt

    def _squares(self) -> Mapping[tuple[int, str], float]:
        self._asked = True
        try:
            return self._run.squares()
        except StepLost:
            self._clear_all()
            raise


def _factor(one: StandIn) -> float:
    grad = one.parameter.grad
    return grad.recorded.factor if isinstance(grad, PoolGradient) else 1.0
