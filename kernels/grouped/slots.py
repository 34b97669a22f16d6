"""Experts in slots of device memory, as the grouped FFN takes them. Nothing here needs Triton.

Shape suffixes: N = assignments, H = hidden size, I = intermediate size, U = rows of the
up-projection (2I if gated, otherwise I), S = slots, L = layers, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .activation import Activation

_UP = frozenset({"up", "up_bias"})


@dataclass(frozen=True, slots=True)
class SlotForm:
    """What the experts of a layer have in common, apart from their weights.

    ``activate`` is for a function that `Activation` does not know; it maps (N, U) to (N, I).
    ``post_norm`` maps (N, H), with the tensors that the layer's experts share, to (N, H).
    """

    activation: Activation | None
    activate: Callable[[Tensor], Tensor] | None = None
    post_norm: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def in_slots(self) -> Callable[[Tensor], Tensor]:
        """The function from (N, U) to (N, I) for rows as they lie in slots: all gates first."""
        if self.activation is not None:
            return replace(self.activation, interleaved=False)
        assert self.activate is not None, "a form has an activation or a function"
        return self.activate


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """Slots with experts in the kernel's layout, as `to_slot` gives it."""

    form: SlotForm
    up_SUH: Tensor
    down_SHI: Tensor
    up_bias_SU: Tensor | None
    down_bias_SH: Tensor | None
    table_LE: Tensor  # int32: the slot of an expert, or -1
    layer: Tensor  # int32, a single number: the row of the table
    # What all experts of a layer share, by name: (S, ...).
    shared: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("up_SUH", "down_SHI"):
            matrix = getattr(self, name)
            if matrix.stride()[1:] != (matrix.shape[2], 1):
                raise ValueError(
                    f"{name}: every slot must be contiguous, but has {matrix.stride()}"
                )
        if self.table_LE.dtype != torch.int32 or not self.table_LE.is_contiguous():
            raise ValueError("table_LE must be contiguous and int32")

    def norm(self) -> Callable[[Tensor], Tensor] | None:
        """Return the norm of experts' outputs, (N, H) to (N, H); None if the layer has none."""
        post_norm = self.form.post_norm
        if post_norm is None:
            return None
        # All experts of the layer have the same tensors, so those of any slot do. Nothing waits for
        # the device to find one.
        row = self.layer.long().view(1)
        slot = self.table_LE.index_select(0, row).amax().clamp(min=0).long().view(1)
        # Autograd takes no tensor that was made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            tensors = {n: all_S.index_select(0, slot)[0] for n, all_S in self.shared.items()}
        return lambda y_NH: post_norm(y_NH, tensors)


@dataclass(frozen=True, slots=True)
class StepFlags:
    """What went wrong in any layer call since the caller cleared ``both``, each 0 or 1."""

    both: Tensor  # (2,) int32

    @classmethod
    def on(cls, device: torch.device) -> StepFlags:
        return cls(torch.zeros(2, dtype=torch.int32, device=device))

    def clear(self) -> None:
        """Forget what went wrong, without waiting."""
        self.both.zero_()

    def read(self) -> tuple[bool, bool]:
        """Wait for the device, and return (missing, infinite)."""
        missing, infinite = self.both.tolist()
        return bool(missing), bool(infinite)

    def any(self) -> bool:
        """Wait for the device, and return whether anything went wrong."""
        return any(self.read())

    @property
    def missing(self) -> Tensor:
        """An assignment names an expert without a slot."""
        return self.both[0]

    @property
    def infinite(self) -> Tensor:
        """A sum is not finite."""
        return self.both[1]


def to_slot(
    activation: Activation | None, tensors: Mapping[str, Tensor], *, transposed: bool
) -> dict[str, Tensor]:
    """Return tensors in the kernel's layout: up (U, H) with all gates first, and down (H, I).

    The names are those of `ExpertWeights.tensors`.
    """
    found = {
        name: tensor.t() if transposed and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    if activation is not None and activation.interleaved:
        for name in found.keys() & _UP:
            found[name] = torch.cat([found[name][::2], found[name][1::2]])
    return found


def from_slot(
    activation: Activation | None, tensors: Mapping[str, Tensor], *, transposed: bool
) -> dict[str, Tensor]:
    """Return copies of an expert's tensors in its model's layout; it reverses `to_slot`."""
    found = dict(tensors)
    if activation is not None and activation.interleaved:
        for name in found.keys() & _UP:
            gates, values = found[name].chunk(2)
            found[name] = torch.stack([gates, values], dim=1).view(found[name].shape)
    return {
        name: (tensor.t() if transposed and tensor.dim() == 2 else tensor).clone(
            memory_format=torch.contiguous_format
        )
        for name, tensor in found.items()
    }
