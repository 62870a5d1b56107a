"""What decode and prefill share: one tile of keys and values read from the pages, and its share of
the online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022).

Scores are kept in units of log2, so that exp2 serves. Of each query the keys [first, end) are
visible, whatever of causality, window and chunk decides so.
"""

# Annotations stay expressions: no `from __future__ import annotations` beside @triton.jit.
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(
    position, length, window, chunk, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr
):
    """The keys [first, end) that queries at these positions see, of a request of this length."""
    first = position * 0
    end = first + length
    if CAUSAL:
        end = position + 1
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
        end = tl.minimum(end, position + window)
    if CHUNK:
        begin = position // chunk * chunk
        first = tl.maximum(first, begin)
        end = tl.minimum(end, begin + chunk)
    return first, end


@triton.jit
def _widen(x, FORMAT: tl.constexpr, DOT: tl.constexpr):
    """Cached numbers as operands of a product; every number of e4m3 and int8 is one of theirs."""
    if FORMAT == "fp8":
        x = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    if FORMAT == "fp8_bits":  # for what has no such conversion; 2^8 is the biases' difference
        bits = (x.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -0x4001  # the sign stays on top
        half = bits.to(tl.float16, bitcast=True) * 256.0
        x = tl.where((bits & 0x3F80) == 0x3F80, float("nan"), half)
    return x.to(DOT)


@triton.jit
def round_to_bfloat16(x):
    """float32 numbers as bfloat16 holds them, ties to even: what GPUs do, and what the interpreter,
    which cuts off, does not."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _tanh(x):
    """To a few units in the last place, near zero too (Cephes' tanhf)."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = (near * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = (near * square - 3.33332819422e-1) * square * x + x
    size = tl.abs(x)
    # Beyond 10 it is 1; NaN fails both comparisons and takes this branch, which keeps it.
    clipped = tl.where(size > 10.0, 10.0, size)
    far = 1.0 - 2.0 / (tl.exp2(clipped * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def attend(
    total,
    row_max,
    row_sum,
    query,
    start,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    table,
    kv_head,
    row_scale,
    softcap,
    slope,
    position,
    first,
    end,
    oldest,
    newest,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    PADDED: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
    V_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys [start, start + BLOCK_N) of one request and KV head: the new total, row_max, row_sum.

    Caches are dense [blocks, NUM_KV_HEADS, BLOCK_SIZE, head size]; scales have one for each row.
    query [M, PADDED] in DOT; total [M, V_PADDED] float32; row_scale [M]: log2-units of a product's
    unit (with a soft-cap: shares of the cap); softcap in log2-units; slope, position, first, end
    [M]. MASKED: not all rows see all keys. Keys outside [oldest, newest) nobody sees: their pages
    are not read.
    """
    keys = start + tl.arange(0, BLOCK_N)
    seen = (keys >= oldest) & (keys < newest)
    # Unsigned: a division by a power of two is a shift then.
    unsigned = keys.to(tl.uint32)
    if BLOCK_SIZE % BLOCK_N == 0:  # one page for all; start is a multiple of BLOCK_N
        block = tl.load(table + start // BLOCK_SIZE)
    elif MASKED:
        block = tl.load(table + unsigned // BLOCK_SIZE, mask=seen, other=0)
    else:
        block = tl.load(table + unsigned // BLOCK_SIZE)
    in_block = (unsigned % BLOCK_SIZE).to(tl.int32)
    row = block.to(tl.int64) * (NUM_KV_HEADS * BLOCK_SIZE) + (kv_head * BLOCK_SIZE + in_block)

    dims = tl.arange(0, PADDED)
    at = k_cache + (row * HEAD)[:, None] + dims[None, :]
    if MASKED and PADDED != HEAD:
        key = tl.load(at, mask=seen[:, None] & (dims < HEAD)[None, :], other=0)
    elif MASKED:
        key = tl.load(at, mask=seen[:, None], other=0)
    elif PADDED != HEAD:
        key = tl.load(at, mask=(dims < HEAD)[None, :], other=0)
    else:
        key = tl.load(at)

    scores = tl.dot(query, tl.trans(_widen(key, FORMAT, DOT)), input_precision=PRECISION)
    if FORMAT == "int8":
        key_scale = tl.load(k_scales + row, mask=seen, other=0.0)
        scores = scores * key_scale[None, :]
    if MASKED or (SOFTCAP or SLOPES != "none"):
        scores = scores * row_scale[:, None]
        if SOFTCAP:
            scores = _tanh(scores) * softcap
        if SLOPES == "of_distance":
            scores += slope[:, None] * (keys[None, :] - position[:, None]).to(tl.float32)
        if SLOPES == "of_key":  # rounded to bfloat16, factor and product
            where = round_to_bfloat16(keys.to(tl.float32))
            scores += round_to_bfloat16(slope[:, None] * where[None, :]) * LOG2E
        if MASKED:
            sees = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
            scores = tl.where(sees, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet: exp2 of -inf is 0, of -inf - -inf it is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores - shift[:, None])
    else:  # the same, with scale and shift in one multiply-add; row_scale is not negative
        new_max = tl.maximum(row_max, tl.max(scores, 1) * row_scale)
        shift = new_max
        weights = tl.exp2(scores * row_scale[:, None] - shift[:, None])
    shrink = tl.exp2(row_max - shift)
    row_sum = row_sum * shrink + tl.sum(weights, 1)

    v_dims = tl.arange(0, V_PADDED)
    at = v_cache + (row * V_HEAD)[:, None] + v_dims[None, :]
    if MASKED and V_PADDED != V_HEAD:
        value = tl.load(at, mask=seen[:, None] & (v_dims < V_HEAD)[None, :], other=0)
    elif MASKED:
        value = tl.load(at, mask=seen[:, None], other=0)
    elif V_PADDED != V_HEAD:
        value = tl.load(at, mask=(v_dims < V_HEAD)[None, :], other=0)
    else:
        value = tl.load(at)
    if FORMAT == "int8":
        weights = weights * tl.load(v_scales + row, mask=seen, other=0.0)[None, :]
    total = total * shrink[:, None]
    value = _widen(value, FORMAT, V_DOT)
    total = tl.dot(weights.to(V_DOT), value, total, input_precision=PRECISION)
    return total, new_max, row_sum


@triton.jit
def load_query(
    q, rows, head, is_row, stride_token, stride_head,
    HEAD: tl.constexpr, PADDED: tl.constexpr, DOT: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """Queries [M, PADDED] as operands, and what their products are to be multiplied by.

    NORMALISE: each row over the power of two that its largest number begins with, so that bfloat16
    fits float16's range without a rounding of what counts.
    """
    dims = tl.arange(0, PADDED)
    at = rows.to(tl.int64)[:, None] * stride_token + head[:, None] * stride_head + dims[None, :]
    query = tl.load(q + at, mask=is_row[:, None] & (dims < HEAD)[None, :], other=0.0)
    unit = 1.0
    if NORMALISE:
        query = query.to(tl.float32)
        largest = tl.max(tl.abs(query), 1)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        unit = tl.where(power == 0.0, 1.0, power)
        query = query / unit[:, None]
    return query.to(DOT), unit


@triton.jit
def row_factors(
    scale, unit, softcap, k_scales, slopes, head, is_row,
    BLOCK_M: tl.constexpr, FORMAT: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """`attend`'s row_scale and slope [M]; the latter is anything where there are none."""
    row_scale = tl.full([BLOCK_M], 1.0, tl.float32) * scale * unit
    row_scale = row_scale / softcap if SOFTCAP else row_scale * LOG2E
    if FORMAT == "fp8" or FORMAT == "fp8_bits":
        row_scale = row_scale * tl.load(k_scales)
    slope = row_scale
    if SLOPES != "none":
        slope = tl.load(slopes + head, mask=is_row, other=0.0).to(tl.float32)
    if SLOPES == "of_distance":
        slope = slope * LOG2E
    return row_scale, slope


@triton.jit
def add_sink(total, row_max, row_sum, sinks, head, is_row, SINKS: tl.constexpr):
    """One more logit in each row's denominator; row_max and the result are in units of log2."""
    if SINKS:
        sink = tl.load(sinks + head, mask=is_row, other=float("-inf")).to(tl.float32) * LOG2E
        new_max = tl.maximum(row_max, sink)
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.exp2(sink - new_max)
        total = total * shrink[:, None]
    return total, row_sum


@triton.jit
def store_rows(
    out, total, rows, column, is_row, num_columns, V_HEAD: tl.constexpr, V_PADDED: tl.constexpr
):  # fmt: skip
    """total [M, V_PADDED] into out [rows, num_columns, V_HEAD]."""
    dims = tl.arange(0, V_PADDED)
    at = (rows.to(tl.int64) * num_columns + column)[:, None] * V_HEAD + dims[None, :]
    mask = is_row[:, None] & (dims < V_HEAD)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def owner_of(starts, value, count):
    """How many of starts[0 .. count) are at most value, in loads that do not wait for each other:
    one more than the index of the one that value belongs to."""
    found = 0
    for begin in range(0, count, 128):
        at = begin + tl.arange(0, 128)
        start = tl.load(starts + at, mask=at < count, other=2147483647)
        found += tl.sum((start <= value).to(tl.int32))
    return found
