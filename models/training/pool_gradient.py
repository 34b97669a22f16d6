"""The gradient of a stand-in: its tensors are on the hosts, and its norm and a factor are here.

A trainer clips gradients by their norm and multiplies them by numbers. Both work on a
`PoolGradient` as on other gradients. Whatever else is done to it raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.ffn import wide_dtype
from ...proto.errors import BadInput

_aten: Any = torch.ops.aten


@dataclass(slots=True)
class Recorded:
    """What is known of a gradient that is elsewhere."""

    name: str  # of the parameter in the model
    attempt: object  # for whom it was added up; compared by identity
    square: Callable[[], float]  # returns the sum of squares of all elements; may take long
    factor: float = 1.0  # by which the gradient was multiplied since
    no_norm: str = ""  # the error message if its norm is asked for; empty: it may be

    @property
    def norm(self) -> float:
        return math.sqrt(self.square()) * abs(self.factor)


class PoolGradient(Tensor):
    """The sum of the experts' gradients of one tensor of a layer, as `grad` of its stand-in.

    It has the stand-in's shape, dtype and device, and no elements. Its norm (2-norm alone) is that
    of the sum, in float32, or float64 for float64 models; it is asked for when it is needed, which
    ends the collection of gradients; or it is refused, if ``recorded.no_norm`` says why.
    Multiplications by a number or a tensor without dimensions are written down in
    ``recorded.factor``, by which the optimizer's owners multiply. All else raises BadInput.
    """

    recorded: Recorded
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, like: Tensor, recorded: Recorded) -> PoolGradient:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        made.recorded = recorded
        return made

    @staticmethod
    def of(stand_in: nn.Parameter, recorded: Recorded) -> PoolGradient:
        """Return a new gradient, which becomes the stand-in's."""
        stand_in.grad = PoolGradient(stand_in, recorded)
        return stand_in.grad

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PoolGradient({self.recorded.name}, factor={self.recorded.factor})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        handle = _HANDLERS.get(func)
        if handle is None:
            raise _refused(func, [*args, *(kwargs or {}).values()])
        return handle(func, *args, **(kwargs or {}))


def _refused(func: Any, args: Sequence[Any], why: str = "") -> BadInput:
    listed = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else [arg])]
    names = [one.recorded.name for one in listed if isinstance(one, PoolGradient)]
    return BadInput(
        f"{func} on the gradient of {names[0] if names else 'experts'}: "
        f"{why or 'it cannot be computed here'}. The gradients of experts are on their hosts: they "
        "have a 2-norm, and can be multiplied by a number; clip them with "
        "torch.nn.utils.clip_grad_norm_ or PoolOptimizer(max_grad_norm=...), drop them with "
        "zero_grad(), and apply them with PoolOptimizer"
    )


def _number(func: Any, args: Sequence[Any], value: Any) -> float:
    """Return what a gradient is to be multiplied by. Raises BadInput for more than one number."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Tensor) and not isinstance(value, PoolGradient) and value.dim() == 0:
        return float(value)
    raise _refused(func, args, "it takes one number for all elements")


def _norm(func: Any, gradient: PoolGradient, order: Any, dtype: torch.dtype | None) -> Tensor:
    if float(order) != 2.0:
        raise _refused(func, [gradient], f"norm_type is {order}, and only 2 is known of experts")
    if why := gradient.recorded.no_norm:
        raise BadInput(f"the norm of the gradient of {gradient.recorded.name}: {why}")
    dtype = wide_dtype(gradient.dtype) if dtype is None else dtype
    return torch.tensor(gradient.recorded.norm, dtype=dtype, device=gradient.device)


def _vector_norm(
    func: Any,
    gradient: PoolGradient,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is not None or keepdim:
        raise _refused(func, [gradient], "its norm is over all dimensions")
    return _norm(func, gradient, order, dtype)


def _foreach_norm(
    func: Any, tensors: list[Tensor], order: Any = 2, dtype: torch.dtype | None = None
) -> list[Tensor]:
    plain = [one for one in tensors if not isinstance(one, PoolGradient)]
    norms = iter(func(plain, order, dtype) if plain else ())
    return [
        _norm(func, one, order, dtype) if isinstance(one, PoolGradient) else next(norms)
        for one in tensors
    ]


def _detach(func: Any, gradient: PoolGradient) -> PoolGradient:
    """Return an alias: what is recorded of one is recorded of both."""
    return PoolGradient(gradient, gradient.recorded)


def _scaled(invert: bool) -> Callable[..., Any]:
    """Return the out-of-place operation, whose result has a factor of its own."""

    def scale(func: Any, one: Any, other: Any) -> PoolGradient:
        if not isinstance(one, PoolGradient) and not invert:
            one, other = other, one
        if not isinstance(one, PoolGradient):
            raise _refused(func, [one, other], "it cannot divide")
        number = _number(func, [one], other)
        factor = one.recorded.factor / number if invert else one.recorded.factor * number
        return PoolGradient(one, replace(one.recorded, factor=factor))

    return scale


def _scale(invert: bool) -> Callable[..., Any]:
    def scale(func: Any, gradient: Any, other: Any) -> PoolGradient:
        if not isinstance(gradient, PoolGradient):
            raise _refused(func, [gradient, other], "it is no factor")
        number = _number(func, [gradient], other)
        gradient.recorded.factor *= 1 / number if invert else number
        return gradient

    return scale


def _foreach_scale(invert: bool) -> Callable[..., None]:
    def scale(func: Any, tensors: list[Tensor], other: Any) -> None:
        number = _number(func, [tensors, other], other)
        plain = [one for one in tensors if not isinstance(one, PoolGradient)]
        if plain:
            func(plain, other)
        for one in tensors:
            if isinstance(one, PoolGradient):
                one.recorded.factor *= 1 / number if invert else number

    return scale


def _unscale(func: Any, tensors: list[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    """Multiply by a GradScaler's inverse scale, and note if something is not finite."""
    plain = [one for one in tensors if not isinstance(one, PoolGradient)]
    if plain:
        func(plain, found_inf, inverse)
    for one in tensors:
        if isinstance(one, PoolGradient):
            one.recorded.factor *= float(inverse)
            if not math.isfinite(one.recorded.norm):
                found_inf.fill_(1.0)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.linalg_vector_norm.default: _vector_norm,
    _aten._foreach_norm.Scalar: _foreach_norm,
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    **{one: _scale(False) for one in (_aten.mul_.Tensor, _aten.mul_.Scalar)},
    **{one: _scale(True) for one in (_aten.div_.Tensor, _aten.div_.Scalar)},
    **{one: _scaled(False) for one in (_aten.mul.Tensor, _aten.mul.Scalar)},
    **{one: _scaled(True) for one in (_aten.div.Tensor, _aten.div.Scalar)},
    **{
        one: _foreach_scale(False)
        for one in (_aten._foreach_mul_.Tensor, _aten._foreach_mul_.Scalar)
    },
    **{
        one: _foreach_scale(True)
        for one in (_aten._foreach_div_.Tensor, _aten._foreach_div_.Scalar)
    },
}
