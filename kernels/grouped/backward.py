"""The grouped backward pass over slots of device memory: no synchronisation, no atomics.

`grouped_backward` computes the gradients of a layer call's x and gate weights. What it returns adds
the gradients of the experts' weights to sums (`SlotGradients`). Both are enqueued on the current
stream; nothing waits for the device.

Shape suffixes: T = tokens, K = assignments of a token, N = T * K, H = hidden size, I = intermediate
size, U = rows of the up-projection (2I if gated, otherwise I), S = slots, E = experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backward_programs as triton_programs
from .activation import value_and_gradient
from .configurations import (
    BackwardConfiguration,
    Blocks,
    Configuration,
    backward_configuration_for,
)
from .ffn import TiledCall, unused
from .programs import TILE_FIELDS
from .slots import LayerSlots, StepFlags
from .tiles import Tiles, cdiv, power_of_2

programs: Any = triton_programs  # a launch takes options that no signature shows
_ASSIGNMENTS_OF_A_PROGRAM = 16  # of `grad_gate_weights`


@dataclass(frozen=True, slots=True)
class SlotGradients:
    """Sums of gradients by a tensor's name, each (places, ...), in the layout of slots."""

    sums: dict[str, Tensor]

    @classmethod
    def zeros(
        cls, slots: LayerSlots, *, places: int | None = None, exact: bool = False
    ) -> SlotGradients:
        """Make sums in float32, or with ``exact`` in float64.

        They have so many ``places`` (None: one for each slot, whatever layer it is of).
        """
        dtype = torch.float64 if exact else torch.float32
        parts = {
            "up": slots.up_SUH,
            "down": slots.down_SHI,
            "up_bias": slots.up_bias_SU,
            "down_bias": slots.down_bias_SH,
        }
        return cls(
            {
                name: part.new_zeros(
                    (part.shape[0] if places is None else places, *part.shape[1:]), dtype=dtype
                )
                for name, part in parts.items()
                if part is not None
            }
        )

    def at(self, place: int) -> dict[str, Tensor]:
        """Return an expert's sums; `from_slot` brings them into the model's layout."""
        return {name: one[place] for name, one in self.sums.items()}


@dataclass(frozen=True, slots=True)
class _Product:
    """The gradient of one matrix: left.T @ right over each expert's rows, and the left rows' sum.

    An assignment's row of ``left`` is ``assignment // left_rows``, multiplied by its gate weight if
    there is one, and likewise that of ``right``.
    """

    name: str
    tiles: Tiles
    config: BackwardConfiguration
    left: Tensor
    left_rows: int
    weights_TK: Tensor | None
    right: Tensor
    right_rows: int

    def add_to(self, into: SlotGradients) -> None:
        out, bias = into.sums[self.name], into.sums.get(f"{self.name}_bias")
        tiles, config = self.tiles, self.config
        rows, columns = out.shape[1:]
        blocks = cdiv(rows, config.weight_rows) * cdiv(columns, config.weights.columns)
        programs.weight_gradients[(tiles.spans_E3.shape[0] * blocks,)](
            self.left,
            self.right,
            self.left if self.weights_TK is None else self.weights_TK,
            out,
            out if bias is None else bias,
            tiles.order_N,
            tiles.spans_E3,
            self.left_rows,
            self.right_rows,
            rows,
            columns,
            self.left.stride(0),
            self.right.stride(0),
            out.stride(0),
            0 if bias is None else bias.stride(0),
            WEIGHTED=self.weights_TK is not None,
            HAS_BIAS=bias is not None,
            WIDEN=out.device.type == "cpu",
            BLOCK_M=config.weight_rows,
            BLOCK_N=config.weights.columns,
            BLOCK_K=config.weights.inner,
            num_warps=config.weights.warps,
            num_stages=config.weights.stages,
        )


class PendingSlotGradients:
    """The gradients of weights that a call has yet to add.

    It keeps N * (U + I) numbers in the experts' type, with a norm after the experts N * H more,
    and the call's own x, gate weights and gradients, which must stay as they are until then.
    """

    def __init__(self, *products: _Product) -> None:
        self._products: tuple[_Product, ...] | None = products

    def accumulate(self, into: SlotGradients, places_E: Tensor | None = None) -> Tensor | None:
        """Add the gradients of each used expert's tensors, and let their memory go.

        ``places_E`` (int32) has the place of each expert's sums; None: that of its slot. Nothing is
        added for an expert whose place is -1. Returns how many rows each expert has had, (E,), or
        None if the call has no tokens. Raises RuntimeError the second time: what is added twice is
        trained twice.
        """
        if self._products is None:
            raise RuntimeError("the gradients of this call have been added already")
        products, self._products = self._products, None
        if not products:
            return None
        spans_E3 = products[0].tiles.spans_E3
        if places_E is not None:
            spans_E3[:, 0] = places_E
        for product in products:
            product.add_to(into)
        return spans_E3[:, 2]


