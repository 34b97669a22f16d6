"""A host's part in training: calls that are learned from, and the gradients that they add up.

A forward call keeps activations for its backward half, and a backward call that finds none computes
them again from its rows: gradients have the same bits both ways.

The loop's thread alone uses it. A trunk waits for the answer to a call, so the host sends that
first, and adds the gradients of the experts up afterwards.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...cluster.expert_keys import SHARED, ExpertKey, LayerKey
from ...cluster.training.contributions import Attempt, Contributions, Part
from ...kernels.backward.accumulators import GradientAccumulators, ReusedMemory
from ...kernels.backward.ffn import BACKWARD_KERNELS, BackwardForm
from ...kernels.backward.kept import keeping_forward, kept_backward
from ...kernels.slabs.layer_arithmetic import CpuLayer, DeviceLayer
from ...proto.errors import CallError, describe_error
from ...proto.expert_pb2 import Backward
from ...proto.wire import CallLayout
from ..runtime.devices import machine_memory
from .compute import PendingCall, ReplyTensors, layer_of
from .memory.activations import KeptActivations
from .weight_store import ExpertStore

if TYPE_CHECKING:
    from .device_gradients import DeviceBackward

# Activations may take one part in so many of the memory that is free when a run's first attempt
# begins.
_PARTS_OF_FREE_MEMORY = 8


class ExpertSums(Protocol):
    """What a host has added up, by expert."""

    def __iter__(self) -> Iterator[Hashable]:
        """Yield the keys of the experts that have gradients."""
        ...

    def take(self, key: ExpertKey, /) -> dict[str, Tensor]:
        """Return an expert's gradients by name, as they were added up, and forget them."""
        ...


