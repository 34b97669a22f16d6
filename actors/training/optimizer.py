"""The optimizer that a user's trainer has for a trunk: its updates happen at the owners.

Gradients of the trunk are in this process, as always. Those of experts are on hosts, and
`PoolGradient`s in their stand-ins say so. `step` hands over the former, and what was done to the
latter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cluster.training.clipping import clip_coefficient
from ...cluster.training.orders import GroupUpdate
from ...kernels.backward.accumulators import sum_of_squares
from ...kernels.training.update_rules import UpdateRule
from ...models.training.groups import (
    TrainedTensors,
    expert_group,
    parameter_groups,
    trained_tensors,
    trunk_group,
)
from ...models.training.pool_gradient import PoolGradient, Recorded
from ...models.training.stand_ins import StandIn
from ...models.training.trainable_trunk import trainable_trunk_of
from ...models.training.trunk_watch import TrunkWatch
from ...proto.errors import BadExpert, BadInput, StepLost
from .training_run import TrainingRun
from .wrapped import check_not_wrapped, check_one_process

log = logging.getLogger(__name__)

# Keys of a parameter group that are no hyperparameters: schedulers' and people's.
_BESIDE = {"params", "param_names", "initial_lr", "name"}
_NAMES = 5  # how many an error lists


class PoolOptimizer(torch.optim.Optimizer):
    """An optimizer of `torch.optim` over a trunk's parameters and the experts in its pool.

    ``params`` are as `torch.optim` takes them; None is all that require gradients. Experts are in
    them through their stand-ins, so groups by name, freezing, schedules, `clip_grad_norm_`,
    accumulation and GradScaler work as for the model in one process. ``max_grad_norm`` clips in
    `step`; ``grad_norm`` is the norm that the last step found. Gradients that are not finite raise
    BadExpert and change nothing, or with ``not_finite="skip"`` are dropped with a warning.

    ``open_run`` is called once with what is trained. Errors of a step that cannot be finished are
    StepLost: its gradients are gone, and it is done again from its first forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        open_run: Callable[[TrainedTensors, UpdateRule], TrainingRun],
        *,
        optimizer: str = "AdamW",
        params: Iterable[Any] | None = None,
        max_grad_norm: float | None = None,
        not_finite: Literal["stop", "skip"] = "stop",
        **hyperparameters: object,
    ) -> None:
        """Take a model that is a `TrainableTrunk`. Raises BadInput for what cannot be trained."""
        check_one_process()
        check_not_wrapped(model)
        if not_finite not in ("stop", "skip"):
            raise BadInput(f'not_finite: {not_finite!r}: it must be "stop" or "skip"')
        clip_coefficient({}, max_grad_norm)
        self.rule = UpdateRule(optimizer, **hyperparameters)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        self._model = model
        self._not_finite = not_finite
        self._run: TrainingRun | None = None
        self._hooks: list[Any] = []
        self._attempt: object = object()  # for whom stand-ins have gradients
        self._learned: set[int] = set()  # layers whose gradients were added up in the attempt
        self._asked = False  # for the norm: nothing can be added up any more
        self._restores = 0
        self._closed = False
        self._saved: tuple[dict[str, int], str] | None = None
        self._opened = trainable_trunk_of(model)
        self._stand_ins = self._opened.stand_ins
        super().__init__(parameter_groups(model, params), self.rule.values({}))
        for index, group in enumerate(self.param_groups):
            self._check_settings(index, group)
        self.trained = trained_tensors(model, self._stand_ins, self.param_groups)
        self._of_layer = {
            layer: tuple(one for one in self._stand_ins.layers[layer] if one.name in names)
            for layer, names in self.trained.experts.items()
        }
        standing = {id(one.parameter) for one in self._stand_ins}
        self._trunk = {
            name: one for name, one in model.named_parameters() if id(one) not in standing
        }
        self._opened.claim(self._save)
        try:
            self._run = open_run(self.trained, self.rule)
            self._run.listen(self._on_learned)
            self._watch = TrunkWatch(model, standing)
            base = getattr(model, "base_model", model)
            for one in {id(one): one for one in (model, base)}.values():
                self._hooks.append(one.register_forward_pre_hook(self._before_forward))
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> TrainingRun:
        """The run that it is over. Raises BadInput after `close`."""
        if self._run is None:
            raise BadInput("the PoolOptimizer is closed; make a new one to train on")
        return self._run

    def close(self) -> None:
        """End the run; the trunk can have another optimizer then. It may be called again."""
        run, self._run = self._run, None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._closed:
            self._closed = True
            self._clear()
            self._opened.release()
        if run is not None:
            run.close()

    # --- what trainers call -----------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients, and drop them; return what ``closure`` returns.

        Layers whose stand-ins have no gradient are not updated, nor are parameters without one.
        Without any gradient it does nothing. Raises BadExpert, StepLost and BadInput, which change
        no weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        run = self.run
        self._check_unchanged()
        layers, trunk = self._layers_with_gradients(), self._trunk_gradients()
        if not layers and not trunk:
            self._drop_added()
            return loss
        factors = self._factors(layers)
        with self._lost():
            squares = self._squares()
        experts = {
            one.target: {one.name: squares[one.layer, one.name]}
            for layer in layers
            for one in self._of_layer[layer]
        }
        found = {name: {"": sum_of_squares(one)} for name, one in trunk.items()}
        if bad := self._names_not_finite(experts, found, factors):
            return self._not_applied(bad, loss)
        scaled = {
            one.target: {one.name: squares[one.layer, one.name] * self._factor(one, factors) ** 2}
            for layer in layers
            for one in self._of_layer[layer]
        }
        norm, coefficient, _ = clip_coefficient(scaled | found, self.max_grad_norm)
        updates: dict[int, GroupUpdate] = {}
        for index, group in enumerate(self.param_groups):
            settings = self.rule.values(self._settings(group))
            own = expert_group(index)
            updates[own] = GroupUpdate(factors.get(own, 1.0) * coefficient, settings)
            updates[trunk_group(index)] = GroupUpdate(coefficient, settings)
        skipped = frozenset(self._of_layer.keys() - layers)
        with self._lost():
            run.commit(updates, trunk, skipped)
        self._watch.record()
        self.grad_norm = norm
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also what hosts have added up."""
        if not set_to_none:
            raise BadInput(
                "zero_grad(set_to_none=False): experts' gradients are on their hosts, and can be "
                "dropped but not set to zero; call zero_grad()"
            )
        super().zero_grad(set_to_none=True)
        self._drop_added()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "trained"):
            raise BadInput(
                "add_param_group: owners were told at the start what they train; give all groups "
                "to PoolOptimizer(params=...). Groups for later can have lr=0 until then"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters, and which run, step and checkpoint the state is to be found in.

        The state itself is on its owners. ``checkpoint`` is the folder that `save_pretrained` has
        written after this step, or None.
        """
        found = super().state_dict()
        where = self._where()
        checkpoint = self._saved[1] if self._saved and self._saved[0] == where else None
        return found | {"pool": {**where, "checkpoint": checkpoint}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Go back to a state: experts, owners and trunk, from its checkpoint if they are not in it.

        Raises BadInput for the state of another optimizer or other groups, and for one that is
        neither that of now nor has a checkpoint.
        """
        pool = state_dict.get("pool")
        if not isinstance(pool, dict):
            raise BadInput(
                "load_state_dict: the state is not that of a PoolOptimizer; begin with a new one, "
                "or resume from a checkpoint that was written while one was used"
            )
        sizes, own = (
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if sizes != own:
            raise BadInput(
                f"load_state_dict: its groups have {sizes} parameters, and those of this optimizer "
                f"{own}; make it with the same params"
            )
        where = {name: pool.get(name) for name in self._where()}
        checkpoint = pool.get("checkpoint")
        # accelerate loads what it has just read. If the trunk was changed and there is no checkpoint
        # of now, the next forward pass says so.
        if where != self._where() or (checkpoint is not None and self._watch.changed()):
            self._restore(where, checkpoint)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "pool"})

    # --- gradients --------------------------------------------------------------------------------

    def _on_learned(self, layer: int) -> None:
        """Give the stand-ins of a layer their gradients, if they have none of this attempt yet."""
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
            with self._lost():
                found = self._squares()
            if (one.layer, one.name) not in found:
                raise BadInput(
                    f"{one.target} requires gradients, and the optimizer does not train it: hosts "
                    "know no norm of it; freeze it with requires_grad_(False), or give it in params"
                )
            return found[one.layer, one.name]

        return Recorded(one.target, attempt, square)

    def _is_current(self, one: StandIn) -> bool:
        """Return whether a stand-in has a gradient. Raises BadInput for one of another origin."""
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
        return self.run.squares()

    def _before_forward(self, module: nn.Module, _: object) -> None:
        check_not_wrapped(module)
        self._check_unchanged()
        if not torch.is_grad_enabled():
            return
        standing = [one for one in self._stand_ins if one.parameter.requires_grad]
        have = {one.layer for one in standing if self._is_current(one)}
        if not have and (standing or not self._trunk_gradients()):
            self._drop_added()
            return
        if gone := {one.layer for one in standing if one.layer in self._learned} - have:
            raise BadInput(
                f"the gradients of layers {sorted(gone)} were dropped, and those of {sorted(have)} "
                "were not; a step goes on with all or with none: call zero_grad() of the optimizer"
            )
        scaled = [one for one in standing if self._is_current(one) and _factor_of(one) != 1.0]
        if self._asked or scaled:
            what = "multiplied" if scaled else "asked for their norm"
            raise BadInput(
                f"forward pass: the gradients of this step were {what} already, so no more can be "
                "added to them; call step(), or zero_grad() if the step was skipped, first"
            )

    def _layers_with_gradients(self) -> set[int]:
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

    def _trunk_gradients(self) -> dict[str, Tensor]:
        found = {}
        own = {id(one) for group in self.param_groups for one in group["params"]}
        for name, parameter in self._trunk.items():
            grad = parameter.grad
            if grad is None or id(parameter) not in own:
                continue
            if name not in self.trained.trunk:
                raise BadInput(
                    f"{name} did not require gradients when the PoolOptimizer was made, so nobody "
                    "keeps its state; make a new optimizer after changing what is trained"
                )
            if grad.layout is not torch.strided:
                raise BadInput(
                    f"the gradient of {name} is sparse, and owners take dense ones; make the "
                    "embedding with sparse=False"
                )
            found[name] = grad
        return found

    def _factor(self, one: StandIn, factors: Mapping[int, float]) -> float:
        return factors[self.trained.experts[one.layer][one.name]]

    def _factors(self, layers: Iterable[int]) -> dict[int, float]:
        """Return by which factor the experts' gradients of each group were multiplied."""
        found: dict[int, tuple[float, str]] = {}
        for layer in sorted(layers):
            for one in self._of_layer[layer]:
                group = self.trained.experts[layer][one.name]
                factor, target = found.setdefault(group, (_factor_of(one), one.target))
                if factor != _factor_of(one):
                    raise BadInput(
                        f"the gradient of {target} was multiplied by {factor}, that of "
                        f"{one.target} by {_factor_of(one)}; within a parameter group all must be "
                        "multiplied by the same: clip them together, or put them into groups of "
                        "their own"
                    )
        return {group: factor for group, (factor, _) in found.items()}

    def _names_not_finite(
        self,
        experts: Mapping[str, Mapping[str, float]],
        trunk: Mapping[str, Mapping[str, float]],
        factors: Mapping[int, float],
    ) -> list[str]:
        bad = {
            target
            for target, squares in (experts | trunk).items()
            if not all(math.isfinite(one) for one in squares.values())
        }
        if bad & experts.keys():
            return [*self.run.not_finite(), *sorted(bad & trunk.keys())]
        if not bad and not all(math.isfinite(one) for one in factors.values()):
            return ["the factor by which experts' gradients were multiplied"]
        return sorted(bad)

    def _not_applied(self, bad: Sequence[str], loss: Any) -> Any:
        more = f" and {len(bad) - _NAMES} more" if len(bad) > _NAMES else ""
        what = f"step {self.run.step + 1}: gradients are not finite: {', '.join(bad[:_NAMES])}{more}"
        if self._not_finite == "stop":
            raise BadExpert(
                f"{what}. Nothing was changed. Call zero_grad() and go on with other data, lower "
                'the learning rate, or choose not_finite="skip"'
            )
        log.warning("%s. They are dropped, and the step is skipped.", what)
        self.grad_norm = math.nan
        self._clear()
        self._drop_added()
        return loss

    def _drop_added(self) -> None:
        """Drop what hosts have added up, if stand-ins have no gradients any more."""
        if self._asked or self._learned or self.run.has_gradients:
            self.run.drop()
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        self._attempt = object()
        self._learned.clear()
        self._asked = False

    def _clear(self) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                one.grad = None
        for one in self._stand_ins:
            one.parameter.grad = None

    def _forget(self) -> None:
        self._clear()
        self._begin_attempt()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """Forget the gradients of a step that is lost."""
        try:
            yield
        except StepLost:
            self._forget()
            raise

    # --- checks, and what is kept outside ---------------------------------------------------------

    def _settings(self, group: Mapping[str, Any]) -> dict[str, object]:
        return {
            name: value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
            for name, value in group.items()
            if name not in _BESIDE and name in self.defaults
        }

    def _check_settings(self, index: int, group: Mapping[str, Any]) -> None:
        for name in group.keys() - self.defaults.keys() - _BESIDE:
            raise BadInput(
                f"params[{index}]: {name}: optimizer {self.rule.name} has no such hyperparameter; "
                f"there are {', '.join(self.defaults)}"
            )
        try:
            self.rule.values(self._settings(group))
        except BadInput as error:
            raise BadInput(f"params[{index}]: {error}") from error

    def _check_unchanged(self) -> None:
        if changed := sorted(self._watch.changed()):
            raise BadInput(
                f"{', '.join(changed[:_NAMES])}: changed outside of the PoolOptimizer, as by "
                "load_state_dict, another optimizer, or in place. The experts and the owners' "
                "copies were not, and the next step would undo it. To go back to a checkpoint, "
                "call load_state_dict of the PoolOptimizer with its state; to train other weights, "
                "close it, bring them into the pool, and make a new one"
            )

    def _where(self) -> dict[str, int]:
        """Return what tells the states of this process apart, and mostly those of others."""
        return {"run": self.run.run, "step": self.run.step, "restores": self._restores}

    def _save(self, folder: Path, max_shard_size: int | str | None) -> None:
        self._check_unchanged()
        self.run.save(folder, max_shard_size=max_shard_size)
        self._saved = (self._where(), str(folder.absolute()))

    def _restore(self, where: Mapping[str, object], checkpoint: object) -> None:
        if not isinstance(checkpoint, str):
            self._refuse(where)
        self._forget()
        self.run.restore(Path(checkpoint))
        self._restores += 1
        self._watch.record()
        self._saved = (self._where(), checkpoint)

    def _refuse(self, where: Mapping[str, object]) -> NoReturn:
        raise BadInput(
            f"load_state_dict: the state is that of run {where['run']} after step {where['step']}, "
            f"and this is run {self.run.run} after step {self.run.step}; no checkpoint was written "
            "with it, so its experts and its optimizer's state are nowhere. Call "
            "model.save_pretrained(folder) before state_dict(), as Trainer does"
        )


def _factor_of(one: StandIn) -> float:
    grad = one.parameter.grad
    return grad.recorded.factor if isinstance(grad, PoolGradient) else 1.0