def grouped_backward(
    slots: LayerSlots,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    grad_y_TH: Tensor,
    grad_x: Tensor,
    grad_weights_TK: Tensor,
    flags: StepFlags,
    *,
    configuration: BackwardConfiguration | None = None,
) -> PendingSlotGradients:
    """Write the gradients of x and of the gate weights; return what is left to add.

    The first three tensors are those of the forward call (`grouped_ffn`), and ``grad_y_TH`` is the
    gradient of its sums; all gradients are float32. ``grad_x`` is (T, H), the sum over a token's
    assignments, or (T, K, H), a row for each. An expert without a slot sets ``flags.missing`` and
    is left out; a gradient of x that is not finite sets ``flags.infinite``. Parameters of a
    post-expert norm get no gradient here.

    Raises ValueError for float64 experts.
    """
    if slots.up_SUH.dtype == torch.float64:
        raise ValueError("the grouped backward pass has no products in float64; use the CPU's")
    if ids_TK.shape[0] == 0:
        return PendingSlotGradients()
    config = configuration or backward_configuration_for(slots.up_SUH.element_size())
    call = _BackwardCall(slots, x_TH, ids_TK.contiguous(), weights_TK.contiguous(), flags, config)
    norm = slots.norm()
    if norm is None:
        grad, grad_rows, weights = grad_y_TH, call.top_k, call.weights_TK
    else:
        # After the norm each assignment has its own row, which is multiplied by its weight already.
        grad, grad_rows, weights = call.before_norm(norm, grad_y_TH, grad_weights_TK), 1, None
    act_NI, grad_up_NU, dots_NB = call.hidden(grad, grad_rows, weights)
    if norm is None:
        call.gate_weights(dots_NB, grad_y_TH, grad_weights_TK)
    call.grad_x(grad_up_NU, grad_x)
    tiles = call.tiles
    return PendingSlotGradients(
        _Product("up", tiles, config, grad_up_NU, 1, None, x_TH, call.top_k),
        _Product("down", tiles, config, grad, grad_rows, weights, act_NI, 1),
    )


