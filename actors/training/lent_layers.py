"""Layers of a training step that the trunk's process computes, with experts that hosts have lent.

Both halves of a call are computed here, and the gradients of the experts are added up here, until a
step takes them. A host may free a slot, or fill it again, at any moment: what was read while a slot
changed is thrown away before anything of it is added up, and hosts compute that half instead.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cluster.expert_keys import SHARED, ExpertKey, LayerKey
from ...kernels.backward.accumulators import GradientAccumulators, SumMemory
from ...kernels.backward.ffn import BACKWARD_KERNELS, BackwardForm
from ...kernels.backward.kept import KeptCall, keeping_forward, kept_backward
from ...kernels.ffn import all_finite, wide_dtype
from ...kernels.slabs.layer_arithmetic import CpuLayer
from ..router.lent_part import LayerReach
from ..router.router import Router
from ..runtime.devices import machine_memory

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptForward:
    """A forward call that was computed here."""

    reach: LayerReach
    rows: KeptCall


class LentLayers:
    """The calls of one trunk that are computed in its process, and the gradients of their experts.

    One thread at a time uses it.
    """

    def __init__(
        self, router: Router, model: str, dtype: torch.dtype, sums_limit_bytes: int | None
    ) -> None:
        """Take how much memory sums may need (None: a quarter of what the machine has free).

        Sums take 4 bytes for each parameter of the experts, of float64 experts 8. If those of the
        whole model are more than the limit, nothing is computed here.
        """
        self._router = router
        self._model = model
        self._wide = wide_dtype(dtype)
        self._limit_bytes = sums_limit_bytes
        self._fits: bool | None = None  # None: nothing was lent yet
        self._forms: dict[LayerKey, BackwardForm] = {}
        self._sums = GradientAccumulators()

    def forward(
        self, key: LayerKey, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, KeptForward] | None:
        """Compute a forward call; None: its backward half is to be sent to hosts."""
        if not self._may_compute():
            return None
        kept: list[KeptForward] = []
        calls = self._router.whole_calls

        def compute(
            reach: LayerReach, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor
        ) -> Tensor | None:
            layer, began = _plain(reach), calls.now()
            if layer is None:
                return None
            sum_TH = torch.empty(x_TH.shape, dtype=self._wide)
            # Whatever the model around it says: hosts know nothing of its contexts.
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                given = x_TH.detach(), ids_TK, weights_TK.detach().to(self._wide)
                rows = keeping_forward(layer.form, layer.experts, *given, sum_TH)
            out_TH = sum_TH.to(x_TH.dtype)
            if not all_finite(out_TH) or not reach.unchanged():
                return None
            kept.append(KeptForward(reach, rows))
            calls.learned(reach, began)
            return out_TH

        out_TH = self._router.compute_all(key, x_TH, ids_TK, weights_TK, compute)
        return None if out_TH is None else (out_TH, kept[0])

    def backward(
        self,
        key: LayerKey,
        kept: KeptForward | None,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        grad_y_TH: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Return the gradients of x and of the weights, and add those of the experts up.

        ``kept`` is what `forward` returned; None: activations are computed again from x. The result
        is None, and nothing is added up, if the call is to be sent to hosts.
        """
        if kept is None and not self._may_compute():
            return None
        calls = self._router.whole_calls
        began = calls.now()
        reach = calls.reach(key) if kept is None else kept.reach
        layer = None if reach is None else _plain(reach)
        if reach is None or layer is None or not reach.unchanged():
            return None
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if kept is None and reach.places(x_TH, ids_TK, weights_TK) is None:
                return None
            form = self._form(key, layer)
            grad_y_TH, wide_TK = grad_y_TH.to(self._wide), weights_TK.to(self._wide)
            grad_x_TH = torch.empty(x_TH.shape, dtype=self._wide)
            grad_weights_TK = torch.empty(weights_TK.shape, dtype=self._wide)
            given = wide_TK, grad_y_TH, grad_x_TH, grad_weights_TK
            if kept is None:
                pending = BACKWARD_KERNELS["loop"](form, layer.experts, x_TH, ids_TK, *given)
            else:
                pending = kept_backward(form, layer.experts, kept.rows, x_TH, *given)
            # What is not finite is sent, too: hosts say which expert makes it so.
            finite = all_finite(grad_x_TH) and all_finite(grad_weights_TK)
            if not finite or not reach.unchanged():
                return None
            pending.accumulate(self._sums, key.expert, key.expert(SHARED))
        calls.learned(reach, began)
        return grad_x_TH.to(x_TH), grad_weights_TK.to(weights_TK)

    def use(self, memory: SumMemory | None) -> None:
        """Forget the sums, and let those that follow lie in ``memory``."""
        self._sums = GradientAccumulators(memory=memory)

    def take(self) -> dict[ExpertKey, dict[str, Tensor]]:
        """Return the sums by expert and name, in the wide type, and forget them."""
        keys = [key for key in self._sums if isinstance(key, ExpertKey)]
        return {key: self._sums.take(key) for key in keys}

    def clear(self) -> None:
        """Forget the sums."""
        self._sums.clear()

    def _may_compute(self) -> bool:
        """Return whether the sums of all experts fit; that is found out once."""
        if self._fits is None:
            sums_bytes = self._router.whole_calls.elements(self._model) * self._wide.itemsize
            if not sums_bytes:
                return False
            if self._limit_bytes is None:
                self._limit_bytes = machine_memory()[1] // 4
            self._fits = sums_bytes <= self._limit_bytes
            log.info(
                "%s: sums of all experts' gradients take %d bytes, and this process may use %d for "
                "them: backward calls of lent experts are %s",
                self._model,
                sums_bytes,
                self._limit_bytes,
                "computed here" if self._fits else "sent to hosts",
            )
        return self._fits

    def _form(self, key: LayerKey, layer: CpuLayer) -> BackwardForm:
        if key not in self._forms:
            one = next(iter(layer.experts.values()))
            gated = one.up.numel() == 2 * one.down.numel()
            self._forms[key] = BackwardForm.of(layer.form, gated=gated)
        return self._forms[key]


def _plain(reach: LayerReach) -> CpuLayer | None:
    """Return a layer's experts if they have a backward pass: on a CPU, and not packed."""
    layer = reach.arithmetic
    if not isinstance(layer, CpuLayer) or any(e.is_packed for e in layer.experts.values()):
        return None
    return layer
