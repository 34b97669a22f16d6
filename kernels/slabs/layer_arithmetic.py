"""What experts of one layer compute: on a CPU, or on a device.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .. import ffn
from ..ffn import ExpertForm, ExpertWeights
from ..fused import LayerBank
from ..grouped.slots import LayerSlots, StepFlags

if TYPE_CHECKING:
    from ..grouped.backward import PendingSlotGradients


class MissingExpert(LookupError):
    """An assignment names an expert that is in no slot."""


class LayerArithmetic(Protocol):
    """Experts of one layer, each in one version, for one call at a time."""

    # Where it takes ids; it takes everything else where the experts are.
    ids_device: torch.device

    def for_a_call(self) -> LayerArithmetic:
        """Return the same experts for a call that runs beside others."""
        ...

    def compute(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, out: Tensor, *, exact: bool
    ) -> None:
        """Write sums (T, H), or with ``exact`` a row (T, K, H) for each assignment.

        They are float32, for float64 experts float64.
        """
        ...

    def bad_experts(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        """Return the experts that made ``out`` not finite from finite rows; `compute` made it last.

        Raises MissingExpert.
        """
        ...


class CpuLayer:
    """Experts in memory, one after another."""

    def __init__(self, form: ExpertForm, experts: Mapping[int, ExpertWeights]) -> None:
        # Kernels for CPUs sort tokens by expert in Python.
        self.ids_device = torch.device("cpu")
        self.form = form
        self.experts = experts

    def for_a_call(self) -> CpuLayer:
        return self

    def bank(self) -> LayerBank | None:
        """Return what computes a whole call at once, if there is such a kernel.

        Each expert's place in it is its `ExpertWeights.place`.
        """
        banks = {expert.bank for expert in self.experts.values()}
        return banks.pop() if len(banks) == 1 and self.form.post_norm is None else None

    def compute(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, out: Tensor, *, exact: bool
    ) -> None:
        run = ffn.exact_rows if exact else ffn.loop_kernel
        run(self.form, self.experts, x_TH, ids_TK, weights_TK, out)

    def bad_experts(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        return ffn.bad_experts(self.form, self.experts, x_TH, ids_TK, out)


class DeviceLayer:
    """Experts in slots of a device, all in one grouped computation."""

    def __init__(self, slots: LayerSlots) -> None:
        self.slots = slots
        self.ids_device = slots.table_LE.device
        self.flags = StepFlags.on(self.ids_device)  # of what `compute` or `backward` met

    def for_a_call(self) -> DeviceLayer:
        return DeviceLayer(self.slots)

    def compute(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, out: Tensor, *, exact: bool
    ) -> None:
        # Triton comes with CUDA builds of PyTorch, and CPUs do without it.
        from ..grouped import ffn as grouped

        if exact:
            grouped.exact_rows(self.slots, x_TH, ids_TK, weights_TK, out, self.flags)
        else:
            grouped.grouped_ffn(self.slots, x_TH, ids_TK, weights_TK, out, self.flags)

    def backward(
        self,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        grad_y_TH: Tensor,
        grad_x: Tensor,
        grad_weights_TK: Tensor,
    ) -> PendingSlotGradients:
        """Write the gradients of x and of the gate weights, as `grouped_backward` does.

        ``flags`` says of both whether they are finite. Raises ValueError for float64 experts.
        """
        from ..grouped import backward as grouped

        pending = grouped.grouped_backward(
            self.slots, x_TH, ids_TK, weights_TK, grad_y_TH, grad_x, grad_weights_TK, self.flags
        )
        self.flags.infinite.logical_or_(~torch.isfinite(grad_weights_TK).all())
        return pending

    def layer(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, flags: StepFlags, *, exact: bool
    ) -> Tensor:
        """Return the sum over K of weight * expert(x), (T, H) in x's dtype.

        Ids outside [0, E) are unused. Nothing waits for the device; ``flags`` says if anything is
        wrong.
        """
        from ..grouped import ffn as grouped

        out_TH = torch.empty_like(x_TH)
        grouped.grouped_ffn(self.slots, x_TH, ids_TK, weights_TK, out_TH, flags, exact=exact)
        return out_TH

    def bad_experts(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        """Search for the experts only if the kernel met a sum that is not finite."""
        missing, infinite = self.flags.read()
        if missing:
            raise MissingExpert("an expert of this call is in no slot")
        return self.search(x_TH, ids_TK, out) if infinite else []

    def search(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        """Return the experts that made ``out`` not finite from finite rows."""
        form, experts = self._loose(ids_TK)
        return ffn.bad_experts(form, experts, x_TH, ids_TK.cpu(), out)

    def _loose(self, ids_TK: Tensor) -> tuple[ExpertForm, dict[int, ExpertWeights]]:
        """Return the slots of these assignments as single experts."""
        slots, table = self.slots, self.slots.table_LE[0].tolist()
        activate = slots.form.in_slots
        form = ExpertForm(False, activate, slots.form.post_norm)
        experts = {}
        for expert in torch.unique(ids_TK).tolist():
            if expert >= 0 and table[expert] >= 0:
                at = table[expert]
                up_bias, down_bias = slots.up_bias_SU, slots.down_bias_SH
                experts[expert] = ExpertWeights(
                    up=slots.up_SUH[at],
                    down=slots.down_SHI[at],
                    up_bias=None if up_bias is None else up_bias[at],
                    down_bias=None if down_bias is None else down_bias[at],
                )
        return form, experts
