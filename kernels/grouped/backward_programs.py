"""Triton programs of the grouped backward pass. `backward` launches them, after `align`.

    hidden_gradients  a tile's rows times gate and up matrix once more, and the gradients of its
                      outputs times the down matrix: the activated rows, and the gradients of what
                      the up-projection gave
    grad_x_rows       those times the up matrix: a row of grad_x for each assignment, which
                      `combine` adds up in the order of a token's assignments
    grad_gate_weights the gradients of the gate weights
    weight_gradients  one block of one expert's matrix: the products of all its rows, added to a sum

A block of a sum belongs to one program, which goes through the rows in the order of their tokens,
so there are no atomics and the bits are the same each time.

Names as in `programs`. All rows that a program writes lie in the order of the assignments; rows of
unused assignments are neither written nor read.
"""

# Triton gives `tl.constexpr` parameters and tensors through one signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .programs import activate, tile_at


@triton.jit
def _dot(left, right, sums, WIDEN: tl.constexpr):
    # The interpreter's product of bfloat16 is wrong; that of float32 is right.
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _derivative(x, alpha, FUNCTION: tl.constexpr):
    if FUNCTION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-alpha * x))
        return sigmoid * (1.0 + alpha * x * (1.0 - sigmoid))
    if FUNCTION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    if FUNCTION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        sigmoid = 1.0 / (1.0 + tl.exp(-2.0 * inner))
        slope = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return sigmoid + 2.0 * x * sigmoid * (1.0 - sigmoid) * slope
    if FUNCTION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    if FUNCTION == "relu2":
        return 2.0 * tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def hidden_gradients(
    x_ptr,
    grad_ptr,
    weights_ptr,
    up_ptr,
    bias_ptr,
    down_ptr,
    act_ptr,
    grad_up_ptr,
    dots_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    order_ptr,
    tiles_ptr,
    total_ptr,
    experts,
    x_rows,
    grad_rows,
    hidden,
    width,
    x_stride,
    grad_stride,
    up_stride,
    bias_stride,
    down_stride,
    alpha,
    limit,
    up_offset,
    FUNCTION: tl.constexpr,
    KNOWN: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write activated rows (N, width), gradients (N, U), and each block's part of their products.

    An assignment's row of x is ``assignment // x_rows``, and likewise its row of ``grad``. With
    WEIGHTED the gradients are multiplied by the gate weights; the products (N, blocks), from which
    the gradients of these weights are made, are not. If the activation is not KNOWN, what is
    written is the up-projection itself as ``grad_up``, and its gradient's factor as ``act``: the
    gradient of the activated rows, not weighted.
    """
    blocks = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    slot, first, rows = tile_at(
        tile, ids_ptr, table_ptr, layer_ptr, tiles_ptr, total_ptr, experts, False, TILE_FIELDS
    )
    if slot < 0:
        return
    row_M = tl.arange(0, BLOCK_M)
    used_M = row_M < rows
    assignment_M = tl.load(order_ptr + first + row_M, mask=used_M, other=0).to(tl.int64)
    column_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < width
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (assignment_M // x_rows)[:, None] * x_stride + k_K[None, :]
    grad_ptrs = grad_ptr + (assignment_M // grad_rows)[:, None] * grad_stride + k_K[None, :]
    gate_ptrs = up_ptr + slot * up_stride + column_N[:, None] * hidden + k_K[None, :]
    value_ptrs = gate_ptrs + width * hidden
    down_ptrs = down_ptr + slot * down_stride + k_K[:, None] * width + column_N[None, :]
    gate_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    value_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    grad_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        inside_K = start + k_K < hidden
        row_mask = used_M[:, None] & inside_K[None, :]
        matrix_mask = inside_N[:, None] & inside_K[None, :]
        x_MK = tl.load(x_ptrs, mask=row_mask, other=0.0)
        gate_NK = tl.load(gate_ptrs, mask=matrix_mask, other=0.0)
        gate_MN = _dot(x_MK, gate_NK.T, gate_MN, WIDEN)
        if GATED:
            value_NK = tl.load(value_ptrs, mask=matrix_mask, other=0.0)
            value_MN = _dot(x_MK, value_NK.T, value_MN, WIDEN)
        grad_MK = tl.load(grad_ptrs, mask=row_mask, other=0.0).to(x_MK.dtype)
        down_KN = tl.load(down_ptrs, mask=inside_K[:, None] & inside_N[None, :], other=0.0)
        grad_MN = _dot(grad_MK, down_KN, grad_MN, WIDEN)
        x_ptrs += BLOCK_K
        grad_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        value_ptrs += BLOCK_K
        down_ptrs += BLOCK_K * width
    if HAS_BIAS:
        bias_ptrs = bias_ptr + slot * bias_stride + column_N
        gate_MN += tl.load(bias_ptrs, mask=inside_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value_MN += tl.load(bias_ptrs + width, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    mask = used_M[:, None] & inside_N[None, :]
    act_ptrs = act_ptr + assignment_M[:, None] * width + column_N[None, :]
    size = width
    if GATED:
        size = 2 * width
    grad_up_ptrs = grad_up_ptr + assignment_M[:, None] * size + column_N[None, :]
    if KNOWN:
        kept_gate_MN = gate_MN
        factor_MN = value_MN
        if LIMITED:
            # `propagate_nan`: a product that is not finite must not look like the limit.
            kept_gate_MN = tl.minimum(gate_MN, limit, propagate_nan=tl.PropagateNan.ALL)
            factor_MN = tl.clamp(value_MN, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        function_MN = activate(kept_gate_MN, alpha, FUNCTION)
        derivative_MN = _derivative(kept_gate_MN, alpha, FUNCTION)
        act_MN = function_MN
        if GATED:
            factor_MN += up_offset
            act_MN = function_MN * factor_MN
            derivative_MN = derivative_MN * factor_MN
        # Columns outside are zero in every factor but an offset's.
        dot_M = tl.sum(tl.where(mask, grad_MN * act_MN, 0.0), 1)
        tl.store(dots_ptr + assignment_M * blocks + block, dot_M, mask=used_M)
        if WEIGHTED:
            weight_M = tl.load(weights_ptr + assignment_M, mask=used_M, other=0.0)
            grad_MN = grad_MN * weight_M.to(tl.float32)[:, None]
        grad_gate_MN = grad_MN * derivative_MN
        grad_value_MN = grad_MN * function_MN
        if LIMITED:
            grad_gate_MN = tl.where(gate_MN > limit, 0.0, grad_gate_MN)
            grad_value_MN = tl.where(tl.abs(value_MN) > limit, 0.0, grad_value_MN)
        gate_MN = grad_gate_MN
        value_MN = grad_value_MN
        grad_MN = act_MN
    tl.store(act_ptrs, grad_MN.to(act_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptrs, gate_MN.to(grad_up_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(grad_up_ptrs + width, value_MN.to(grad_up_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grad_x_rows(
    grad_up_ptr,
    up_ptr,
    out_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    order_ptr,
    tiles_ptr,
    total_ptr,
    experts,
    hidden,
    size,
    up_stride,
    WIDEN: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write grad_up (N, size) @ up (size, hidden) of a tile's rows, (N, hidden)."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    slot, first, rows = tile_at(
        tile, ids_ptr, table_ptr, layer_ptr, tiles_ptr, total_ptr, experts, False, TILE_FIELDS
    )
    if slot < 0:
        return
    row_M = tl.arange(0, BLOCK_M)
    used_M = row_M < rows
    assignment_M = tl.load(order_ptr + first + row_M, mask=used_M, other=0).to(tl.int64)
    column_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < hidden
    k_K = tl.arange(0, BLOCK_K)
    grad_ptrs = grad_up_ptr + assignment_M[:, None] * size + k_K[None, :]
    up_ptrs = up_ptr + slot * up_stride + k_K[:, None] * hidden + column_N[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_K):
        inside_K = start + k_K < size
        grad_MK = tl.load(grad_ptrs, mask=used_M[:, None] & inside_K[None, :], other=0.0)
        up_KN = tl.load(up_ptrs, mask=inside_K[:, None] & inside_N[None, :], other=0.0)
        sums = _dot(grad_MK, up_KN, sums, WIDEN)
        grad_ptrs += BLOCK_K
        up_ptrs += BLOCK_K * hidden
    tl.store(
        out_ptr + assignment_M[:, None] * hidden + column_N[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=used_M[:, None] & inside_N[None, :],
    )


@triton.jit
def grad_gate_weights(
    dots_ptr,
    grad_ptr,
    bias_ptr,
    out_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    assignments,
    experts,
    blocks,
    grad_rows,
    hidden,
    grad_stride,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write <grad_y, y> of BLOCK_N assignments: the parts of their products, and <grad_y, bias>.

    <grad_y, down @ act> is <down.T @ grad_y, act>, whose parts `hidden_gradients` has written. It
    is zero where an assignment is unused.
    """
    n_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = n_N < assignments
    expert_N = tl.load(ids_ptr + n_N, mask=inside_N, other=-1).to(tl.int64)
    table_ptr += tl.load(layer_ptr).to(tl.int64) * experts
    named_N = (expert_N >= 0) & (expert_N < experts)
    slot_N = tl.load(table_ptr + expert_N, mask=named_N, other=-1).to(tl.int64)
    used_N = slot_N >= 0
    b_B = tl.arange(0, BLOCK_B)
    sums_N = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, blocks, BLOCK_B):
        ptrs = dots_ptr + n_N[:, None] * blocks + start + b_B[None, :]
        mask = used_N[:, None] & (start + b_B < blocks)[None, :]
        sums_N += tl.sum(tl.load(ptrs, mask=mask, other=0.0), 1)
    if HAS_BIAS:
        column_H = tl.arange(0, BLOCK_H)
        for start in range(0, hidden, BLOCK_H):
            mask = used_N[:, None] & (start + column_H < hidden)[None, :]
            grad_ptrs = grad_ptr + (n_N // grad_rows)[:, None] * grad_stride + start
            bias_ptrs = bias_ptr + slot_N[:, None] * bias_stride + start
            grad_NH = tl.load(grad_ptrs + column_H[None, :], mask=mask, other=0.0)
            bias_NH = tl.load(bias_ptrs + column_H[None, :], mask=mask, other=0.0)
            sums_N += tl.sum(grad_NH.to(tl.float32) * bias_NH.to(tl.float32), 1)
    tl.store(out_ptr + n_N, sums_N, mask=inside_N)


@triton.jit
def weight_gradients(
    left_ptr,
    right_ptr,
    weights_ptr,
    out_ptr,
    bias_out_ptr,
    order_ptr,
    spans_ptr,
    left_rows,
    right_rows,
    rows_out,
    columns_out,
    left_stride,
    right_stride,
    out_stride,
    bias_stride,
    WEIGHTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add a block of left.T @ right over an expert's rows to its place in ``out``, once.

    An assignment's row of ``left`` is ``assignment // left_rows``, multiplied by its gate weight if
    WEIGHTED, and likewise that of ``right``. The sum of the left rows is added to the bias's.
    """
    blocks_n = tl.cdiv(columns_out, BLOCK_N)
    blocks = tl.cdiv(rows_out, BLOCK_M) * blocks_n
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    place = tl.load(spans_ptr + expert * 3).to(tl.int64)
    rows = tl.load(spans_ptr + expert * 3 + 2)
    if (rows == 0) | (place < 0):
        return
    first = tl.load(spans_ptr + expert * 3 + 1)
    row_M = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_M = row_M < rows_out
    inside_N = column_N < columns_out
    k_K = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_M = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, rows, BLOCK_K):
        used_K = start + k_K < rows
        assignment_K = tl.load(order_ptr + first + start + k_K, mask=used_K, other=0).to(tl.int64)
        left_KM = tl.load(
            left_ptr + (assignment_K // left_rows)[:, None] * left_stride + row_M[None, :],
            mask=used_K[:, None] & inside_M[None, :],
            other=0.0,
        )
        right_KN = tl.load(
            right_ptr + (assignment_K // right_rows)[:, None] * right_stride + column_N[None, :],
            mask=used_K[:, None] & inside_N[None, :],
            other=0.0,
        )
        if WEIGHTED:
            weight_K = tl.load(weights_ptr + assignment_K, mask=used_K, other=0.0)
            left_KM = left_KM.to(tl.float32) * weight_K.to(tl.float32)[:, None]
        left_KM = left_KM.to(right_KN.dtype)
        sums = _dot(left_KM.T, right_KN, sums, WIDEN)
        if HAS_BIAS:
            bias_M += tl.sum(left_KM.to(tl.float32), 0)
    out_ptrs = out_ptr + place * out_stride + row_M[:, None] * columns_out + column_N[None, :]
    mask = inside_M[:, None] & inside_N[None, :]
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask) + sums.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        # The blocks of the first columns have all rows once.
        bias_ptrs = bias_out_ptr + place * bias_stride + row_M
        bias_mask = inside_M & (block % blocks_n == 0)
        old_M = tl.load(bias_ptrs, mask=bias_mask)
        tl.store(bias_ptrs, old_M + bias_M.to(bias_out_ptr.dtype.element_ty), mask=bias_mask)