class _BackwardCall:
    """One backward call: its assignments in tiles, and the launches."""

    def __init__(
        self,
        slots: LayerSlots,
        x_TH: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        flags: StepFlags,
        config: BackwardConfiguration,
    ) -> None:
        self._slots, self._x_TH, self._flags, self._config = slots, x_TH, flags, config
        self.weights_TK = weights_TK
        self.tokens, self.top_k = ids_TK.shape
        self.tiles = Tiles(slots, ids_TK, flags, config.rows, has_spans=True)
        forward = Configuration(config.rows, config.hidden, config.x)
        self._forward = TiledCall(slots, ids_TK, flags, forward, self.tiles)
        self._widen = x_TH.device.type == "cpu"

    def before_norm(
        self,
        norm: Callable[[Tensor], Tensor],
        grad_y_TH: Tensor,
        grad_weights_TK: Tensor,
    ) -> Tensor:
        """Return the gradient of the down-projections, (N, H); write that of the gate weights."""
        y_NH = self._forward.down(self._forward.up(self._x_TH))
        weighted_TKH = grad_y_TH[:, None] * self.weights_TK[..., None]
        # Rows of unused assignments are uninitialised; no kernel reads their gradients.
        y_NH, grad_NH = value_and_gradient(norm, y_NH, weighted_TKH.view(y_NH.shape).to(y_NH.dtype))
        y_TKH = y_NH.view(self.tokens, self.top_k, -1)
        torch.sum(y_TKH * grad_y_TH[:, None], dim=2, out=grad_weights_TK)
        grad_weights_TK.masked_fill_(unused(self._slots, self.tiles.ids_TK), 0.0)
        return grad_NH

    def hidden(
        self, grad: Tensor, grad_rows: int, weights_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return activated rows (N, I), the gradients of the up-projections (N, U), and products.

        ``grad`` is the gradient of the down-projections: an assignment's row is ``assignment //
        grad_rows``, to be multiplied by its weight if there is one. The sum of an assignment's
        products (N, blocks) is <gradient of the activated row, the activated row>, not weighted.
        """
        slots, x_TH, known = self._slots, self._x_TH, self._slots.form.activation
        size, hidden = slots.up_SUH.shape[1:]
        width = slots.down_SHI.shape[2]
        if size not in (width, 2 * width):
            raise ValueError(
                f"up-projections have {size} rows, and down-projections {width} columns"
            )
        count, blocks = self.tiles.ids_TK.numel(), self._config.hidden
        if known is not None:
            act_NI, grad_up_NU = x_TH.new_empty(count, width), x_TH.new_empty(count, size)
        else:  # PyTorch computes with unused rows, too
            wide = torch.float32
            act_NI = x_TH.new_zeros(count, width, dtype=wide)
            grad_up_NU = x_TH.new_zeros(count, size, dtype=wide)
        column_blocks = cdiv(width, blocks.columns)
        dots_NB = x_TH.new_empty(count, column_blocks, dtype=torch.float32)
        bias = slots.up_bias_SU
        programs.hidden_gradients[(self.tiles.count * column_blocks,)](
            x_TH,
            grad,
            grad if weights_TK is None else weights_TK,
            slots.up_SUH,
            slots.up_SUH if bias is None else bias,
            slots.down_SHI,
            act_NI,
            grad_up_NU,
            dots_NB,
            *self._tile_arguments(),
            self.top_k,
            grad_rows,
            hidden,
            width,
            x_TH.stride(0),
            grad.stride(0),
            slots.up_SUH.stride(0),
            0 if bias is None else bias.stride(0),
            slots.down_SHI.stride(0),
            1.0 if known is None else known.alpha,
            0.0 if known is None else known.limit,
            0.0 if known is None else known.up_offset,
            FUNCTION="none" if known is None else known.function,
            KNOWN=known is not None,
            GATED=size == 2 * width,
            LIMITED=known is not None and known.limit < math.inf,
            HAS_BIAS=bias is not None,
            WEIGHTED=weights_TK is not None,
            **self._options(blocks),
        )
        if known is not None:
            return act_NI, grad_up_NU, dots_NB
        # The program has written the up-projections, and the gradients of the activated rows.
        grad_NI = act_NI
        act_NI, grad_up_NU = value_and_gradient(slots.form.in_slots, grad_up_NU, grad_NI)
        dots_N1 = (grad_NI * act_NI).sum(dim=1, keepdim=True)
        if weights_TK is not None:
            grad_up_NU = grad_up_NU * weights_TK.view(-1, 1)
        return act_NI.to(x_TH.dtype), grad_up_NU.to(x_TH.dtype), dots_N1

    def gate_weights(self, dots_NB: Tensor, grad_y_TH: Tensor, grad_weights_TK: Tensor) -> None:
        slots, bias = self._slots, self._slots.down_bias_SH
        count, column_blocks = dots_NB.shape
        hidden = grad_y_TH.shape[1]
        programs.grad_gate_weights[(cdiv(count, _ASSIGNMENTS_OF_A_PROGRAM),)](
            dots_NB,
            grad_y_TH,
            dots_NB if bias is None else bias,
            grad_weights_TK,
            self.tiles.ids_TK,
            slots.table_LE,
            slots.layer,
            count,
            slots.table_LE.shape[1],
            column_blocks,
            self.top_k,
            hidden,
            grad_y_TH.stride(0),
            0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_N=_ASSIGNMENTS_OF_A_PROGRAM,
            BLOCK_B=min(64, power_of_2(column_blocks)),
            BLOCK_H=min(128, power_of_2(hidden)),
            num_warps=4,
        )

    def grad_x(self, grad_up_NU: Tensor, grad_x: Tensor) -> None:
        """Write the sums over a token's assignments, (T, H), or all rows, (T, K, H)."""
        slots, blocks = self._slots, self._config.x
        size, hidden = slots.up_SUH.shape[1:]
        count = grad_up_NU.shape[0]
        rows_NH = self._x_TH.new_empty(count, hidden)
        programs.grad_x_rows[(self.tiles.count * cdiv(hidden, blocks.columns),)](
            grad_up_NU,
            slots.up_SUH,
            rows_NH,
            *self._tile_arguments(),
            hidden,
            size,
            slots.up_SUH.stride(0),
            **self._options(blocks),
        )
        if grad_x.dim() == 2:
            # The gate weights are in the rows already.
            self._forward.combine(rows_NH, torch.ones_like(self.weights_TK), grad_x)
        else:
            grad_x.copy_(rows_NH.view(grad_x.shape))
            grad_x.masked_fill_(unused(slots, self.tiles.ids_TK)[..., None], 0.0)
            self._flags.infinite.logical_or_(~torch.isfinite(grad_x).all())

    def _tile_arguments(self) -> tuple[Any, ...]:
        slots, tiles = self._slots, self.tiles
        return (
            tiles.ids_TK,
            slots.table_LE,
            slots.layer,
            tiles.order_N,
            tiles.records,
            tiles.total,
            slots.table_LE.shape[1],
        )

    def _options(self, blocks: Blocks) -> dict[str, Any]:
        return {
            "WIDEN": self._widen,
            "TILE_FIELDS": TILE_FIELDS,
            "BLOCK_M": self._config.rows,
            "BLOCK_N": blocks.columns,
            "BLOCK_K": blocks.inner,
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }
