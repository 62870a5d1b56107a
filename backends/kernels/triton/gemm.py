# ruff: noqa: N806
"""One matrix product for narrow weights, x [M, K] times weight [N, K] transposed, and for experts.

    float or narrow activations x a weight in int8, int4, e4m3 or x's own dtype
    -> sums in float32 (int32 for int8 times int8, exact) -> scales, bias -> out [M, N]

The weight is read in the layout that `passes/quantized_ops.py` gives it and widened in registers.
A weight-only product multiplies with (number - zero), which every dtype holds exactly, and applies
the scale to the sums; only where a tile spans several groups are the weights scaled, and rounded to
x's dtype, before the product.

Decode is bound by the weight's bytes: few rows leave too few tiles to fill a GPU, so K is split and
the last program to finish a tile adds the parts, in the order of K, so that a result does not
depend on who was last. With fewer than 64 rows the product is computed transposed, the weight being
the operand of 64 or more rows that warp-group tensor-core instructions want ("swap AB").

With experts (sorted rows, `experts.py`) each program looks up whose rows its tile has: no tile
table, no padding, and no number that the host would have to wait for.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _widen_e4m3(bits):
    """uint8 that are e4m3 to float16, exact, on any GPU: the exponents' biases differ by 8."""
    wide = ((bits & 0x80).to(tl.uint16) << 8) | ((bits & 0x7F).to(tl.uint16) << 7)
    value = wide.to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _widen(raw, zero, scale, WEIGHT: tl.constexpr, DTYPE: tl.constexpr, SCALED: tl.constexpr):
    """Stored numbers as DTYPE: less their zero points, and scaled where a tile spans groups."""
    wide = _widen_e4m3(raw).to(DTYPE) if WEIGHT == "fp8" else raw.to(DTYPE) - zero
    if SCALED:
        wide = (wide.to(tl.float32) * scale).to(DTYPE)
    return wide


@triton.jit
def _spread(values, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK_N, PARTS], one for each group, to [BLOCK_N, WIDTH], one for each column."""
    wide = tl.expand_dims(values, 2).broadcast_to((BLOCK_N, PARTS, WIDTH // PARTS))
    return tl.reshape(wide, (BLOCK_N, WIDTH))


@triton.jit
def _dot(x, w, total, SWAP: tl.constexpr, UPCAST: tl.constexpr):
    """total + x w^T, [rows, columns], or transposed where SWAP.

    Hopper's sums of e4m3 products have about 14 bits: after 128 of them they go to float32.
    """
    if UPCAST:  # the interpreter's products of bfloat16 and e4m3 are wrong
        x, w = x.to(tl.float32), w.to(tl.float32)
    IMPRECISE: tl.constexpr = 128 if x.dtype == tl.float8e4nv else None
    if SWAP:
        x, w = w, x
    return tl.dot(
        x,
        tl.trans(w),
        total,
        input_precision="ieee",
        max_num_imprecise_acc=IMPRECISE,
        out_dtype=total.dtype,
    )


@triton.jit
def _expert_tile(offsets, num_experts, tile, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert whose tile this is (num_experts: nobody's), its first row and its last + 1."""
    e = tl.arange(0, EXPERTS)
    starts = tl.load(offsets + e, mask=e < num_experts, other=0)
    ends = tl.load(offsets + e + 1, mask=e < num_experts, other=0)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    first = tl.sum(tl.where(e == expert, starts, 0), 0) + (tile - before) * BLOCK_M
    last = tl.sum(tl.where(e == expert, ends, 0), 0)
    return expert, first, last


