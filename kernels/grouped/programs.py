"""Triton programs of the grouped expert FFN. `ffn` and `tiles` launch them; nothing else does.

Four programs compute a layer call, and none of them needs the host to know a count:

    align    sorts assignments by expert and cuts each expert's rows into tiles
    up       a tile's rows times gate and up matrix, and the activation
    down     times the down matrix, one row for each assignment
    combine  the weighted sum of a token's assignments, in their order

Grids are as large as the most tiles that a call of this shape can have; programs beyond the number
that `align` found end at once. So a captured CUDA graph is right for any routing.

Names: N = assignments (tokens * top_k), E = experts of a layer, H = hidden size, I = intermediate
size; a tile is up to BLOCK_M rows of one expert; positions count assignments in sorted order.
"""

# Triton gives `tl.constexpr` parameters and tensors through one signature.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

TILE_FIELDS = 4  # slot, first position, rows, reserved


@triton.jit
def align(
    ids_ptr,
    table_ptr,
    layer_ptr,
    order_ptr,
    tiles_ptr,
    total_ptr,
    spans_ptr,
    missing_ptr,
    assignments,
    experts,
    HAS_SPANS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Program e sorts the assignments of expert e; it counts all, to know where its own begin.

    The sort is stable, so that rows of an expert stay in the order of their tokens. A span is where
    an expert's rows lie: (slot, first position, rows), in the order of the experts.
    """
    mine = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    layer = tl.load(layer_ptr).to(tl.int64)
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    # Unused assignments count for an expert after the last one, which BLOCK_E leaves room for.
    for start in range(0, assignments, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ids = tl.load(ids_ptr + n, mask=n < assignments, other=-1).to(tl.int32)
        is_used = (ids >= 0) & (ids < experts)
        counts_E += tl.histogram(tl.where(is_used, ids, experts), BLOCK_E)
    slots_E = tl.load(table_ptr + layer * experts + expert_E, mask=expert_E < experts, other=-1)
    absent_E = (slots_E < 0) & (expert_E < experts) & (counts_E > 0)
    if (mine == 0) & (tl.sum(absent_E.to(tl.int32), 0) > 0):
        tl.store(missing_ptr, 1)
    counts_E = tl.where(slots_E < 0, 0, counts_E)
    tiles_E = (counts_E + BLOCK_M - 1) // BLOCK_M
    is_mine = expert_E == mine
    before_E = expert_E < mine
    rows = tl.sum(tl.where(is_mine, counts_E, 0), 0)
    tiles = tl.sum(tl.where(is_mine, tiles_E, 0), 0)
    first = tl.sum(tl.where(before_E, counts_E, 0), 0)
    first_tile = tl.sum(tl.where(before_E, tiles_E, 0), 0)
    slot = tl.sum(tl.where(is_mine, slots_E, 0), 0)
    if mine == 0:
        tl.store(total_ptr, tl.sum(tiles_E, 0))
    if HAS_SPANS:
        tl.store(spans_ptr + mine * 3, slot)
        tl.store(spans_ptr + mine * 3 + 1, first)
        tl.store(spans_ptr + mine * 3 + 2, rows)
    if rows > 0:
        for start in range(0, tiles, BLOCK_T):
            i = start + tl.arange(0, BLOCK_T)
            record_ptr = tiles_ptr + (first_tile + i) * TILE_FIELDS
            tl.store(record_ptr, slot + tl.zeros([BLOCK_T], tl.int32), mask=i < tiles)
            tl.store(record_ptr + 1, first + i * BLOCK_M, mask=i < tiles)
            tl.store(record_ptr + 2, tl.minimum(rows - i * BLOCK_M, BLOCK_M), mask=i < tiles)
        place = first
        for start in range(0, assignments, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            ids = tl.load(ids_ptr + n, mask=n < assignments, other=-1).to(tl.int32)
            found = (ids == mine).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(found, 0) - 1, n, mask=found > 0)
            place += tl.sum(found, 0)


@triton.jit
def tile_at(
    tile,
    ids_ptr,
    table_ptr,
    layer_ptr,
    tiles_ptr,
    total_ptr,
    experts,
    DIRECT: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
):
    """Return (slot, first position, rows) of a tile; slot -1 if there is no such tile.

    DIRECT is for calls without `align`: every assignment is a tile of its own.
    """
    if DIRECT:
        expert = tl.load(ids_ptr + tile).to(tl.int64)
        slot = tl.load(
            table_ptr + tl.load(layer_ptr).to(tl.int64) * experts + expert,
            mask=(expert >= 0) & (expert < experts),
            other=-1,
        ).to(tl.int64)
        first = tile
        rows = 1
    else:
        exists = tile < tl.load(total_ptr)
        slot = tl.load(tiles_ptr + tile * TILE_FIELDS, mask=exists, other=-1).to(tl.int64)
        first = tl.load(tiles_ptr + tile * TILE_FIELDS + 1, mask=exists, other=0)
        rows = tl.load(tiles_ptr + tile * TILE_FIELDS + 2, mask=exists, other=0)
    return slot, first, rows


@triton.jit
def _rows(ptrs_MK, used_M, inside_K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(ptrs_MK, mask=used_M[:, None], other=0.0)
    return tl.load(ptrs_MK, mask=used_M[:, None] & inside_K[None, :], other=0.0)


@triton.jit
def _matrix(ptrs_NK, inside_N, inside_K, EVEN: tl.constexpr):
    # Blocks that fit need no mask, and a mask costs time in the innermost loop.
    if EVEN:
        return tl.load(ptrs_NK)
    return tl.load(ptrs_NK, mask=inside_N[:, None] & inside_K[None, :], other=0.0)


@triton.jit
def _described(desc, slot, row, column, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a block with the copy engine; what lies outside of the matrix is zero."""
    block_1NK = desc.load([slot.to(tl.int32), row, column])
    return tl.reshape(block_1NK, [BLOCK_N, BLOCK_K])


@triton.jit
def _no_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAPPED: tl.constexpr):
    if SWAPPED:
        return tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:  # noqa: RET505 -- Triton types what follows a return too
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def _upright(sums, SWAPPED: tl.constexpr):
    if SWAPPED:
        return sums.T
    else:  # noqa: RET505
        return sums


