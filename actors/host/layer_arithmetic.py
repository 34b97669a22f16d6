"""What a host computes for a layer: on its CPU, or on its device.

Shape suffixes: T = tokens, H = hidden size, K = assignments of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ...kernels import ffn
from ...kernels.ffn import ExpertForm, ExpertWeights
from ...kernels.grouped.slots import LayerSlots, StepFlags
from ...proto.errors import NotHere


class LayerArithmetic(Protocol):
    """The experts of one layer that a host holds, in the versions that a call names."""

    # Where it takes ids; it takes everything else on the host's device.
    ids_device: torch.device

    def compute(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, out: Tensor, *, exact: bool
    ) -> None:
        """Write float32 sums (T, H), or with ``exact`` a row (T, K, H) for each assignment."""
        ...

    def bad_experts(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        """Return the experts that made ``out`` not finite from finite rows."""
        ...


class CpuLayer:
    """Experts in memory, one after another."""

    def __init__(self, form: ExpertForm, experts: Mapping[int, ExpertWeights]) -> None:
        # Kernels for CPUs sort tokens by expert in Python.
        self.ids_device = torch.device("cpu")
        self.form = form
        self.experts = experts

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
        self._flags = StepFlags.on(self.ids_device)

    def compute(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, out: Tensor, *, exact: bool
    ) -> None:
        # Triton comes with CUDA builds of PyTorch, and hosts on CPUs do without it.
        from ...kernels.grouped import ffn as grouped

        if exact:
            grouped.exact_rows(self.slots, x_TH, ids_TK, weights_TK, out, self._flags)
        else:
            grouped.grouped_ffn(self.slots, x_TH, ids_TK, weights_TK, out, self._flags)

    def bad_experts(self, x_TH: Tensor, ids_TK: Tensor, out: Tensor) -> list[int]:
        """Search for the experts only if the kernel met a sum that is not finite.

        Raises NotHere if an expert was not there.
        """
        missing, infinite = self._flags.both.tolist()
        if missing:
            raise NotHere("an expert of this call left the device while the call waited")
        if not infinite:
            return []
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