# What differs between steps must not ask for other code.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "tiles_m",
        "stride_scale_row",
        "stride_scale_group",
        "stride_zero",
    ]
)
def gemm_kernel(
    x,
    w,
    out,
    x_scale,
    x_zero,
    w_scale,
    w_zero,
    bias,
    partials,
    counters,
    order,
    offsets,
    num_rows,
    tiles_m,
    num_experts,
    num_groups,
    N,
    K,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    stride_out,
    stride_scale_row,
    stride_scale_group,
    stride_zero,
    X: tl.constexpr,
    WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_ZERO: tl.constexpr,
    HAS_W_ZERO: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of out, or of a part of K's sum.

    X: "float", "int8" or "fp8" activations; "bits" for e4m3 that this GPU cannot multiply.
    WEIGHT: "same" as x, "int8", "int4" or "fp8". SCALE: "" for a weight without, "end" for one
    group, "sum" where a tile lies in one group of several, "tile" where it spans several; GROUP is
    their size, 0 for one group.
    EXPERTS: 0, or num_experts rounded up; then GATHER rows of out share a row of x (0: none do,
    x is sorted), and SCATTER says that out is not sorted.
    """
    # Tiles that run together share rows of x and of the weight in the L2 cache.
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile % tiles_m, tile // tiles_m, tiles_m, tiles_n, 8)
    part = tl.program_id(1)
    if EXPERTS > 0:
        expert, first, last = _expert_tile(offsets, num_experts, tile_m, BLOCK_M, EXPERTS)
        if expert >= num_experts:
            return
        positions = first + tl.arange(0, BLOCK_M)
        is_row = positions < last
        flat = tl.load(order + positions, mask=is_row, other=0)
        x_rows = flat // GATHER if GATHER > 0 else positions
        out_rows = flat if SCATTER else positions
        w += expert.to(tl.int64) * stride_we
        w_scale += expert.to(tl.int64) * N * num_groups
        w_zero += expert.to(tl.int64) * N * num_groups
    else:
        x_rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        out_rows = x_rows
        is_row = x_rows < num_rows
    x_rows, out_rows = x_rows.to(tl.int64), out_rows.to(tl.int64)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N

    PACKED: tl.constexpr = 2 if WEIGHT == "int4" else 1
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    PARTS: tl.constexpr = BLOCK_K // GROUP if SCALE == "tile" else 1
    INTEGER: tl.constexpr = X == "int8"
    ROW: tl.constexpr = 0 if SWAP else 1
    COLUMN: tl.constexpr = 1 if SWAP else 0
    DTYPE: tl.constexpr = x.dtype.element_ty if X == "float" else tl.float16
    R: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    C: tl.constexpr = BLOCK_M if SWAP else BLOCK_N

    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, WIDTH)
    x_at = x + x_rows[:, None] * stride_x + k[None, :]
    w_at = w + columns.to(tl.int64)[:, None] * stride_wn + byte.to(tl.int64)[None, :] * stride_wk
    total = tl.zeros((R, C), dtype=tl.int32 if INTEGER else tl.float32)
    weight_sum = tl.zeros((BLOCK_N,), dtype=tl.int32)
    zero = tl.full((1, 1), 8 if WEIGHT == "int4" else 0, DTYPE)
    if HAS_W_ZERO and SCALE == "end":
        zero = tl.load(w_zero + columns, mask=is_column, other=0).to(DTYPE)[:, None]
    blocks = tl.cdiv(K, BLOCK_K)
    per_part = tl.cdiv(blocks, SPLIT_K)
    for block in range(part * per_part, tl.minimum(blocks, (part + 1) * per_part)):
        start = block * BLOCK_K
        if EVEN_K:
            a = tl.load(x_at + start, mask=is_row[:, None], other=0.0)
            b = tl.load(
                w_at + (start // PACKED).to(tl.int64) * stride_wk,
                mask=is_column[:, None],
                other=0.0,
            )
        else:
            a = tl.load(x_at + start, mask=is_row[:, None] & (start + k < K)[None, :], other=0.0)
            b = tl.load(
                w_at + (start // PACKED).to(tl.int64) * stride_wk,
                mask=is_column[:, None] & (start // PACKED + byte < K // PACKED)[None, :],
                other=0.0,
            )
        if GROUP > 0:
            groups = start // GROUP + tl.arange(0, PARTS)
            grouped = groups[None, :].to(tl.int64) * N + columns[:, None]
            in_groups = is_column[:, None] & (groups < num_groups)[None, :]
        if SCALE == "tile":
            scales = tl.load(w_scale + grouped, mask=in_groups, other=0).to(tl.float32)
            factor = _spread(scales, BLOCK_N, PARTS, WIDTH)
        else:
            factor = 1.0
        if HAS_W_ZERO and SCALE != "end":
            zeros = tl.load(w_zero + grouped, mask=in_groups, other=0).to(DTYPE)
            point = _spread(zeros, BLOCK_N, PARTS, WIDTH)
        else:
            point = zero
        if X == "bits":
            a = _widen_e4m3(a)
        summed = tl.zeros((R, C), dtype=tl.float32) if SCALE == "sum" else total
        if WEIGHT == "int4":
            even, odd = tl.split(tl.reshape(a, (BLOCK_M, WIDTH, 2)))
            low = _widen(b & 15, point, factor, WEIGHT, DTYPE, SCALE == "tile")
            high = _widen(b >> 4, point, factor, WEIGHT, DTYPE, SCALE == "tile")
            summed = _dot(even, low, summed, SWAP, UPCAST)
            summed = _dot(odd, high, summed, SWAP, UPCAST)
        elif WEIGHT != "same":
            wide = _widen(b, point, factor, WEIGHT, DTYPE, SCALE == "tile")
            summed = _dot(a, wide, summed, SWAP, UPCAST)
        else:
            summed = _dot(a, b, summed, SWAP, UPCAST and not INTEGER)
        if HAS_X_ZERO:
            weight_sum += tl.sum(b.to(tl.int32), 1)
        if SCALE == "sum":
            group = start // GROUP
            by_column = tl.load(w_scale + group.to(tl.int64) * N + columns, mask=is_column, other=0)
            summed *= tl.expand_dims(by_column.to(tl.float32), COLUMN)
            if X != "float":
                at = x_rows * stride_scale_row + group * stride_scale_group
                summed *= tl.expand_dims(tl.load(x_scale + at, mask=is_row, other=0), ROW)
            total += summed
        else:
            total = summed

    if HAS_X_ZERO:
        row_zero = tl.load(x_zero + x_rows * stride_zero, mask=is_row, other=0)
        total -= tl.expand_dims(row_zero, ROW) * tl.expand_dims(weight_sum, COLUMN)
    if SPLIT_K > 1:
        inside = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
        mine = partials + tile.to(tl.int64) * (SPLIT_K * R * C) + inside
        tl.store(mine + part * (R * C), total)
        tl.debug_barrier()
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") != SPLIT_K - 1:
            return
        total = tl.zeros((R, C), dtype=total.dtype)
        for other in range(SPLIT_K):
            total += tl.load(mine + other * (R * C), cache_modifier=".cg")
        tl.store(counters + tile, 0)  # for the next product

    result = total.to(tl.float32)
    if SCALE == "end":
        if X != "float":
            at = x_rows * stride_scale_row
            result *= tl.expand_dims(tl.load(x_scale + at, mask=is_row, other=0), ROW)
        by_column = tl.load(w_scale + columns, mask=is_column, other=0).to(tl.float32)
        result *= tl.expand_dims(by_column, COLUMN)
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=is_column, other=0).to(tl.float32)
        result += tl.expand_dims(added, COLUMN)
    at = tl.expand_dims(out_rows * stride_out, ROW) + tl.expand_dims(columns, COLUMN)
    is_out = tl.expand_dims(is_row, ROW) & tl.expand_dims(is_column, COLUMN)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=is_out)
