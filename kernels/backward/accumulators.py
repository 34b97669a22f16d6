"""Gradients of experts, added up over calls until a step uses them.

Shape suffixes: R = rows of one expert in one call, M, N = sizes of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ffn import all_finite, wide_dtype

# How many elements' squares are added up in float32, and from which mean square on those that are
# lost because they are too small for float32 (1e-38) do not show.
_ROW = 512
_LEAST_SQUARE = 1e-30


@dataclass(frozen=True, slots=True)
class _Sum:
    """One tensor's sum, and the type in which it is given away."""

    sum: Tensor
    dtype: torch.dtype

    def rounded(self) -> Tensor:
        return self.sum.to(self.dtype)


class SumMemory(Protocol):
    """Where sums may lie instead of in memory of their own."""

    def tensor(self, place: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Return the tensor of a place, with any content; None if there is no room for it.

        The same place is the same memory every time.
        """
        ...


class ReusedMemory:
    """Sums lie where those of the attempt before lay, if the same experts are used again.

    Memory that is written to for the first time costs more than adding to it.
    """

    def __init__(self) -> None:
        self._before: dict[Hashable, Tensor] = {}
        self._used: dict[Hashable, Tensor] = {}

    def begin(self) -> None:
        """Let the next sums lie where those since the last call did; others' memory is freed."""
        self._before, self._used = self._used, {}

    def tensor(self, place: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        found = self._before.pop(place, None)
        if found is None or found.shape != shape or found.dtype != dtype:
            # A tensor that is made in inference mode cannot be changed outside of it.
            with torch.inference_mode(False):
                found = torch.empty(shape, dtype=dtype)
        self._used[place] = found
        return found

    def clear(self) -> None:
        self._before, self._used = {}, {}


class GradientAccumulators:
    """Sums of gradients, by expert (any key) and by the tensor's name, in the model's layout.

    A sum is in the wide type: float32, or float64 for float64 experts. It is made when something is
    first added, so experts that no token has used have none and take no memory.

    With ``exact`` sums are float64, also when they are taken: who adds several of them up rounds
    the result once. Each gradient that is added was rounded to float32 before, so a sum is exact
    unless its terms are more than 2^29 apart; otherwise sums in two orders differ by some 2^-52 of
    their largest term, and that shows in float32 only across a border of its rounding. In the sums
    of float64 experts the order shows.

    All sums are ordinary tensors, even if they are added to inside of `torch.inference_mode`, so
    any thread may add to them; but one at a time, because nothing here takes a lock.
    """

    def __init__(self, *, exact: bool = False, memory: SumMemory | None = None) -> None:
        """``memory`` is for the sums of experts on the CPU, as long as it has room.

        Two accumulators with the same memory overwrite each other's sums: make the second one when
        nobody reads the first one's any more.
        """
        self.exact = exact
        self._memory = memory
        self._sums: dict[Hashable, dict[str, _Sum]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._sums

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the keys of the experts that have gradients, in the order of their first ones."""
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def nbytes(self) -> int:
        return sum(one.sum.nbytes for sums in self._sums.values() for one in sums.values())

    def add(self, key: Hashable, name: str, gradient: Tensor) -> None:
        """Add a tensor's gradient, of the tensor's shape."""
        wide = wide_dtype(gradient.dtype)
        total, is_new = self._sum(key, name, gradient.shape, wide, gradient.device)
        if is_new:
            total.copy_(gradient)
        else:
            total.add_(gradient)

    def add_product(self, key: Hashable, name: str, left_RM: Tensor, right_RN: Tensor) -> None:
        """Add left.T @ right, (M, N), computed in the wide type."""
        wide = wide_dtype(left_RM.dtype)
        left_MR, right_RN = left_RM.to(wide).t(), right_RN.to(wide)
        shape = torch.Size((left_MR.shape[0], right_RN.shape[1]))
        total_MN, is_new = self._sum(key, name, shape, wide, left_RM.device)
        if total_MN.dtype != wide:
            product_MN = left_MR @ right_RN
            total_MN.copy_(product_MN) if is_new else total_MN.add_(product_MN)
        elif is_new:
            torch.mm(left_MR, right_RN, out=total_MN)
        else:
            total_MN.addmm_(left_MR, right_RN)  # one pass over the sum

    def add_rows(self, key: Hashable, name: str, rows_RN: Tensor) -> None:
        """Add the sum of the rows, (N,), computed in the wide type."""
        self.add(key, name, rows_RN.sum(0, dtype=wide_dtype(rows_RN.dtype)))

    def not_finite(self) -> list[Hashable]:
        """Return the experts of which some gradient is not finite, or not when it is rounded."""

        def is_bad(one: _Sum) -> bool:
            # The quick test is also False where only the sum of all elements overflows.
            rounded = one.rounded()
            return not all_finite(rounded) and not bool(torch.isfinite(rounded).all())

        return [key for key, sums in self._sums.items() if any(map(is_bad, sums.values()))]

    def squared_norms(self) -> dict[Hashable, dict[str, float]]:
        """Return the sum of squares of each tensor, as it would be taken, added up in float64."""
        return {
            key: {name: sum_of_squares(one.rounded()) for name, one in sums.items()}
            for key, sums in self._sums.items()
        }

    def take(self, key: Hashable) -> dict[str, Tensor]:
        """Return an expert's gradients by name, as they were added up, and forget them.

        An expert that nothing was added to has none: KeyError.
        """
        return {name: one.sum for name, one in self._sums.pop(key).items()}

    def clear(self) -> None:
        self._sums.clear()

    def _sum(
        self, key: Hashable, name: str, shape: torch.Size, wide: torch.dtype, device: torch.device
    ) -> tuple[Tensor, bool]:
        """Return the sum of a tensor's gradients so far, and whether it is new: not yet written."""
        sums = self._sums.setdefault(key, {})
        is_new = name not in sums
        if is_new:
            dtype = torch.float64 if self.exact else wide
            made = None
            if self._memory is not None and device.type == "cpu":
                made = self._memory.tensor((key, name), shape, dtype)
            if made is None:
                # A tensor that is made in inference mode cannot be changed outside of it.
                with torch.inference_mode(False):
                    made = torch.empty(shape, dtype=dtype, device=device)
            sums[name] = _Sum(made, wide)
        found = sums[name].sum
        if found.shape != shape:
            raise ValueError(
                f"{name} of expert {key}: a gradient of {tuple(shape)} cannot be added to a sum "
                f"of {tuple(found.shape)}"
            )
        return found, is_new


def sum_of_squares(tensor: Tensor) -> float:
    """Return the sum of the squares of all elements, in float64.

    It is NaN or infinite if some element is, or if the sum is too large for float64. Squares of
    `_ROW` elements are added up in the wide type, so the relative error for float32 is about 1e-7.
    """
    flat_N = tensor.reshape(-1)
    even = flat_N.numel() // _ROW * _ROW
    # Widening each element would take eight times as long.
    dtype = wide_dtype(tensor.dtype)
    found = _squares(flat_N[:even].view(-1, _ROW), dtype) + _squares(flat_N[even:][None], dtype)
    if _LEAST_SQUARE * flat_N.numel() < found < math.inf:
        return found
    # It is zero, or not finite, or some squares are too small or too large for float32.
    return _squares(flat_N[None], torch.float64)


def _squares(rows_RM: Tensor, dtype: torch.dtype) -> float:
    norms_R = torch.linalg.vector_norm(rows_RM, dim=1, dtype=dtype)
    try:
        return math.fsum(norms_R.double().square().tolist())
    except OverflowError:
        return math.inf
