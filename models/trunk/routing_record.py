"""Which experts a layer has chosen, kept while its activations are not.

With activation checkpointing a layer runs a second time in the backward pass. What its gate
computes then may differ in the last bits, and of two experts that are nearly equal it may choose
the other one. The gradients would belong to another function than the loss, without any error. So
the second run takes the choices of the first, and the pool's result: the pool is asked once.

Choices are recorded where gates make them, in `torch.topk` and `argmax`, as positions. Values are
gathered at these positions in both runs, so that gates learn, and both runs save the same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TOPK = (torch.topk, Tensor.topk)
_ARGMAX = (torch.argmax, Tensor.argmax)


class RoutingRecord:
    """The choices and the results of one run of a layer, for its later runs."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._next: int | None = None  # None: the first run

    @property
    def nbytes(self) -> int:
        """How much memory is kept: positions, and the pool's results."""
        return sum(tensor.nbytes for tensor in self._kept)

    def run(self, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call ``function``, the first time recording, and replaying after that."""
        token = _running.set(self)
        try:
            with _Choices(self):
                return function(*args, **named)
        finally:
            _running.reset(token)
            self._next = 0

    def once(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what ``compute`` returned in the first run, at this place in the order of calls.

        Raises RuntimeError if a later run asks for more than the first one.
        """
        if self._next is None:
            found = compute()
            self._kept.append(found.detach())
            return found
        if self._next >= len(self._kept):
            raise RuntimeError(
                "a layer makes another choice of experts when it runs again than at first; "
                "disable activation checkpointing for this model"
            )
        self._next += 1
        return self._kept[self._next - 1]


class _Choices(TorchFunctionMode):
    """Keeps the positions that gates choose."""

    def __init__(self, record: RoutingRecord) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _TOPK:
            return self._topk(func, *args, **named)
        if func in _ARGMAX:
            return self._record.once(lambda: func(*args, **named))
        return func(*args, **named)

    def _topk(self, func: Any, given: Tensor, k: int, dim: int = -1, **named: Any) -> Any:
        def choose() -> Tensor:
            with torch.no_grad():
                return func(given, k, dim, **named)[1]

        positions = self._record.once(choose)
        return torch.return_types.topk((given.gather(dim, positions), positions))


_running: ContextVar[RoutingRecord | None] = ContextVar("routing_record", default=None)


def once_in_a_layer(compute: Callable[[], Tensor]) -> Tensor:
    """Compute something of a layer, unless the layer runs again and has computed it before."""
    record = _running.get()
    return compute() if record is None else record.once(compute)


def is_recorded() -> bool:
    """Return whether a layer runs whose activations are not kept, so that it runs again."""
    return _running.get() is not None


def record_routing(model: nn.Module) -> None:
    """Let layers that transformers checkpoints from now on keep to their choices of experts."""
    enable: Any = model._set_gradient_checkpointing

    @functools.wraps(enable)
    def set_checkpointing(
        *args: Any, gradient_checkpointing_func: Callable[..., Any] | None = None, **named: Any
    ) -> None:
        if gradient_checkpointing_func is not None:
            named["gradient_checkpointing_func"] = _recorded(gradient_checkpointing_func)
        enable(*args, **named)

    model._set_gradient_checkpointing = set_checkpointing  # pyright: ignore[reportArgumentType]


def _recorded(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpointing function each of whose calls has a record."""

    def checkpointed(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return checkpoint(functools.partial(RoutingRecord().run, function), *args, **named)

    return checkpointed
