"""Decode: one query token against its request's pages, the keys split over programs.

Flash-Decoding (Dao et al., 2023): each split gives a normalised sum and the log2 of its weights'
sum; a second kernel joins them. The query heads of one KV head form one tile, so that keys are read
once (grouped queries, Ainslie et al., 2023). How many splits there may be comes from shapes alone;
how many a request uses, from its length, on the device.
"""

import triton
import triton.language as tl

from inlay.backends.kernels.triton.attention_tile import (
    LOG2E,
    add_sink,
    attend,
    load_query,
    owner_of,
    row_factors,
    store_rows,
    visible,
)

_FROM_STEP_TO_STEP = ["num_requests", "num_splits", "stride_table", "window", "chunk"]
"""Numbers that vary must not make a new kernel each time one is 1 or a multiple of 16."""
_ANYWHERE = ["table", "seq_lens", "starts"]


@triton.jit
def _split_of(first, end, num_splits, BLOCK_N: tl.constexpr):
    """Tiles [tile, tiles) that hold the keys [first, end), and how many of them a split takes."""
    tile, tiles = first // BLOCK_N, tl.cdiv(end, BLOCK_N)
    return tile, tiles, tl.maximum(tl.cdiv(tiles - tile, num_splits), 1)


@triton.jit
def _query_of(row, starts, seq_lens, num_requests, PER_TOKEN: tl.constexpr):
    """A row's token, request, position and cached length. No request: num_requests; not ours: -1.

    PER_TOKEN: every token is a row. Else every request is one, and ours are those of one token.
    """
    if PER_TOKEN:
        token = row
        request = tl.minimum(row, num_requests - 1)  # where each one brings one token
        begin, stop = tl.load(starts + request), tl.load(starts + request + 1)
        if (token < begin) | (token >= stop):
            request = owner_of(starts + 1, token, num_requests)
            stop = tl.load(starts + tl.minimum(request, num_requests - 1) + 1)
    else:
        request = row
        token, stop = tl.load(starts + row), tl.load(starts + row + 1)
        if stop - token != 1:
            request = -1
    length = tl.load(seq_lens + tl.minimum(tl.maximum(request, 0), num_requests - 1))
    return token, request, length - (stop - token), length


@triton.jit(do_not_specialize=_FROM_STEP_TO_STEP, do_not_specialize_on_alignment=_ANYWHERE)
def decode_kernel(
    q, k_cache, v_cache, k_scales, v_scales, table, seq_lens, starts, sinks, slopes, out, partial,
    partial_log2,
    num_requests, num_splits, scale, softcap, window, chunk,
    stride_q_token, stride_q_head, stride_table,
    GROUP: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, NUM_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PER_TOKEN: tl.constexpr,
    FORMAT: tl.constexpr, DOT: tl.constexpr, V_DOT: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: row, KV head (and share of its query heads), split.

    The result goes into out [T, Hq, Dv] or, with SPLIT, its parts into partial
    [rows, Hq, num_splits, Dv] and partial_log2 [rows, Hq, num_splits].
    """
    row, split = tl.program_id(0), tl.program_id(2)
    head_tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(1) // head_tiles
    in_group = tl.program_id(1) % head_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = in_group < GROUP
    head = kv_head * GROUP + in_group
    token, request, position, length = _query_of(row, starts, seq_lens, num_requests, PER_TOKEN)
    if (request < 0) | (request >= num_requests):
        if PER_TOKEN and not SPLIT:  # padding
            zero = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
            store_rows(out, zero, token, head, is_row, NUM_HEADS, V_HEAD, V_PADDED)
        return

    first, end = visible(position, length, window, chunk, CAUSAL, WINDOW, CHUNK)
    tile, tiles, per_split = _split_of(first, end, num_splits, BLOCK_N)
    begin = tile + split * per_split
    if begin >= tiles:
        return
    query, unit = load_query(
        q, in_group * 0 + token, head, is_row, stride_q_token, stride_q_head,
        HEAD, PADDED, DOT, NORMALISE,
    )  # fmt: skip
    row_scale, slope = row_factors(
        scale, unit, softcap, k_scales, slopes, head, is_row, BLOCK_M, FORMAT, SOFTCAP, SLOPES
    )
    pages = table + request.to(tl.int64) * stride_table
    total = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    same = in_group * 0
    last = tl.minimum(begin + per_split, tiles) * BLOCK_N
    for start in range(begin * BLOCK_N, last, BLOCK_N):
        total, row_max, row_sum = attend(
            total, row_max, row_sum, query, start, k_cache, v_cache, k_scales, v_scales, pages,
            kv_head, row_scale, softcap * LOG2E, slope, same + position, same + first, same + end,
            first, end, NUM_HEADS // GROUP, HEAD, V_HEAD, PADDED, V_PADDED, BLOCK_SIZE, BLOCK_N,
            FORMAT, DOT, V_DOT, PRECISION, SOFTCAP, SLOPES, True,
        )  # fmt: skip
    if not SPLIT:
        total, row_sum = add_sink(total, row_max, row_sum, sinks, head, is_row, SINKS)
    total = total / row_sum[:, None]
    if FORMAT == "fp8" or FORMAT == "fp8_bits":
        total = total * tl.load(v_scales)
    if not SPLIT:
        store_rows(out, total, token, head, is_row, NUM_HEADS, V_HEAD, V_PADDED)
    else:
        at = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + split
        tl.store(partial_log2 + at, row_max + tl.log2(row_sum), mask=is_row)
        store_rows(
            partial, total, row * NUM_HEADS + head, split, is_row, num_splits, V_HEAD, V_PADDED
        )


@triton.jit(do_not_specialize=_FROM_STEP_TO_STEP, do_not_specialize_on_alignment=_ANYWHERE)
def combine_kernel(
    partial, partial_log2, seq_lens, starts, sinks, out,
    num_requests, num_splits, window, chunk,
    V_HEAD: tl.constexpr, V_PADDED: tl.constexpr, NUM_HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr, PER_TOKEN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: row, query head."""
    row, head = tl.program_id(0), tl.program_id(1)
    v_dims = tl.arange(0, V_PADDED)
    stored = v_dims < V_HEAD
    token, request, position, length = _query_of(row, starts, seq_lens, num_requests, PER_TOKEN)
    to_out = out + (token.to(tl.int64) * NUM_HEADS + head) * V_HEAD + v_dims
    if (request < 0) | (request >= num_requests):
        if PER_TOKEN:  # padding
            tl.store(to_out, tl.zeros([V_PADDED], out.dtype.element_ty), mask=stored)
        return
    first, end = visible(position, length, window, chunk, CAUSAL, WINDOW, CHUNK)
    tile, tiles, per_split = _split_of(first, end, num_splits, BLOCK_N)
    used = tl.cdiv(tiles - tile, per_split)
    rows = (row.to(tl.int64) * NUM_HEADS + head) * num_splits
    largest = float("-inf")
    weight_sum = 0.0
    if SINKS:
        largest = tl.load(sinks + head).to(tl.float32) * LOG2E
        weight_sum = 1.0
    total = tl.zeros([V_PADDED], tl.float32)
    for begin in range(0, used, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        log2 = tl.load(partial_log2 + rows + split, mask=split < used, other=float("-inf"))
        part = tl.load(
            partial + (rows + split)[:, None] * V_HEAD + v_dims[None, :],
            mask=(split < used)[:, None] & stored[None, :],
            other=0.0,
        )
        new_largest = tl.maximum(largest, tl.max(log2, 0))
        weight = tl.exp2(log2 - new_largest)
        shrink = tl.exp2(largest - new_largest)
        weight_sum = weight_sum * shrink + tl.sum(weight, 0)
        total = total * shrink + tl.sum(part * weight[:, None], 0)
        largest = new_largest
    tl.store(to_out, (total / weight_sum).to(out.dtype.element_ty), mask=stored)
