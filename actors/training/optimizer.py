"""The optimizer that a user's trainer has for a trunk: its updates happen at the owners.

Gradients of the trunk are in this process, as always. Those of experts are on hosts, and
`PoolGradient`s in their stand-ins say so. `step` hands over the former, and what was done to the
latter.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...cluster.training.clipping import clip_coefficient
from ...cluster.training.orders import GroupUpdate
from ...kernels.training.update_rules import UpdateRule
from ...models.training.groups import (
    TrainedTensors,
    expert_group,
    parameter_groups,
    trained_tensors,
    trunk_group,
)
from ...models.training.trainable_trunk import trainable_trunk_of
from ...models.training.trunk_watch import TrunkWatch
from ...proto.errors import BadExpert, BadInput, StepLost
from .expert_gradients import ExpertGradients
from .training_run import Saving, TrainingRun
from .wrapped import check_not_wrapped

log = logging.getLogger(__name__)

# Keys of a parameter group that are no hyperparameters: schedulers' and people's.
_BESIDE = {"params", "param_names", "initial_lr", "name"}
_NAMES = 5  # how many an error lists
_IF_NOT_FINITE = (
    "Call zero_grad() and go on with other data, lower the learning rate, or choose "
    'not_finite="skip"'
)


class _Saved(NamedTuple):
    """The last checkpoint."""

    where: dict[str, int]  # as `_where` was
    folder: str
    saving: Saving | None = None  # None: it was read

    def failed(self) -> bool:
        saving = self.saving
        return saving is not None and saving.done() and saving.exception() is not None


class RunOptimizer(torch.optim.Optimizer):
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
        check_not_wrapped(model)
        if not_finite not in ("stop", "skip"):
            raise BadInput(f'not_finite: {not_finite!r}: it must be "stop" or "skip"')
        clip_coefficient({}, max_grad_norm)
        self.rule = UpdateRule(optimizer, **hyperparameters)
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        # Called in `step` with the norm of all gradients, before they are applied.
        self.decided: Callable[[float], None] = lambda _: None
        self.if_not_finite = _IF_NOT_FINITE  # what the error says about it
        self._model = model
        self._not_finite = not_finite
        self._run: TrainingRun | None = None
        self._hooks: list[Any] = []
        self._restores = 0
        self._closed = False
        self._saved: _Saved | None = None
        self._opened = trainable_trunk_of(model)
        self._stand_ins = self._opened.stand_ins
        super().__init__(parameter_groups(model, params), self.rule.values({}))
        for index, group in enumerate(self.param_groups):
            self._check_settings(index, group)
        self.trained = trained_tensors(model, self._stand_ins, self.param_groups)
        standing = {id(one.parameter) for one in self._stand_ins}
        self._trunk = {
            name: one for name, one in model.named_parameters() if id(one) not in standing
        }
        self._opened.claim(self._save)
        try:
            self._run = open_run(self.trained, self.rule)
            self._experts = ExpertGradients(self._run, self._stand_ins, self.trained, self._clear)
            self._watch = TrunkWatch(model, standing)
            # Others may have taken a checkpoint over while this one waited for the next attempt.
            self._run.follow_weights(self._watch.record)
            base = getattr(model, "base_model", model)
            for one in {id(one): one for one in (model, base)}.values():
                self._hooks.append(one.register_forward_pre_hook(self._before_forward))
        except BaseException:
            self.close()
            raise

    @property
    def run(self) -> TrainingRun:
        """The run that it is over. Raises BadInput after `close`."""
        return self._check_open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run; the trunk can have another optimizer then. It may be called again.

        The pool goes on to serve the weights of the last step. The optimizer's state is gone; to
        keep it, save the model before.
        """
        run, self._run = self._run, None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if not self._closed:
            self._closed = True
            for one in self._stand_ins:
                one.parameter.grad = None
            self._opened.release()
        if run is not None:
            run.close()

    # --- what trainers call -----------------------------------------------------------------------

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], Any] | None = None, *, weight: float = 1.0
    ) -> Any:
        """Apply the gradients, and drop them; return what ``closure`` returns.

        Layers whose stand-ins have no gradient are not updated, nor are parameters without one.
        Without any gradient it does nothing. With several workers all of them call it; what is
        applied is the sum of their gradients, divided by the sum of their weights. So the default
        is their mean, and losses that are sums over tokens want the number of these tokens. Raises
        BadExpert, StepLost and BadInput, which change no weights.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        run = self.run
        self._check_unchanged()
        if not (math.isfinite(weight) and weight >= 0):
            raise BadInput(f"weight: {weight}: it must be finite and not negative")
        layers, trunk = self._experts.layers(), self._trunk_gradients()
        if run.workers == 1 and not layers and not trunk:
            self._experts.drop()
            return loss
        try:
            factors = self._experts.factors(layers)
            experts = self._experts.squares(factors)
            sums = run.give_trunk(trunk, weight)
            if not (experts or sums.squares):
                self._experts.drop()
                return loss
            if not sums.weight:
                raise BadInput("no worker has a weight above 0, and so the step has no mean")
            if bad := self._names_not_finite(experts, sums.squares):
                return self._not_applied(bad, loss)
            squares = {name: square / sums.weight**2 for name, square in sums.squares.items()}
            squares |= {
                name: square * (factor / sums.weight) ** 2
                for name, (square, factor) in experts.items()
            }
            norm, clip, _ = clip_coefficient({"": squares}, self.max_grad_norm)
            updates = self._updates(factors, clip / sums.weight) if layers or trunk else None
            self.decided(norm)
            run.commit(updates, self._experts.without(layers))
        except StepLost:
            self._clear()
            raise
        self._watch.record()
        self.grad_norm = norm
        self._clear()
        return loss

    def _updates(self, factors: Mapping[int, float], coefficient: float) -> dict[int, GroupUpdate]:
        updates: dict[int, GroupUpdate] = {}
        for index, group in enumerate(self.param_groups):
            settings = self.rule.values(self._settings(group))
            own = expert_group(index)
            updates[own] = GroupUpdate(factors.get(own, 1.0) * coefficient, settings)
            updates[trunk_group(index)] = GroupUpdate(coefficient, settings)
        return updates

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also what hosts have added up."""
        self._check_open()
        if not set_to_none:
            raise BadInput(
                "zero_grad(set_to_none=False): experts' gradients are on their hosts, and can be "
                "dropped but not set to zero; call zero_grad()"
            )
        super().zero_grad(set_to_none=True)
        self._experts.drop()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "trained"):
            raise BadInput(
                "add_param_group: owners were told at the start what they train; give all groups "
                "to PoolOptimizer(params=...). Groups for later can have lr=0 until then"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters, and which run, step and checkpoint the state is to be found in.

        The state itself is on its owners. ``checkpoint`` is the folder that `save_pretrained` or
        `save` has written after this step, or is writing; otherwise None.
        """
        found = super().state_dict()
        where = self._where()
        saved = self._saved
        checkpoint = saved.folder if saved and saved.where == where and not saved.failed() else None
        return found | {"pool": {**where, "checkpoint": checkpoint}}

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        max_shard_size: int | str | None = None,
        wait: bool = True,
    ) -> Saving:
        """Write a training checkpoint of the last step: the whole model, and all state.

        `save_pretrained` of the model does the same. Without ``wait`` the checkpoint is written
        beside the next step, whose commit waits for it; ``result(timeout)`` of what is returned
        says when all of it is on the disk. The folder may exist, and other files in it stay.
        Raises CheckpointError if it cannot be written (without ``wait``, ``result`` does), and
        UnsupportedModel for a model that cannot be exported.
        """
        self._check_unchanged()
        target = Path(folder)
        saving = self.run.save(target, max_shard_size=max_shard_size, wait=wait)
        self._saved = _Saved(self._where(), str(target.absolute()), saving)
        return saving

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go back to a training checkpoint: experts, owners' state, and the trunk.

        ``run.step`` is the step after which it was written. Hyperparameters stay what they are; a
        loop that changes them sets those of that step. All workers call it, with the same folder.
        It also brings a run back whose state is lost with its hosts (StateLost). Raises
        CheckpointError, with the pool as it was, and ClusterError.
        """
        self._restore({}, str(Path(folder).absolute()))

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
        # accelerate loads what it has just read. If the trunk was changed and there is no
        # checkpoint of now, the next forward pass says so.
        changed = checkpoint is not None and self._watch.changed()
        if where != self._where() or changed or self.run.is_broken:
            self._restore(where, checkpoint)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "pool"})

    # --- gradients --------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, _: object) -> None:
        check_not_wrapped(module)
        self._check_unchanged()
        if torch.is_grad_enabled():
            self._experts.before_forward(trunk_has_some=bool(self._trunk_gradients()))

    def _trunk_gradients(self) -> dict[str, Tensor]:
        found = {}
        own = {id(one) for group in self.param_groups for one in group["params"]}
        for name, parameter in self._trunk.items():
            grad = parameter.grad
            if grad is None or id(parameter) not in own:
                continue
            if name not in self.trained.trunk:
                raise BadInput(
                    f"{name} did not require gradients when the PoolOptimizer was made, so it has "
                    "no owner; make a new optimizer after changing what is trained"
                )
            if grad.layout is not torch.strided:
                raise BadInput(
                    f"the gradient of {name} is sparse, and owners take dense ones; make the "
                    "embedding with sparse=False"
                )
            found[name] = grad
        return found

    def _names_not_finite(
        self, experts: Mapping[str, tuple[float, float]], trunk: Mapping[str, float]
    ) -> list[str]:
        bad_trunk = [name for name, square in trunk.items() if not math.isfinite(square)]
        if not all(math.isfinite(square) for square, _ in experts.values()):
            return [*self.run.not_finite(), *bad_trunk]
        if not bad_trunk and not all(math.isfinite(factor) for _, factor in experts.values()):
            return ["the factor by which experts' gradients were multiplied"]
        return bad_trunk

    def _not_applied(self, bad: Sequence[str], loss: Any) -> Any:
        more = f" and {len(bad) - _NAMES} more" if len(bad) > _NAMES else ""
        names = f"{', '.join(bad[:_NAMES])}{more}"
        what = f"step {self.run.step + 1}: gradients are not finite: {names}"
        if self._not_finite == "stop":
            raise BadExpert(f"{what}. Nothing was changed. {self.if_not_finite}")
        log.warning("%s. They are dropped, and the step is skipped.", what)
        self.grad_norm = math.nan
        self._experts.drop()
        self._clear()
        return loss

    def _clear(self) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                one.grad = None
        self._experts.clear()

    # --- checks, and what is kept outside ---------------------------------------------------------

    def _check_open(self) -> TrainingRun:
        if self._run is None:
            raise BadInput("the PoolOptimizer is closed; make a new one to train on")
        return self._run

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
        self.save(folder, max_shard_size=max_shard_size)

    def _restore(self, where: Mapping[str, object], checkpoint: object) -> None:
        if not isinstance(checkpoint, str):
            self._refuse(where)
        self._clear()
        self.run.restore(Path(checkpoint))
        self._restores += 1
        self._watch.record()
        self._saved = _Saved(self._where(), checkpoint)

    def _refuse(self, where: Mapping[str, object]) -> NoReturn:
        raise BadInput(
            f"load_state_dict: the state is that of run {where['run']} after step {where['step']}, "
            f"and this is run {self.run.run} after step {self.run.step}; no checkpoint was written "
            "with it, so its experts and its optimizer's state are nowhere. Call "
            "model.save_pretrained(folder) before state_dict(), as Trainer does"
        )
