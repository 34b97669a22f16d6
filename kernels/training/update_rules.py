"""Optimizers of `torch.optim` by name: which are used, their hyperparameters, what they keep.

Each tensor has an optimizer of its own. So an update depends on nothing but the tensor's gradient,
state and hyperparameters, however tensors are spread over processes. One optimizer over several
tensors is different: fused SGD fails if only some of its tensors have a momentum yet, and
Adafactor's default for its first eps comes from the type of the first tensor.

Where a fused form exists for the device, it is the one that is used; otherwise tensors are updated
one by one (``foreach=False``). Measured with torch 2.13 on CPUs: Adam, AdamW, SGD, Adagrad,
Adafactor and NAdam gave the same bits in each form, whether nine tensors of 1 to 655,360 elements
were in one group, in two or alone, and with one and two threads. The forms differ: AdamW's fused
update from the others by up to 1.2e-7 after three steps. Eight tensors of 1 M elements took 5.9 ms
fused and 15.4 ms one by one (two threads); an optimizer for each tensor costs about 25 us a step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...proto.errors import BadInput, describe_error
from ..ffn import wide_dtype

# On which kinds of device `fused=True` is supported.
_FUSED = {
    "cpu": {"Adagrad", "Adam", "AdamW", "SGD"},
    "cuda": {"Adam", "AdamW", "SGD"},
}
_REFUSED = {
    "Optimizer": "it is the base class",
    "LBFGS": "it computes the loss several times in a step, and couples all tensors",
    "SparseAdam": "it takes sparse gradients only",
}
# How the update is computed, and not what it is.
_CHOSEN_HERE = {"params", "foreach", "fused", "capturable", "differentiable"}


class OwnerBytes(NamedTuple):
    """Memory of an owner, in bytes."""

    master: int
    gradient: int
    state: int

    @property
    def total(self) -> int:
        return sum(self)


class StateForm(NamedTuple):
    """One tensor of an optimizer's state, for a parameter that has a given number of dimensions.

    ``whole`` has an element for each dimension: whether it is the parameter's, or 1.
    """

    whole: tuple[bool, ...]
    dtype: torch.dtype
    device: torch.device

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(
            size if whole else 1 for whole, size in zip(self.whole, parameter, strict=False)
        )


class UpdateRule:
    """An optimizer's class and its hyperparameters: how tensors are updated from gradients.

    ``name`` is a class of `torch.optim`, such as AdamW, Adam, SGD, Adafactor or Muon. Raises
    BadInput for a name, a hyperparameter or a value that cannot be used.

    LBFGS and SparseAdam are refused. All others update each tensor by itself. Adafactor and Muon
    use norms and products of a whole tensor: of one expert's matrix here, whereas a model that
    keeps all experts of a layer in one parameter has one norm over them all, and no Muon.
    """

    def __init__(self, name: str, /, **hyperparameters: object) -> None:
        self.name = name
        self._class = _optimizer_class(name)
        found = inspect.signature(self._class).parameters
        self._options = {"foreach", "fused"} & found.keys()
        self._defaults = {key: one.default for key, one in found.items() if key not in _CHOSEN_HERE}
        self._values = {**self._defaults, **self._known(hyperparameters)}
        self._matrix_forms = self._checked(self._values)
        self._forms: dict[tuple[int, torch.dtype, torch.device], dict[str, StateForm]] = {}

    def values(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Return all hyperparameters for one step, of which ``settings`` replaces some.

        Raises BadInput for what cannot be used, and for what changes which state is kept.
        """
        values = {**self._values, **self._known(settings)}
        if self._checked(values) != self._matrix_forms:
            raise BadInput(
                f"optimizer {self.name}: {_listed(settings)} changes which state it keeps; "
                "give it when the optimizer is chosen"
            )
        return values

    def optimizer_of(self, tensor: Tensor) -> torch.optim.Optimizer:
        """Return a new optimizer for one tensor, which must be contiguous.

        (The fused forms take no notice of strides.) Raises BadInput if it does not take the shape.
        """
        try:
            return self._make(tensor, self._values)
        except ValueError as error:
            shape = tuple(tensor.shape)
            raise BadInput(f"optimizer {self.name}: shape {shape}: {error}") from error

    def state_forms(
        self, dimensions: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> dict[str, StateForm]:
        """Return what is kept, by name, for a tensor of this many dimensions after its first step.

        ``dtype`` is the master's. Raises BadInput if the optimizer does not take such tensors.
        """
        where = dimensions, dtype, torch.device(device)
        if where not in self._forms:
            try:
                self._forms[where] = self._new_forms(self._values, *where)
            except ValueError as error:
                raise BadInput(
                    f"optimizer {self.name}: {dimensions} dimensions: {error}"
                ) from error
        return self._forms[where]

    def bytes_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> OwnerBytes:
        """Return the memory that the owner of a weight takes, from its first commit on."""
        wide = wide_dtype(dtype)
        forms = self.state_forms(len(shape), wide).values()
        state = sum(math.prod(form.shape(shape)) * form.dtype.itemsize for form in forms)
        master = math.prod(shape) * wide.itemsize
        return OwnerBytes(master, master, state)

    def _known(self, given: Mapping[str, object]) -> dict[str, object]:
        for key, value in given.items():
            if key not in self._defaults:
                raise BadInput(
                    f"optimizer {self.name}: {key}: {value!r}: there is no such hyperparameter; "
                    f"there are {', '.join(self._defaults)}"
                )
            if not _is_like(value, self._defaults[key]):
                raise BadInput(
                    f"optimizer {self.name}: {key}: {value!r} must be like the default, "
                    f"{self._defaults[key]!r}"
                )
        return {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}

    def _checked(self, values: dict[str, object]) -> dict[str, StateForm]:
        """Return what is kept for a matrix, if the optimizer takes the values together."""

        def tried(values: dict[str, object]) -> dict[str, StateForm] | Exception:
            # Some values are checked when an optimizer is made, others in its first step.
            try:
                return self._new_forms(values, 2)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                return error

        found = tried(values)
        if not isinstance(found, Exception):
            return found
        changed = {key: one for key, one in values.items() if one != self._defaults[key]}
        for key, value in changed.items():
            alone = tried({**self._defaults, key: value})
            if isinstance(alone, Exception):
                changed, found = {key: value}, alone
                break
        raise BadInput(
            f"optimizer {self.name}: {_listed(changed)}: {describe_error(found)}"
        ) from found

    def _make(self, tensor: Tensor, values: dict[str, object]) -> torch.optim.Optimizer:
        options: dict[str, object] = {}
        if "fused" in self._options and self.name in _FUSED.get(tensor.device.type, ()):
            options["fused"] = True
        elif "foreach" in self._options:
            options["foreach"] = False
        return self._class([tensor], **values, **options)  # pyright: ignore[reportArgumentType]

    def _new_forms(
        self,
        values: dict[str, object],
        dimensions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, StateForm]:
        """Update a small tensor whose dimensions differ in size, and look at its state."""
        sizes = tuple(range(2, 2 + dimensions))
        with torch.inference_mode(False):
            tensor = torch.zeros(sizes, dtype=dtype, device=device)
            tensor.grad = torch.ones_like(tensor)
            optimizer = self._make(tensor, values)
            optimizer.step()
        forms = {}
        for kind, kept in state_of(optimizer).items():
            form = StateForm(tuple(size > 1 for size in kept.shape), kept.dtype, kept.device)
            if kept.dim() and form.shape(sizes) != tuple(kept.shape):
                raise BadInput(
                    f"optimizer {self.name}: its state {kind} has the shape {tuple(kept.shape)} "
                    f"for a tensor of {sizes}; it cannot be planned with"
                )
            forms[kind] = form
        return forms


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer's only tensor, by name: the optimizer's own tensors."""
    (tensor,) = optimizer.param_groups[0]["params"]
    return {kind: one for kind, one in optimizer.state.get(tensor, {}).items() if one is not None}


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    found = getattr(torch.optim, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        names = [
            name
            for name, one in vars(torch.optim).items()
            if isinstance(one, type) and issubclass(one, torch.optim.Optimizer)
        ]
        usable = ", ".join(sorted(set(names) - _REFUSED.keys()))
        raise BadInput(f"optimizer {name}: torch.optim has no such class; choose one of {usable}")
    if name in _REFUSED:
        raise BadInput(f"optimizer {name} cannot be used: {_REFUSED[name]}")
    return found


def _is_like(value: object, default: object) -> bool:
    """Return whether a hyperparameter's value has the type of its default, and is finite."""
    if default is None:
        return value is None or isinstance(value, str) or _is_like(value, 0.0)
    if isinstance(default, tuple):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(default)
            and all(_is_like(one, like) for one, like in zip(value, default, strict=True))
        )
    if isinstance(default, bool):
        return isinstance(value, bool)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key}: {value!r}" for key, value in values.items())
