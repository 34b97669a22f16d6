"""The tensors that one process owns in training: their masters, their state, and their updates.

Every trained tensor has one owner. A training step goes through it in two phases. `prepare` takes
the summed gradients, which changes nothing. When all owners are prepared, the run decides once for
all, and `commit` applies the decision; `abandon` drops what was prepared.

Keys are any hashable values, such as those of experts; each has tensors by name.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...proto.errors import BadExpert, BadInput, InternalError, NotHere, describe_error
from ..backward.accumulators import sum_of_squares
from ..ffn import wide_dtype
from .update_rules import OwnerBytes, UpdateRule, state_of

K = TypeVar("K", bound=Hashable)

# What a group's gradients are multiplied by, and its hyperparameters of one step, such as lr.
GroupUpdate = tuple[float, Mapping[str, object]]

_MASTER, _COMMITS = "master", "commits"  # in a tensor's state, beside what its optimizer keeps


class Commit(NamedTuple):
    """A decision that was applied, by group."""

    attempt: Hashable
    groups: Mapping[int, GroupUpdate]


@dataclass(slots=True)
class _Owned:
    """One tensor. ``master`` has the wide type, and ``dtype`` is the model's."""

    master: Tensor
    dtype: torch.dtype
    group: int
    optimizer: torch.optim.Optimizer
    commits: int = 0  # that changed it

    def update(
        self,
        gradient: Tensor | None,
        coefficient: float,
        values: dict[str, object],
        scaled: _Scratch,
    ) -> None:
        """Apply a gradient, which stays as it is; None is a gradient of zero."""
        if gradient is None:
            gradient = scaled.like(self.master).zero_()
        elif coefficient != 1.0:
            gradient = torch.mul(gradient, coefficient, out=scaled.like(gradient))
        self.optimizer.param_groups[0].update(values)
        self.master.grad = gradient
        try:
            self.optimizer.step()
        finally:
            self.master.grad = None
        self.commits += 1


