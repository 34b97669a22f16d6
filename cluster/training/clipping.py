"""The norm of all gradients of a training step, and the factor that clips it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from ...proto.errors import BadInput

K = TypeVar("K", bound=Hashable)

_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Clipping(NamedTuple):
    """What a step's gradients are multiplied by.

    If ``norm`` is not finite, ``coefficient`` is NaN and the step cannot be committed;
    ``not_finite`` has the key and the name of each tensor that is to blame.
    """

    norm: float
    coefficient: float
    not_finite: tuple[tuple[Hashable, str], ...] = ()


def clip_coefficient(
    squared_norms: Mapping[K, Mapping[str, float]], max_norm: float | None
) -> Clipping:
    """Return the norm over all tensors, and the factor that brings it down to ``max_norm``.

    Sums of squares come by key and name. Their sum is exact until it is rounded once to float64,
    so neither their order shows, nor who owns which tensor. Without ``max_norm`` the factor is 1.
    """
    if max_norm is not None and not (math.isfinite(max_norm) and max_norm > 0):
        raise BadInput(f"max_norm {max_norm!r} must be finite and positive; None clips nothing")
    not_finite = tuple(
        (key, name)
        for key, squares in squared_norms.items()
        for name, square in squares.items()
        if not math.isfinite(square)
    )
    try:
        norm = math.sqrt(
            math.fsum(one for squares in squared_norms.values() for one in squares.values())
        )
    except OverflowError:
        norm = math.inf
    if not math.isfinite(norm):
        return Clipping(norm, math.nan, not_finite)
    coefficient = 1.0 if max_norm is None else min(1.0, max_norm / (norm + _EPS))
    return Clipping(norm, coefficient)
