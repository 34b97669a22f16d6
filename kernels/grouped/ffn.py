"""The grouped expert FFN over slots of device memory: no synchronisation, no atomics.

`grouped_ffn` computes a layer call from a `LayerSlots`: the experts' matrices as they lie in slots,
and a table that says in which slot each expert lies. Layer and table are read by the programs
(`programs`), on the device; a captured CUDA graph stays right when experts move.

Shape suffixes: T = tokens, K = assignments of a token, N = T * K, H = hidden size, I = intermediate
size, U = rows of the up-projection (2I if gated, otherwise I), S = slots, L = layers, E = experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import programs as triton_programs
from .configurations import Blocks, Configuration, configuration_for
from .slots import LayerSlots, StepFlags
from .tiles import Tiles, cdiv, power_of_2

programs: Any = triton_programs  # a launch takes options that no signature shows
_COLUMNS_OF_A_STEP = 1024  # that `combine` adds at once


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

    ``ids_TK`` is outside [0, E) where an assignment is unused. An expert without a slot sets
    ``flags.missing`` and is left out; a sum that is not finite sets ``flags.infinite``. With
    ``exact`` a row's bits depend on its own input only. Everything is enqueued on the current
    stream; nothing waits for the device.
    """
    tokens, top_k = ids_TK.shape
    if tokens == 0:
        return
    config = configuration or _configuration(slots, tokens * top_k, exact=exact)
    call = TiledCall(slots, ids_TK.contiguous(), flags, config)
    call.combine(call.rows(x_TH), weights_TK.contiguous(), out_TH)


def exact_rows(
    slots: LayerSlots,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    out_TKH: Tensor,
    flags: StepFlags,
) -> None:
    """Write weight * expert(x) of each assignment, float32, zero where an assignment is unused.

    Added up in the order of K in float32, the rows give the bits of `grouped_ffn` with ``exact``.
    """
    if ids_TK.numel() == 0:
        return
    config = _configuration(slots, ids_TK.numel(), exact=True)
    call = TiledCall(slots, ids_TK.contiguous(), flags, config)
    y_TKH = call.rows(x_TH).view(out_TKH.shape)
    torch.mul(y_TKH.float(), weights_TK[..., None], out=out_TKH)
    out_TKH.masked_fill_(unused(slots, ids_TK)[..., None], 0.0)
    flags.infinite.logical_or_(~torch.isfinite(out_TKH).all())


def unused(slots: LayerSlots, ids_TK: Tensor) -> Tensor:
    """Return which assignments, (T, K) bool, name no expert, or one that is in no slot."""
    table_E = slots.table_LE.index_select(0, slots.layer.view(1)).view(-1)
    experts = table_E.shape[0]
    slot_TK = table_E[ids_TK.long().clamp(0, experts - 1)]
    return (ids_TK < 0) | (ids_TK >= experts) | (slot_TK < 0)


def _configuration(slots: LayerSlots, assignments: int, *, exact: bool) -> Configuration:
    described = all(_can_be_described(m) for m in (slots.up_SUH, slots.down_SHI))
    return configuration_for(assignments, slots.table_LE.shape[1], described=described, exact=exact)


def _can_be_described(matrices_SNK: Tensor) -> bool:
    """Return whether the copy engine can load blocks: rows and slots begin at 16 bytes."""
    item = matrices_SNK.element_size()
    return (
        matrices_SNK.is_cuda
        and item == 2
        and torch.cuda.get_device_capability(matrices_SNK.device) >= (9, 0)
        and matrices_SNK.data_ptr() % 16 == 0
        and all(stride * item % 16 == 0 for stride in matrices_SNK.stride()[:2])
    )


class TiledCall:
    """One layer call: its assignments in tiles, and the launches."""

    def __init__(
        self,
        slots: LayerSlots,
        ids_TK: Tensor,
        flags: StepFlags,
        config: Configuration,
        tiles: Tiles | None = None,
    ) -> None:
        self._slots, self._flags, self._config = slots, flags, config
        self._tokens, self._top_k = ids_TK.shape
        self._assignments = ids_TK.numel()
        self._experts = slots.table_LE.shape[1]
        # Assignments of one token name different experts, so nothing is gained by sorting them.
        direct = self._tokens == 1
        self.tiles = tiles or Tiles(slots, ids_TK, flags, config.rows, direct=direct)
        self._widen = slots.up_SUH.device.type == "cpu"

    def rows(self, x_TH: Tensor) -> Tensor:
        """Return the experts' outputs, (N, H), in the order of the assignments, not weighted.

        Rows of unused assignments are left as the memory was.
        """
        y_NH = self.down(self.up(x_TH))
        norm = self._slots.norm()
        return y_NH if norm is None else norm(y_NH)

    def up(self, x_TH: Tensor) -> Tensor:
        """Return the activated rows, (N, I), sorted by expert."""
        slots, form = self._slots, self._slots.form
        rows, hidden = slots.up_SUH.shape[1:]
        known = form.activation
        gated = known is not None and known.gated
        width = rows // 2 if gated else rows
        out = torch.empty(self._assignments, width, dtype=x_TH.dtype, device=x_TH.device)
        blocks, bias = self._config.up, slots.up_bias_SU
        programs.up[(self.tiles.count * cdiv(width, blocks.columns),)](
            x_TH,
            slots.up_SUH,
            _matrices(slots.up_SUH, blocks),
            slots.up_SUH if bias is None else bias,
            out,
            self.tiles.ids_TK,
            slots.table_LE,
            slots.layer,
            self.tiles.order_N,
            self.tiles.records,
            self.tiles.total,
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
            DIRECT=self.tiles.direct,
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
            return form.in_slots(out).contiguous()
        return out

    def down(self, act_NI: Tensor) -> Tensor:
        """Return the down-projections, (N, H), in the order of the assignments."""
        slots = self._slots
        hidden, width = slots.down_SHI.shape[1:]
        out_NH = torch.empty(self._assignments, hidden, dtype=act_NI.dtype, device=act_NI.device)
        blocks, bias = self._config.down, slots.down_bias_SH
        programs.down[(self.tiles.count * cdiv(hidden, blocks.columns),)](
            act_NI,
            _descriptor(act_NI, [self._config.rows, blocks.inner]) if blocks.described else None,
            slots.down_SHI,
            _matrices(slots.down_SHI, blocks),
            slots.down_SHI if bias is None else bias,
            out_NH,
            self.tiles.ids_TK,
            slots.table_LE,
            slots.layer,
            self.tiles.order_N,
            self.tiles.records,
            self.tiles.total,
            self._experts,
            hidden,
            width,
            slots.down_SHI.stride(0),
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            DIRECT=self.tiles.direct,
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
        columns = min(_COLUMNS_OF_A_STEP, power_of_2(hidden))
        programs.combine[(self._tokens, cdiv(hidden, columns))](
            y_NH,
            self.tiles.ids_TK,
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