class _Scratch:
    """Memory for one tensor after another, during one commit."""

    def __init__(self) -> None:
        self._of: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this form, with any content; the one before is overwritten."""
        kind = tensor.dtype, tensor.device
        memory = self._of.get(kind)
        if memory is None or memory.numel() < tensor.numel():
            self._of[kind] = memory = torch.empty_like(tensor).flatten()
        return memory[: tensor.numel()].view(tensor.shape)


@dataclass(slots=True)
class _Prepared:
    gradients: dict[str, Tensor] | None  # None: of zero
    squared_norms: dict[str, float]  # of the tensors that the commit updates


class OwnedTensors(Generic[K]):
    """Masters and optimizers' state of the tensors that a process owns.

    A master is float32, or float64 for float64 weights. State is made in a tensor's first commit.
    Between commits neither changes, so they can be read, tensor by tensor, while the next step
    runs. Nothing here takes a lock: `prepare` and `commit` belong to one thread at a time.

    An update changes tensors in place, one after the other. If one fails, for example for want of
    memory, those before it have been changed, and it may be half changed. From then on every
    method raises InternalError: the owner is to be thrown away and made anew, from another
    process's copy or from a checkpoint. Everything that can be checked is checked before the
    first tensor is changed.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule = rule
        self.committed: Commit | None = None  # the last one
        self._tensors: dict[K, dict[str, _Owned]] = {}
        self._attempt: Hashable | None = None  # whose gradients are prepared
        self._prepared: dict[K, _Prepared] = {}
        self._broken = ""

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[K]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> OwnerBytes:
        """The memory in use: state from the first commit on, gradients while they are prepared."""
        owned = [one for tensors in self._tensors.values() for one in tensors.values()]
        gradients = [one.gradients or {} for one in self._prepared.values()]
        return OwnerBytes(
            sum(one.master.nbytes for one in owned),
            sum(tensor.nbytes for tensors in gradients for tensor in tensors.values()),
            sum(tensor.nbytes for one in owned for tensor in state_of(one.optimizer).values()),
        )

    @torch.inference_mode(False)
    def own(self, key: K, tensors: Mapping[str, Tensor], groups: Mapping[str, int]) -> None:
        """Become the owner of a key's tensors; ``groups`` has the group of each by name.

        Contiguous float32 and float64 tensors are not copied, unless they were made in inference
        mode: they become their own masters, and commits change them in place. Raises BadInput for
        tensors that cannot be trained.
        """
        self._check_new(key)
        if tensors.keys() != groups.keys():
            raise BadInput(f"{key}: tensors are {sorted(tensors)}, with groups {sorted(groups)}")
        made = {}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise BadInput(f"{name} of {key}: {tensor.dtype} cannot be trained")
            made[name] = self._owned(key, name, tensor, tensor.dtype, groups[name])
        self._tensors[key] = made

    def disown(self, key: K) -> None:
        """Forget a key's tensors, their state, and what is prepared of them."""
        self._check_owned(key)
        del self._tensors[key]
        self._prepared.pop(key, None)

    @torch.inference_mode(False)
    def prepare(
        self, attempt: Hashable, key: K, gradients: Mapping[str, Tensor] | None
    ) -> dict[str, float]:
        """Take the sum of a key's gradients; return the sum of squares of each tensor's.

        Gradients have the masters' shapes and types. They are the owner's from now on, and a commit
        changes them. A tensor that they lack keeps its weight and its state in this step. None is a
        gradient of zero for all: momentum and weight decay go on, and so does the count of steps.
        If a key is prepared for the attempt already, what is given now is dropped.

        A sum that is not finite makes its tensor unfit for a commit (`not_finite`). Raises NotHere
        for an attempt that was committed, or while another is prepared, and BadInput for gradients
        that do not fit.
        """
        self._check_owned(key)
        if self.committed is not None and attempt == self.committed.attempt:
            raise NotHere(f"{attempt} is committed: it takes no more gradients")
        if self._prepared and attempt != self._attempt:
            raise NotHere(f"{attempt}: {self._attempt} is prepared; abandon it first")
        if key not in self._prepared:
            found = None if gradients is None else self._fitting(key, gradients)
            squares = (
                dict.fromkeys(self._tensors[key], 0.0)
                if found is None
                else {name: sum_of_squares(gradient) for name, gradient in found.items()}
            )
            self._prepared[key] = _Prepared(found, squares)
            self._attempt = attempt
        return dict(self._prepared[key].squared_norms)

    def missing(self, attempt: Hashable) -> list[K]:
        """Return the keys that are not prepared for an attempt."""
        prepared = self._prepared if attempt == self._attempt else {}
        return [key for key in self._tensors if key not in prepared]

    def not_finite(self) -> list[tuple[K, str]]:
        """Return (key, name) of each prepared gradient whose sum of squares is not finite."""
        return [
            (key, name)
            for key, one in self._prepared.items()
            for name, square in one.squared_norms.items()
            if not math.isfinite(square)
        ]

    def abandon(self) -> None:
        """Drop what is prepared: nothing has changed."""
        self._prepared.clear()
        self._attempt = None

    @torch.inference_mode(False)
    def commit(self, attempt: Hashable, groups: Mapping[int, GroupUpdate]) -> None:
        """Update every owned tensor by its prepared gradient times its group's coefficient.

        Hyperparameters that a group does not name are the rule's. `weights` has the result. A
        commit that was applied last may be repeated, and does nothing. The following errors change
        nothing: NotHere if a key is not prepared for the attempt, BadExpert if a gradient is not
        finite, BadInput for a decision that cannot be applied, InternalError if the attempt was
        committed with another one.
        """
        self._check_whole()
        decision = Commit(
            attempt, {group: (factor, dict(values)) for group, (factor, values) in groups.items()}
        )
        if self.committed is not None and attempt == self.committed.attempt:
            if decision != self.committed:
                raise InternalError(f"{attempt} was committed as {self.committed}, not {decision}")
            return
        values = self._check_decision(decision)
        scaled = _Scratch()
        for key, tensors in self._tensors.items():
            prepared = self._prepared.pop(key)
            gradients = prepared.gradients or {}
            for name in prepared.squared_norms:
                owned = tensors[name]
                coefficient, _ = decision.groups[owned.group]
                try:
                    # Gradients are freed one by one.
                    owned.update(
                        gradients.pop(name, None), coefficient, values[owned.group], scaled
                    )
                except BaseException as error:
                    self.abandon()
                    self._broken = (
                        f"{attempt} was applied in part: {name} of {key}: {describe_error(error)}"
                    )
                    if isinstance(error, Exception):
                        raise InternalError(self._broken) from error
                    raise
        self.abandon()
        self.committed = decision

    def masters(self, key: K) -> dict[str, Tensor]:
        """Return a key's masters, which the next commit changes."""
        self._check_owned(key)
        return {name: one.master for name, one in self._tensors[key].items()}

    @torch.inference_mode(False)
    def weights(self, key: K) -> dict[str, Tensor]:
        """Return a key's weights in the model's type, each rounded once from its master.

        Those in the wide type are the masters themselves: the next commit changes them.
        """
        self._check_owned(key)
        return {name: one.master.to(one.dtype) for name, one in self._tensors[key].items()}

    def state(self, key: K) -> dict[str, Tensor]:
        """Return all that `restore` needs of a key: `NAME.master`, `NAME.commits`, `NAME.exp_avg`.

        What stands after the last point, besides the first two, depends on the optimizer. They are
        the owner's own tensors, which the next commit changes; ``commits`` tells whether one has.
        """
        self._check_owned(key)
        found: dict[str, Tensor] = {}
        for name, one in self._tensors[key].items():
            found[f"{name}.{_MASTER}"] = one.master
            found[f"{name}.{_COMMITS}"] = torch.tensor(one.commits)
            found |= {f"{name}.{kind}": kept for kind, kept in state_of(one.optimizer).items()}
        return found

    @torch.inference_mode(False)
    def restore(
        self,
        key: K,
        state: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        groups: Mapping[str, int],
    ) -> None:
        """Become the owner of a key's tensors from what `state` returned.

        ``dtypes`` has the model's type of each tensor by name, and ``groups`` its group. Masters
        and state are not copied if they are contiguous, and on the device where they are kept.
        Raises BadInput if something is missing, unknown, or has another shape or type.
        """
        self._check_new(key)
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in dtypes}
        for entry, tensor in state.items():
            name, _, kind = entry.rpartition(".")
            if name not in parts:
                raise BadInput(f"state of {key}: {entry} is of no tensor of it: {list(dtypes)}")
            parts[name][kind] = tensor
        self._tensors[key] = {
            name: self._restored(key, name, kept, dtypes[name], groups[name])
            for name, kept in parts.items()
        }

    def _restored(
        self,
        key: K,
        name: str,
        kept: dict[str, Tensor],
        dtype: torch.dtype,
        group: int,
    ) -> _Owned:
        where = f"state of {key}: {name}"
        for kind in (_MASTER, _COMMITS):
            if kind not in kept:
                raise BadInput(f"{where}.{kind} is missing")
        master, commits = kept.pop(_MASTER), int(kept.pop(_COMMITS))
        if master.dtype != wide_dtype(dtype):
            raise BadInput(f"{where}.{_MASTER} is {master.dtype}, and must be {wide_dtype(dtype)}")
        owned = self._owned(key, name, master, dtype, group)
        owned.commits = commits
        forms = self.rule.state_forms(master.dim(), master.dtype, master.device)
        if unknown := kept.keys() - forms.keys():
            raise BadInput(f"{where}: {self.rule.name} keeps no {sorted(unknown)}")
        if commits and (lost := forms.keys() - kept.keys()):
            raise BadInput(f"{where}: {sorted(lost)} is missing after {commits} commits")
        for kind, tensor in kept.items():
            form = forms[kind]
            found, due = tuple(tensor.shape), form.shape(tuple(master.shape))
            if found != due or tensor.dtype != form.dtype:
                raise BadInput(
                    f"{where}.{kind} is {tensor.dtype} {found}, and must be {form.dtype} {due}"
                )
        if kept:
            owned.optimizer.state[owned.master] = {
                kind: _plain(tensor.to(forms[kind].device)) for kind, tensor in kept.items()
            }
        return owned

    def _owned(self, key: K, name: str, tensor: Tensor, dtype: torch.dtype, group: int) -> _Owned:
        master = _plain(tensor.detach().to(wide_dtype(dtype)))
        try:
            self.rule.state_forms(master.dim(), master.dtype, master.device)
            return _Owned(master, dtype, group, self.rule.optimizer_of(master))
        except BadInput as error:
            raise BadInput(f"{name} of {key}: {error}") from error

    def _fitting(self, key: K, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients as the optimizers take them. Raises BadInput if they do not fit."""
        owned = self._tensors[key]
        if not gradients.keys() <= owned.keys():
            raise BadInput(f"gradients of {key} are of {sorted(gradients)}, not {sorted(owned)}")
        for name, gradient in gradients.items():
            master = owned[name].master
            found, due = (
                (one.dtype, tuple(one.shape), str(one.device)) for one in (gradient, master)
            )
            if found != due:
                raise BadInput(f"the gradient of {name} of {key} is {found}, and must be {due}")
        return {name: _plain(gradient.detach()) for name, gradient in gradients.items()}

    def _check_decision(self, decision: Commit) -> dict[int, dict[str, object]]:
        """Return each group's hyperparameters, if a decision can be applied."""
        attempt, updates = decision
        if self._tensors and attempt != self._attempt:
            found = "nothing" if self._attempt is None else self._attempt
            raise NotHere(f"{attempt} is not prepared here: {found} is")
        if missing := self.missing(attempt):
            raise NotHere(f"{attempt} is prepared in part: {missing[0]} is missing")
        for key, name in self.not_finite():
            raise BadExpert(f"{attempt}: the gradient of {name} of {key} is not finite")
        for group, (coefficient, _) in updates.items():
            if not (math.isfinite(coefficient) and coefficient >= 0):
                raise BadInput(
                    f"{attempt}: group {group}: coefficient {coefficient!r} must be finite, and "
                    "not negative"
                )
        groups = {one.group for tensors in self._tensors.values() for one in tensors.values()}
        for group in groups - updates.keys():
            raise BadInput(f"{attempt}: there are no settings for group {group!r}")
        return {group: self.rule.values(updates[group][1]) for group in groups}

    def _check_whole(self) -> None:
        if self._broken:
            raise InternalError(self._broken)

    def _check_owned(self, key: K) -> None:
        self._check_whole()
        if key not in self._tensors:
            raise NotHere(f"{key} has another owner")

    def _check_new(self, key: K) -> None:
        self._check_whole()
        if key in self._tensors:
            raise InternalError(f"{key} is owned already")


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it, contiguous and open to changes outside of inference mode.

    Fused optimizers take no notice of strides.
    """
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.is_inference() else tensor
