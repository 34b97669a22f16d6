"""A host's part in training: backward calls, and the gradients of its experts that they add up.

The loop's thread alone uses it. A trunk waits for the answer to a call, so the host sends that
first, and adds the gradients of the experts up afterwards.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cluster.expert_keys import SHARED, LayerKey
from ...cluster.training.contributions import Attempt, Contributions, Part
from ...kernels.backward.accumulators import GradientAccumulators
from ...kernels.backward.ffn import BACKWARD_KERNELS, BackwardForm, PendingGradients
from ...kernels.slabs.layer_arithmetic import CpuLayer
from ...proto.errors import CallError, describe_error
from ...proto.expert_pb2 import Backward
from .compute import PendingCall, ReplyTensors, layer_of
from .weight_store import ExpertStore


class HostGradients:
    """The gradients of one host's experts in the attempt under way."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        self._contributions = Contributions()
        self._sums = GradientAccumulators()
        self._forms: dict[LayerKey, BackwardForm] = {}
        # Of the call that was answered last: its layer, and what is to be added up.
        self._pending: tuple[LayerKey, PendingGradients] | None = None

    def begin(self, attempt: Attempt, *, exact: bool = False) -> None:
        """Begin an attempt at a step, unless it is under way. Raises Superseded for an older one.

        With ``exact`` the order in which parts arrive does not show in float32 sums.
        """
        if self._contributions.begin(attempt):
            self._sums = GradientAccumulators(exact=exact)
            self._pending = None  # if an error came between an answer and what it adds up
            self._forms.clear()  # another model may have come under the name of one

    def check(self, backward: Backward) -> None:
        """Raise NotHere unless a call is of the attempt under way."""
        self._contributions.check(_attempt(backward))

    def answer(self, pending: PendingCall, *, exact: bool) -> ReplyTensors:
        """Compute the gradients of a call's rows and weights; `add_up` does the rest.

        ``exact`` asks for one row per assignment instead of one sum per token.
        """
        backward, layout = pending.frame.backward, pending.layout
        key = LayerKey(backward.call.model, backward.call.layer)
        layer = layer_of(self._store, key, [pending])
        if not isinstance(layer, CpuLayer):
            raise CallError(
                f"backward: this host computes on {self._store.device}; experts are trained on "
                "hosts with device: cpu"
            )
        x_TH, ids_TK, weights_TK = layout.call_tensors(pending.payload)
        grad_y_TH = layout.grad_tensor(pending.payload)
        buffer = pending.session.reply_buffer(pending.frame, layout)
        grad_x = layout.reply_tensor(buffer)
        grad_weights_TK = layout.grad_weights_tensor(buffer)
        kernel = BACKWARD_KERNELS["loop"]
        try:
            found = kernel(
                self._form(key, layer),
                layer.experts,
                x_TH,
                ids_TK,
                weights_TK,
                grad_y_TH,
                grad_x,
                grad_weights_TK,
            )
        except ValueError as error:
            raise CallError(f"backward: {key.model!r} is not open for training: {error}") from error
        part = Part(key, backward.worker, backward.microbatch, backward.part)
        if self._contributions.admit(_attempt(backward), part):
            self._pending = key, found
        return ReplyTensors(buffer, _bad_experts(ids_TK, grad_x, grad_weights_TK))

    def add_up(self) -> None:
        """Add up the gradients of the experts that the last call used, unless they were already."""
        if self._pending is None:
            return
        (key, gradients), self._pending = self._pending, None
        try:
            gradients.accumulate(self._sums, key.expert, key.expert(SHARED))
        except BaseException as error:
            self._contributions.break_off(f"{key}: {describe_error(error)}")
            raise

    def close(self, attempt: Attempt) -> GradientAccumulators:
        """Close the attempt under way for calls, and return its sums, which are the caller's now.

        They stay the same object until another attempt begins. Their keys are experts, and layers'
        shared tensors; those that no token has used are missing. Raises NotHere, and InternalError
        as `Contributions.close`.
        """
        self._contributions.close(attempt)
        return self._sums

    def forget(self) -> None:
        """Drop what was added up, and close the attempt under way: its run is over."""
        self._contributions.forget()
        self._sums = GradientAccumulators()
        self._pending = None

    def _form(self, key: LayerKey, layer: CpuLayer) -> BackwardForm:
        if key not in self._forms:
            gated = self._store.is_gated(key)
            self._forms[key] = BackwardForm.of(layer.form, gated=gated)
        return self._forms[key]


def _attempt(backward: Backward) -> Attempt:
    return Attempt(backward.run, backward.step, backward.attempt)


def _bad_experts(ids_TK: Tensor, grad_x: Tensor, grad_weights_TK: Tensor) -> list[int]:
    """Return the experts of rows whose gradients are not finite."""
    finite_T = torch.isfinite(grad_x.flatten(1)).all(dim=1) & torch.isfinite(grad_weights_TK).all(1)
    if finite_T.all():
        return []
    found = torch.unique(ids_TK[~finite_T]).tolist()
    return [expert for expert in found if expert >= 0]