@triton.jit
def _add_product(x_MK, matrix_NK, sums, WIDEN: tl.constexpr, SWAPPED: tl.constexpr):
    """Return sums + x @ matrix.T, transposed if SWAPPED.

    Tensor cores of Hopper take at least 64 rows on their left and as few as 8 columns on their
    right. So with few tokens the matrix stands on the left.
    """
    # The interpreter's product of bfloat16 is wrong; that of float32 is right.
    if WIDEN:
        x_MK = x_MK.to(tl.float32)
        matrix_NK = matrix_NK.to(tl.float32)
    if SWAPPED:
        return tl.dot(matrix_NK, x_MK.T, sums, input_precision="ieee")
    else:  # noqa: RET505
        return tl.dot(x_MK, matrix_NK.T, sums, input_precision="ieee")


@triton.jit
def activate(x, alpha, FUNCTION: tl.constexpr):
    if FUNCTION == "silu":
        return x / (1.0 + tl.exp(-alpha * x))
    if FUNCTION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if FUNCTION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(y) = 2 * sigmoid(2 * y) - 1
        return x / (1.0 + tl.exp(-2.0 * inner))
    if FUNCTION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if FUNCTION == "relu2":
        kept = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return kept * kept
    return x


@triton.jit
def up(
    x_ptr,
    up_ptr,
    up_desc,
    bias_ptr,
    out_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    order_ptr,
    tiles_ptr,
    total_ptr,
    missing_ptr,
    experts,
    top_k,
    hidden,
    width,
    x_stride,
    slot_stride,
    bias_stride,
    alpha,
    limit,
    up_offset,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DIRECT: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write activation(x @ up) of a tile's rows, (N, width), in sorted order.

    ``up`` has the rows of all gates and then those of all values: (2 * width, hidden), or
    (width, hidden) if it is not gated. ``width`` columns come out.
    """
    blocks = tl.cdiv(width, BLOCK_N)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    slot, first, rows = tile_at(
        tile, ids_ptr, table_ptr, layer_ptr, tiles_ptr, total_ptr, experts, DIRECT, TILE_FIELDS
    )
    if slot < 0:
        if DIRECT:  # otherwise `align` has reported it
            expert = tl.load(ids_ptr + tile)
            tl.store(missing_ptr, 1, mask=(expert >= 0) & (expert < experts))
        return
    row_M = tl.arange(0, BLOCK_M)
    position_M = (first + row_M).to(tl.int64)
    used_M = row_M < rows
    if DIRECT:
        assignment_M = position_M
    else:
        assignment_M = tl.load(order_ptr + position_M, mask=used_M, other=0).to(tl.int64)
    column_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < width
    k_K = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (assignment_M // top_k)[:, None] * x_stride + k_K[None, :]
    gate_ptrs = up_ptr + slot * slot_stride + column_N[:, None] * hidden + k_K[None, :]
    value_ptrs = gate_ptrs + width * hidden
    gates = _no_sums(BLOCK_M, BLOCK_N, SWAPPED)
    values = _no_sums(BLOCK_M, BLOCK_N, SWAPPED)
    for start in range(0, hidden, BLOCK_K):
        inside_K = start + k_K < hidden
        x_MK = _rows(x_ptrs, used_M, inside_K, EVEN)
        if DESCRIBED:
            gate_NK = _described(up_desc, slot, block * BLOCK_N, start, BLOCK_N, BLOCK_K)
        else:
            gate_NK = _matrix(gate_ptrs, inside_N, inside_K, EVEN)
        gates = _add_product(x_MK, gate_NK, gates, WIDEN, SWAPPED)
        if GATED:
            if DESCRIBED:
                row = width + block * BLOCK_N
                value_NK = _described(up_desc, slot, row, start, BLOCK_N, BLOCK_K)
            else:
                value_NK = _matrix(value_ptrs, inside_N, inside_K, EVEN)
            values = _add_product(x_MK, value_NK, values, WIDEN, SWAPPED)
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        value_ptrs += BLOCK_K
    gate_MN = _upright(gates, SWAPPED)
    value_MN = _upright(values, SWAPPED)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + slot * bias_stride + column_N
        gate_MN += tl.load(bias_ptrs, mask=inside_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value_MN += tl.load(bias_ptrs + width, mask=inside_N, other=0.0).to(tl.float32)[None, :]
    if LIMITED:
        # `propagate_nan`: a product that is not finite must not look like the limit.
        gate_MN = tl.minimum(gate_MN, limit, propagate_nan=tl.PropagateNan.ALL)
        value_MN = tl.clamp(value_MN, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    out_MN = activate(gate_MN, alpha, FUNCTION)
    if GATED:
        out_MN = out_MN * (value_MN + up_offset)
    tl.store(
        out_ptr + position_M[:, None] * width + column_N[None, :],
        out_MN.to(out_ptr.dtype.element_ty),
        mask=used_M[:, None] & inside_N[None, :],
    )


@triton.jit
def down(
    act_ptr,
    act_desc,
    down_ptr,
    down_desc,
    bias_ptr,
    out_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    order_ptr,
    tiles_ptr,
    total_ptr,
    experts,
    hidden,
    width,
    slot_stride,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    DIRECT: tl.constexpr,
    WIDEN: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write act @ down of a tile's rows to the rows of their assignments, (N, hidden)."""
    blocks = tl.cdiv(hidden, BLOCK_N)
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    slot, first, rows = tile_at(
        tile, ids_ptr, table_ptr, layer_ptr, tiles_ptr, total_ptr, experts, DIRECT, TILE_FIELDS
    )
    if slot < 0:
        return
    row_M = tl.arange(0, BLOCK_M)
    position_M = (first + row_M).to(tl.int64)
    used_M = row_M < rows
    column_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = column_N < hidden
    k_K = tl.arange(0, BLOCK_K)
    act_ptrs = act_ptr + position_M[:, None] * width + k_K[None, :]
    down_ptrs = down_ptr + slot * slot_stride + column_N[:, None] * width + k_K[None, :]
    sums = _no_sums(BLOCK_M, BLOCK_N, SWAPPED)
    for start in range(0, width, BLOCK_K):
        inside_K = start + k_K < width
        if DESCRIBED:
            # Rows after the tile's are another expert's; nothing of them is stored.
            act_MK = act_desc.load([first, start])
            down_NK = _described(down_desc, slot, block * BLOCK_N, start, BLOCK_N, BLOCK_K)
        else:
            act_MK = _rows(act_ptrs, used_M, inside_K, EVEN)
            down_NK = _matrix(down_ptrs, inside_N, inside_K, EVEN)
        sums = _add_product(act_MK, down_NK, sums, WIDEN, SWAPPED)
        act_ptrs += BLOCK_K
        down_ptrs += BLOCK_K
    out_MN = _upright(sums, SWAPPED)
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + slot * bias_stride + column_N, mask=inside_N, other=0.0)
        out_MN += bias_N.to(tl.float32)[None, :]
    if DIRECT:
        assignment_M = position_M
    else:
        assignment_M = tl.load(order_ptr + position_M, mask=used_M, other=0).to(tl.int64)
    tl.store(
        out_ptr + assignment_M[:, None] * hidden + column_N[None, :],
        out_MN.to(out_ptr.dtype.element_ty),
        mask=used_M[:, None] & inside_N[None, :],
    )