class HostGradients:
    """The gradients of one host's experts in the attempt under way."""

    def __init__(self, store: ExpertStore) -> None:
        self.activations = KeptActivations()
        self._store = store
        self._contributions = Contributions()
        self._exact = False
        self._memory = ReusedMemory()
        self._sums: ExpertSums = GradientAccumulators()
        self._forms: dict[LayerKey, BackwardForm] = {}
        self._device: DeviceBackward | None = None  # made for the first call, if experts are on one
        # Of the call that was answered last: its layer, and what adds up the rest.
        self._pending: tuple[LayerKey, Callable[[], None]] | None = None
        self._limit_bytes: int | None = None  # of activations in a run; None: none has begun

    def begin(self, attempt: Attempt, *, exact: bool = False) -> None:
        """Begin an attempt at a step, unless it is under way. Raises Superseded for an older one.

        With ``exact`` sums are float64, so the order in which parts arrive does not show in what
        they are rounded to.
        """
        if self._contributions.begin(attempt):
            self._exact = exact
            # Whoever still reads sums of the attempt before can use them no more.
            self._memory.begin()
            self._sums = GradientAccumulators(exact=exact, memory=self._memory)
            self._pending = None  # if an error came between an answer and what it adds up
            self._forms.clear()  # another model may have come under the name of one
            if self._limit_bytes is None:
                self._limit_bytes = machine_memory()[1] // _PARTS_OF_FREE_MEMORY
            self.activations.begin(self._limit_bytes)

    def check(self, backward: Backward) -> None:
        """Raise NotHere unless a call is of the attempt under way."""
        self._contributions.check(_attempt(backward))

    def keeping(self, pending: PendingCall) -> ReplyTensors | None:
        """Compute a forward call and keep its activations; None: of this call nothing is kept."""
        call, layout = pending.frame.call, pending.layout
        key = LayerKey(call.model, call.layer)
        layer = layer_of(self._store, key, [pending])
        # With `exact` each half computes its rows in another way.
        if call.exact or not self.activations.limit_bytes or not isinstance(layer, CpuLayer):
            return None
        if any(expert.is_packed for expert in layer.experts.values()):
            return None
        x_TH, ids_TK, weights_TK = layout.call_tensors(pending.payload)
        buffer = pending.session.reply_buffer(pending.frame, layout)
        y_TH = layout.reply_tensor(buffer)
        kept = keeping_forward(layer.form, layer.experts, x_TH, ids_TK, weights_TK, y_TH)
        self.activations.keep(call, x_TH, ids_TK, kept)
        return ReplyTensors(buffer, layer.bad_experts(x_TH, ids_TK, y_TH))

    def answer(self, pending: PendingCall, *, exact: bool) -> ReplyTensors:
        """Compute the gradients of a call's rows and weights; `add_up` does the rest.

        ``exact`` asks for one row per assignment instead of one sum per token.
        """
        backward, layout = pending.frame.backward, pending.layout
        key = LayerKey(backward.call.model, backward.call.layer)
        layer = layer_of(self._store, key, [pending])
        buffer = pending.session.reply_buffer(pending.frame, layout)
        try:
            if isinstance(layer, DeviceLayer):
                add, finite = self._on_device(key, layer, pending, buffer)
            else:
                assert isinstance(layer, CpuLayer)
                add, finite = self._on_cpu(key, layer, pending, buffer), False
        except ValueError as error:
            raise CallError(f"backward: {key.model!r} is not open for training: {error}") from error
        part = Part(key, backward.worker, backward.microbatch, backward.part)
        if self._contributions.admit(_attempt(backward), part):
            self._pending = key, add
        bad = [] if finite else _bad_experts(layout, pending.payload, buffer)
        return ReplyTensors(buffer, bad)

    def _on_cpu(
        self, key: LayerKey, layer: CpuLayer, pending: PendingCall, buffer: Tensor
    ) -> Callable[[], None]:
        layout, payload = pending.layout, pending.payload
        x_TH, ids_TK, weights_TK = layout.call_tensors(payload)
        half = (
            weights_TK,
            layout.grad_tensor(payload),
            layout.reply_tensor(buffer),
            layout.grad_weights_tensor(buffer),
        )
        form, experts = self._form(key, layer), layer.experts
        kept = self.activations.take(pending.frame.backward.call, x_TH, ids_TK)
        if kept is None:
            found = BACKWARD_KERNELS["loop"](form, experts, x_TH, ids_TK, *half)
        else:
            found = kept_backward(form, experts, kept, x_TH, *half)
        sums = self._sums
        assert isinstance(sums, GradientAccumulators)
        return partial(found.accumulate, sums, key.expert, key.expert(SHARED))

    def _on_device(
        self, key: LayerKey, layer: DeviceLayer, pending: PendingCall, buffer: Tensor
    ) -> tuple[Callable[[], None], bool]:
        """Return what adds up the rest, and whether all that was written is finite."""
        # Triton comes with CUDA builds of PyTorch, and CPUs do without it.
        from .device_gradients import DeviceBackward, DeviceSums

        if self._device is None:
            self._device = DeviceBackward(layer.ids_device)
        if not isinstance(self._sums, DeviceSums):
            self._sums = DeviceSums(self._store, exact=self._exact)
        found, finite = self._device.answer(layer, pending, buffer)
        return partial(self._sums.add, key, layer.slots, found), finite

    @property
    def owes(self) -> bool:
        """Whether there is something to `add_up`."""
        return self._pending is not None

    def add_up(self) -> None:
        """Add up the gradients of the experts that the last call used, unless they were already."""
        if self._pending is None:
            return
        (key, add), self._pending = self._pending, None
        try:
            add()
        except BaseException as error:
            self._contributions.break_off(f"{key}: {describe_error(error)}")
            raise

    def close(self, attempt: Attempt) -> ExpertSums:
        """Close the attempt under way for calls, and return its sums, which are the caller's now.

        They stay the same object until another attempt begins. Their keys are experts, and layers'
        shared tensors; those that no token has used are missing. Raises NotHere, and InternalError
        as `Contributions.close`.
        """
        self._contributions.close(attempt)
        self.activations.end()
        return self._sums

    def forget(self) -> None:
        """Drop what was added up, and close the attempt under way: its run is over."""
        self._contributions.forget()
        self.activations.end()
        self._memory.clear()
        self._sums = GradientAccumulators()
        self._pending = None
        self._limit_bytes = None

    def _form(self, key: LayerKey, layer: CpuLayer) -> BackwardForm:
        if key not in self._forms:
            gated = self._store.is_gated(key)
            self._forms[key] = BackwardForm.of(layer.form, gated=gated)
        return self._forms[key]


def _attempt(backward: Backward) -> Attempt:
    return Attempt(backward.run, backward.step, backward.attempt)


def _bad_experts(layout: CallLayout, payload: Tensor, buffer: Tensor) -> list[int]:
    """Return the experts of rows whose gradients are not finite."""
    _, ids_TK, _ = layout.call_tensors(payload)
    grad_x, grad_weights_TK = layout.reply_tensor(buffer), layout.grad_weights_tensor(buffer)
    finite_T = torch.isfinite(grad_x.flatten(1)).all(dim=1) & torch.isfinite(grad_weights_TK).all(1)
    if finite_T.all():
        return []
    found = torch.unique(ids_TK[~finite_T]).tolist()
    return [expert for expert in found if expert >= 0]
