"""Prefill and mixed steps: ragged queries of many tokens over paged keys and values.

FlashAttention-2's loop (Dao, 2023): a tile of queries stays, keys and values pass. A tile's rows
are the tokens and query heads that share a KV head, token by token, without gaps. Which rows a
program has it finds itself from query_start_loc, so that nobody asks the device for a number.
"""

import triton
import triton.language as tl

from inlay.backends.kernels.triton.attention_tile import (
    LOG2E,
    add_sink,
    attend,
    load_query,
    row_factors,
    store_rows,
    visible,
)


@triton.jit
def _request_of(program, starts, num_requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request that a program serves, num_requests for padding, and which of its tiles.

    Request b's programs begin at starts[b] * GROUP // BLOCK_M + b: at least as many lie before the
    next request's as it has tiles.
    """
    found = -1
    for begin in range(0, num_requests + 1, 128):
        b = begin + tl.arange(0, 128)
        start = tl.load(starts + b, mask=b <= num_requests, other=0)
        first = tl.where(b <= num_requests, start * GROUP // BLOCK_M + b, 2147483647)
        found += tl.sum((first <= program).to(tl.int32))
    return found, program - (tl.load(starts + found) * GROUP // BLOCK_M + found)


@triton.jit(
    do_not_specialize=["num_tokens", "num_requests", "stride_table", "window", "chunk"],
    do_not_specialize_on_alignment=["table", "seq_lens", "starts"],
)
def prefill_kernel(
    q, k_cache, v_cache, k_scales, v_scales, table, seq_lens, starts, sinks, slopes, out,
    num_tokens, num_requests, scale, softcap, window, chunk,
    stride_q_token, stride_q_head, stride_table,
    GROUP: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, NUM_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED_N: tl.constexpr,
    FORMAT: tl.constexpr, DOT: tl.constexpr, V_DOT: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one request's rows, KV head. Requests of one token are left to
    `decode_kernel`; rows of padding tokens become zero."""
    # The last tiles of a prompt see most keys: they go first, so that no long one ends alone.
    program, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    request, tile = _request_of(program, starts, num_requests, GROUP, BLOCK_M)
    begin = tl.load(starts + request)
    is_padding = request == num_requests
    stop = num_tokens
    if not is_padding:
        stop = tl.load(starts + request + 1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    num_rows = (stop - begin) * GROUP
    if (tile * BLOCK_M >= num_rows) | ((stop - begin == 1) & (request < num_requests)):
        return
    is_row = rows < num_rows
    in_request = tl.minimum(rows // GROUP, stop - begin - 1)
    token, head = begin + in_request, kv_head * GROUP + rows % GROUP
    if is_padding:
        zero = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
        store_rows(out, zero, token, head, is_row, NUM_HEADS, V_HEAD, V_PADDED)
        return

    length = tl.load(seq_lens + request)
    before = length - (stop - begin)
    position = before + in_request
    first, end = visible(position, length, window, chunk, CAUSAL, WINDOW, CHUNK)
    # Both grow with the position: the first and the last row's bound all others'.
    lowest = before + tile * BLOCK_M // GROUP
    highest = tl.minimum(before + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
    oldest, all_end = visible(lowest, length, window, chunk, CAUSAL, WINDOW, CHUNK)
    all_first, newest = visible(highest, length, window, chunk, CAUSAL, WINDOW, CHUNK)

    query, unit = load_query(
        q, token, head, is_row, stride_q_token, stride_q_head, HEAD, PADDED, DOT, NORMALISE
    )
    row_scale, slope = row_factors(
        scale, unit, softcap, k_scales, slopes, head, is_row, BLOCK_M, FORMAT, SOFTCAP, SLOPES
    )
    pages = table + request.to(tl.int64) * stride_table
    total = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # Tiles that all rows see whole need no mask: [whole, whole_end). The others, which do, and more
    # registers with it, are of MASKED_N keys, a divisor.
    whole = tl.minimum(tl.cdiv(all_first, BLOCK_N) * BLOCK_N, newest)
    whole_end = tl.maximum(all_end // BLOCK_N * BLOCK_N, whole)
    for phase in tl.static_range(3):
        low, high = whole, whole_end
        if phase == 0:
            low, high = oldest // MASKED_N * MASKED_N, whole
        if phase == 2:
            low, high = whole_end, newest
        if phase > 0 or (WINDOW or CHUNK):
            for start in range(low, high, BLOCK_N if phase == 1 else MASKED_N):
                total, row_max, row_sum = attend(
                    total, row_max, row_sum, query, start, k_cache, v_cache, k_scales, v_scales,
                    pages, kv_head, row_scale, softcap * LOG2E, slope, position, first, end, oldest,
                    newest, NUM_HEADS // GROUP, HEAD, V_HEAD, PADDED, V_PADDED, BLOCK_SIZE,
                    BLOCK_N if phase == 1 else MASKED_N, FORMAT, DOT, V_DOT, PRECISION, SOFTCAP,
                    SLOPES, phase != 1,
                )  # fmt: skip
    total, row_sum = add_sink(total, row_max, row_sum, sinks, head, is_row, SINKS)
    total = total / row_sum[:, None]
    if FORMAT == "fp8" or FORMAT == "fp8_bits":
        total = total * tl.load(v_scales)
    store_rows(out, total, token, head, is_row, NUM_HEADS, V_HEAD, V_PADDED)
