"""The gradients of a trunk's parameters in float64, so that it does not show who added what up.

PyTorch adds up what microbatches give in a parameter's own type, and rounds each time. A run sums
the gradients of several workers, so the result would depend on which microbatches each one had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class _Sum:
    sum: Tensor  # float64
    # The `grad` that is its rounding, and how often that had been changed until then.
    grad: Tensor | None = None
    version: int = 0


class ExactGradients:
    """Adds gradients up in float64; `grad` of each parameter is the sum, rounded once.

    A `grad` that something else has changed, as clipping does, counts as it is. Takes 8 bytes for
    each number of the parameters that have gradients, until `clear`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Watch parameters that require gradients, until `close`."""
        self._sums: dict[str, _Sum] = {}
        self._hooks = [
            hook
            for name, one in parameters.items()
            for hook in (
                one.register_hook(partial(self._add, name, one)),
                one.register_post_accumulate_grad_hook(partial(self._round, name)),
            )
        ]

    def take(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what parameters' ``gradients`` are the rounding of, in float64."""
        return {
            name: self._sums[name].sum if self._is_known(name, grad) else grad.double()
            for name, grad in gradients.items()
        }

    def clear(self) -> None:
        """Forget the sums: gradients begin anew."""
        self._sums.clear()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.clear()

    def _is_known(self, name: str, grad: Tensor | None) -> bool:
        found = self._sums.get(name)
        return found is not None and found.grad is grad and found.version == _version(grad)

    @torch.no_grad()
    def _add(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Add a gradient that PyTorch adds to `grad` next."""
        if gradient.layout is not torch.strided:
            return  # the step refuses it
        before = parameter.grad
        if before is None:
            self._sums[name] = _Sum(gradient.to(torch.float64, copy=True))
        elif self._is_known(name, before):
            self._sums[name].sum.add_(gradient)
        else:
            self._sums[name] = _Sum(before.to(torch.float64, copy=True).add_(gradient))

    @torch.no_grad()
    def _round(self, name: str, parameter: nn.Parameter) -> None:
        found, grad = self._sums.get(name), parameter.grad
        if found is None or grad is None:
            return
        grad.copy_(found.sum)
        found.grad, found.version = grad, _version(grad)


def _version(grad: Tensor | None) -> int:
    return 0 if grad is None else grad._version