@triton.jit
def combine(
    rows_ptr,
    ids_ptr,
    table_ptr,
    layer_ptr,
    weights_ptr,
    out_ptr,
    infinite_ptr,
    experts,
    top_k,
    hidden,
    out_stride,
    BLOCK_H: tl.constexpr,
):
    """Write the weighted sum of a token's rows, in the order of its assignments.

    It must be compiled without fused multiply-add, so that a product has the same bits as where it
    is rounded, sent and added elsewhere.
    """
    token = tl.program_id(0).to(tl.int64)
    column_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_H = column_H < hidden
    table_ptr += tl.load(layer_ptr).to(tl.int64) * experts
    sum_H = tl.zeros([BLOCK_H], tl.float32)
    for k in range(top_k):
        n = token * top_k + k
        expert = tl.load(ids_ptr + n).to(tl.int64)
        is_used = (expert >= 0) & (expert < experts)
        slot = tl.load(table_ptr + expert, mask=is_used, other=-1)
        row_H = tl.load(rows_ptr + n * hidden + column_H, mask=inside_H & (slot >= 0), other=0.0)
        weight = tl.load(weights_ptr + n, mask=slot >= 0, other=0.0).to(tl.float32)
        sum_H += row_H.to(tl.float32) * weight
    # The difference of a number with itself is zero, and NaN for infinities and NaN.
    rest_H = tl.where(inside_H, sum_H - sum_H, 0.0)
    if tl.sum((rest_H != 0.0).to(tl.int32), 0) > 0:
        tl.store(infinite_ptr, 1)
    tl.store(
        out_ptr + token * out_stride + column_H,
        sum_H.to(out_ptr.dtype.element_ty),
        mask=inside_H,
    )
