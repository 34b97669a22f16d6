"""The grouped expert FFN over slots of device memory: no synchronisation, no atomics.

`grouped_ffn` computes a layer call from a `LayerSlots`: the experts' matrices as they lie in slots,
and a table that says in which slot each expert lies. Layer and table are read by the programs
(`programs`), on the device; a captured CUDA graph stays right when experts move.

Shape suffixes: T = tokens, K = assignments of a token, N = T * K, H = hidden size, I = intermediate
size, U = rows of the up-projection (2I if gated, otherwise I), S = slots, L = layers, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import programs
from .activation import Activation
from .configurations import EXACT, Blocks, Configuration, configuration_for

_IDS_OF_A_STEP = 1024  # that `align` reads at once
_COLUMNS_OF_A_STEP = 1024  # that `combine` adds at once


@dataclass(frozen=True, slots=True)
class SlotForm:
    """What the experts of a layer have in common, apart from their weights.

    ``activate`` is for a function that `Activation` does not know; it maps (N, U) to (N, I).
    ``post_norm`` maps (N, H) to (N, H).
    """

    activation: Activation | None
    activate: Callable[[Tensor], Tensor] | None = None
    post_norm: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """Slots with experts in the kernel's layout, as `slot_matrices` gives it."""

    form: SlotForm
    up_SUH: Tensor
    down_SHI: Tensor
    up_bias_SU: Tensor | None
    down_bias_SH: Tensor | None
    table_LE: Tensor  # int32: the slot of an expert, or -1
    layer: Tensor  # int32, a single number: the row of the table

    def __post_init__(self) -> None:
        for name in ("up_SUH", "down_SHI"):
            matrix = getattr(self, name)
            if matrix.stride()[1:] != (matrix.shape[2], 1):
                raise ValueError(
                    f"{name}: every slot must be contiguous, but has {matrix.stride()}"
                )
        if self.table_LE.dtype != torch.int32 or not self.table_LE.is_contiguous():
            raise ValueError("table_LE must be contiguous and int32")


@dataclass(frozen=True, slots=True)
class StepFlags:
    """What went wrong in any layer call since the caller cleared them, each an int32 of 0 or 1."""

    missing: Tensor  # an assignment names an expert without a slot
    infinite: Tensor  # a sum is not finite

    @classmethod
    def on(cls, device: torch.device) -> StepFlags:
        both = torch.zeros(2, dtype=torch.int32, device=device)
        return cls(both[0], both[1])


def slot_matrices(
    activation: Activation | None, up: Tensor, down: Tensor, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Return the matrices in the kernel's layout: (U, H) with all gates first, and (H, I)."""
    if transposed:
        up, down = up.t(), down.t()
    return _gates_first(activation, up).contiguous(), down.contiguous()


def slot_bias(activation: Activation | None, up_bias_U: Tensor) -> Tensor:
    return _gates_first(activation, up_bias_U).contiguous()


def _gates_first(activation: Activation | None, rows: Tensor) -> Tensor:
    if activation is None or not activation.interleaved:
        return rows
    return torch.cat([rows[::2], rows[1::2]])


def grouped_ffn(
    slots: LayerSlots,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TH: Tensor,
    flags: StepFlags,
    *,
    exact: bool = False,
    configuration: Configuration | None = None,
) -> None:
    """Write the sum over K of weight * expert(x) to ``out_TH``, added up in float32.

    ``ids_TK`` is -1 where an assignment is unused. An expert without a slot sets
    ``flags.missing`` and is left out; a sum that is not finite sets ``flags.infinite``. With
    ``exact`` a row's bits depend on its own input only. Everything is enqueued on the current
    stream; nothing waits for the device.
    """
    tokens, top_k = ids_TK.shape
    if tokens == 0:
        return
    config = configuration or (
        EXACT if exact else configuration_for(tokens * top_k, slots.table_LE.shape[1])
    )
    call = TiledCall(slots, ids_TK.contiguous(), flags, config)
    act_NI = call.up(x_TH)
    y_NH = call.down(act_NI)
    if slots.form.post_norm is not None:
        y_NH = slots.form.post_norm(y_NH)
    call.combine(y_NH, weights_TK.contiguous(), out_TH)


class TiledCall:
    """One layer call: its assignments in tiles, and the launches."""

    def __init__(
        self, slots: LayerSlots, ids_TK: Tensor, flags: StepFlags, config: Configuration
    ) -> None:
        self._slots, self._ids_TK, self._flags, self._config = slots, ids_TK, flags, config
        self._tokens, self._top_k = ids_TK.shape
        self._assignments = ids_TK.numel()
        self._experts = slots.table_LE.shape[1]
        # Assignments of one token name different experts, so nothing is gained by sorting them.
        self._direct = self._tokens == 1
        self._widen = slots.up_SUH.device.type == "cpu"
        device = ids_TK.device
        if self._direct:
            self._tiles = self._assignments
            self._order_N = self._records = self._total = ids_TK
            return
        used = min(self._experts, self._assignments)
        # Each expert's last tile may have a single row.
        self._tiles = used + (self._assignments - used) // config.rows
        self._order_N = torch.empty(self._assignments, dtype=torch.int32, device=device)
        self._records = torch.empty(
            self._tiles, programs.TILE_FIELDS, dtype=torch.int32, device=device
        )
        self._total = torch.empty(1, dtype=torch.int32, device=device)
        programs.align[(self._experts,)](
            ids_TK,
            slots.table_LE,
            slots.layer,
            self._order_N,
            self._records,
            self._total,
            flags.missing,
            self._assignments,
            self._experts,
            TILE_FIELDS=programs.TILE_FIELDS,
            BLOCK_E=_power_of_2(self._experts + 1),
            BLOCK_N=min(_IDS_OF_A_STEP, max(32, _power_of_2(self._assignments))),
            BLOCK_M=config.rows,
            BLOCK_T=64,
            num_warps=4,
        )

    def up(self, x_TH: Tensor) -> Tensor:
        """Return the activated rows, (N, I), sorted by expert."""
        slots, form = self._slots, self._slots.form
        rows, hidden = slots.up_SUH.shape[1:]
        known = form.activation
        gated = known is not None and known.gated
        width = rows // 2 if gated else rows
        out = torch.empty(self._assignments, width, dtype=x_TH.dtype, device=x_TH.device)
        blocks, bias = self._config.up, slots.up_bias_SU
        programs.up[(self._tiles * _cdiv(width, blocks.columns),)](
            x_TH,
            slots.up_SUH,
            _matrices(slots.up_SUH, blocks),
            slots.up_SUH if bias is None else bias,
            out,
            self._ids_TK,
            slots.table_LE,
            slots.layer,
            self._order_N,
            self._records,
            self._total,
            self._flags.missing,
            self._experts,
            self._top_k,
            hidden,
            width,
            x_TH.stride(0),
            slots.up_SUH.stride(0),
            0 if bias is None else bias.stride(0),
            1.0 if known is None else known.alpha,
            0.0 if known is None else known.limit,
            0.0 if known is None else known.up_offset,
            FUNCTION="none" if known is None else known.function,
            GATED=gated,
            LIMITED=known is not None and known.limit < float("inf"),
            HAS_BIAS=bias is not None,
            DIRECT=self._direct,
            WIDEN=self._widen,
            TILE_FIELDS=programs.TILE_FIELDS,
            EVEN=width % blocks.columns == 0 and hidden % blocks.inner == 0,
            DESCRIBED=blocks.described,
            SWAPPED=blocks.swapped,
            BLOCK_M=self._config.rows,
            BLOCK_N=blocks.columns,
            BLOCK_K=blocks.inner,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        if known is None:
            assert form.activate is not None, "a form has an activation or a function"
            return form.activate(out).contiguous()
        return out

    def down(self, act_NI: Tensor) -> Tensor:
        """Return the experts' outputs, (N, H), in the order of the assignments, not weighted.

        Rows of unused assignments are left as the memory was.
        """
        slots = self._slots
        hidden, width = slots.down_SHI.shape[1:]
        out_NH = torch.empty(self._assignments, hidden, dtype=act_NI.dtype, device=act_NI.device)
        blocks, bias = self._config.down, slots.down_bias_SH
        programs.down[(self._tiles * _cdiv(hidden, blocks.columns),)](
            act_NI,
            _descriptor(act_NI, [self._config.rows, blocks.inner]) if blocks.described else None,
            slots.down_SHI,
            _matrices(slots.down_SHI, blocks),
            slots.down_SHI if bias is None else bias,
            out_NH,
            self._ids_TK,
            slots.table_LE,
            slots.layer,
            self._order_N,
            self._records,
            self._total,
            self._experts,
            hidden,
            width,
            slots.down_SHI.stride(0),
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            DIRECT=self._direct,
            WIDEN=self._widen,
            TILE_FIELDS=programs.TILE_FIELDS,
            EVEN=hidden % blocks.columns == 0 and width % blocks.inner == 0,
            DESCRIBED=blocks.described,
            SWAPPED=blocks.swapped,
            BLOCK_M=self._config.rows,
            BLOCK_N=blocks.columns,
            BLOCK_K=blocks.inner,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return out_NH

    def combine(self, y_NH: Tensor, weights_TK: Tensor, out_TH: Tensor) -> None:
        slots, hidden = self._slots, y_NH.shape[1]
        columns = min(_COLUMNS_OF_A_STEP, _power_of_2(hidden))
        programs.combine[(self._tokens, _cdiv(hidden, columns))](
            y_NH,
            self._ids_TK,
            slots.table_LE,
            slots.layer,
            weights_TK,
            out_TH,
            self._flags.infinite,
            self._experts,
            self._top_k,
            hidden,
            out_TH.stride(0),
            BLOCK_H=columns,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _matrices(matrices_SNK: Tensor, blocks: Blocks) -> TensorDescriptor | None:
    if not blocks.described:
        return None
    return _descriptor(matrices_SNK, [1, blocks.columns, blocks.inner])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(value: int) -> int:
    """Return the smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()
