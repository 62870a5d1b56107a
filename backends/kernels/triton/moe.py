# ruff: noqa: N806
"""What a mixture of experts needs around its matrix products: sorting, activations, the sum.

Nothing here has a size that depends on which experts were chosen, so the host never waits. A chosen
expert outside 0..E-1 is none, as `inlay::experts` says: its pair is not sorted in, and the sum
leaves it out whatever its weight is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from inlay.backends.kernels.triton.launch import is_interpreting

INTERPRETED = tl.constexpr(is_interpreting())


@triton.jit(do_not_specialize=["num_pairs"])
def sort_kernel(index, order, offsets, num_pairs, num_experts, BLOCK: tl.constexpr):
    """One expert's pairs, in their order: a stable counting sort in which each program counts all.

    index int64 [T * K] -> order int32 [T * K], the pairs by expert, and offsets int32 [E + 1].
    """
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    smaller = tl.zeros((BLOCK,), dtype=tl.int32)
    own = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK):
        chosen = tl.load(index + start + at, mask=start + at < num_pairs, other=-1)
        smaller += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    first = tl.sum(smaller, 0)
    tl.store(offsets + expert, first)
    if expert == num_experts - 1:
        tl.store(offsets + num_experts, first + tl.sum(own, 0))
    for start in range(0, num_pairs, BLOCK):
        chosen = tl.load(index + start + at, mask=start + at < num_pairs, other=-1)
        mine = (chosen == expert).to(tl.int32)
        place = first + tl.cumsum(mine, 0) - 1
        tl.store(order + place, start + at, mask=mine != 0)
        first += tl.sum(mine, 0)


@triton.jit
def _tanh(x):
    """libdevice's; the interpreter has none, and this loses digits near 0 only."""
    return 2 * tl.sigmoid(2 * x) - 1 if INTERPRETED else libdevice.tanh(x)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, alpha, softcap, HAS_CAP: tl.constexpr):
    """`ACTIVATIONS` of passes/experts_op.py, in float32."""
    if ACTIVATION == "silu":
        linear = _tanh(x / softcap) * softcap if HAS_CAP else x
        value = linear * tl.sigmoid(alpha * x)
    elif ACTIVATION == "gelu":
        value = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        value = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        value = _relu(x)
    elif ACTIVATION == "relu2":
        value = _relu(x) * _relu(x)
    elif ACTIVATION == "sigmoid":
        value = tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        value = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "linear")
        value = x
    return value


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)  # NaN passes


@triton.jit
def _at_most(x, limit):
    return tl.where(x > limit, limit, x)  # NaN passes


@triton.jit
def _round_even(x):
    """To the nearest integer below 2^22, ties to even: adding 1.5 * 2^23 leaves no other bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3_bits(x):
    """float32 of at most 448 to e4m3 as uint8, rounded to nearest, ties to even, on any GPU."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the exponents' biases: 120 << 3
    code = tl.where(magnitude < 0.015625, _round_even(magnitude * 512).to(tl.uint32), normal)
    return (code | tl.where(x < 0, 128, 0)).to(tl.uint8)


@triton.jit
def _store_row(values, q, scales, row, columns, width, QUANTIZED: tl.constexpr):
    """A row of float32 as it is, or as `quantize_int8` or `quantize_fp8` (bits) have it."""
    inside = columns < width
    at = q + row * width + columns
    if QUANTIZED == "none":
        tl.store(at, values.to(q.dtype.element_ty), mask=inside)
    else:
        LARGEST: tl.constexpr = 127.0 if QUANTIZED == "int8" else 448.0
        amax = tl.max(tl.where(inside, tl.abs(values), 0.0), 0)
        is_nan = tl.max((inside & (values != values)).to(tl.int32), 0) > 0
        amax = tl.where(is_nan, float("nan"), amax)
        scaled = values * tl.where(amax > 1e-30, LARGEST / amax, 0.0)
        scaled = tl.where(scaled == scaled, scaled, 0.0)  # the scale is NaN, that is enough
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        if QUANTIZED == "int8":
            tl.store(at, _round_even(scaled).to(tl.int8), mask=inside)
        else:
            tl.store(at, _e4m3_bits(scaled), mask=inside)
        tl.store(scales + row, amax / LARGEST)


@triton.jit
def quantize_kernel(x, q, scales, stride, width, QUANTIZED: tl.constexpr, BLOCK: tl.constexpr):
    """A row of x for each program: x [T, K] -> q [T, K], scales float32 [T]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    _store_row(values, q, scales, row, columns, width, QUANTIZED)


@triton.jit
def activate_kernel(
    hidden,
    out,
    scales,
    bias,
    order,
    offsets,
    index,
    width,
    alpha,
    gate_limit,
    up_limit,
    up_offset,
    gate_softcap,
    up_softcap,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE_LIMIT: tl.constexpr,
    LIMIT_ACTIVATED: tl.constexpr,
    HAS_UP_LIMIT: tl.constexpr,
    HAS_GATE_CAP: tl.constexpr,
    HAS_UP_CAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    ROUND_TO: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between an expert's two products, a sorted row for each program: hidden [T * K, 2 width] (or
    width, not GATED) -> out [T * K, width], in hidden's dtype or quantized.

    LAST: num_experts; rows from offsets[LAST] on belong to no expert.
    """
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(offsets + LAST):
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    first = columns * 2 if INTERLEAVED else columns
    second = first + 1 if INTERLEAVED else first + width
    FACTOR: tl.constexpr = 2 if GATED else 1
    at = hidden + row * (width * FACTOR)
    gate = tl.load(at + first, mask=inside, other=0.0).to(tl.float32)
    bias_at = bias
    if HAS_BIAS:
        expert = tl.load(index + tl.load(order + row))
        bias_at = bias + expert.to(tl.int64) * (width * FACTOR)
        gate += tl.load(bias_at + first, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE_LIMIT and not LIMIT_ACTIVATED:
        gate = _at_most(gate, gate_limit)
    value = _activate(gate, ACTIVATION, alpha, gate_softcap, HAS_GATE_CAP)
    if HAS_GATE_LIMIT and LIMIT_ACTIVATED:
        value = _at_most(value, gate_limit)
    if GATED:
        up = tl.load(at + second, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(bias_at + second, mask=inside, other=0.0).to(tl.float32)
        if HAS_UP_LIMIT:
            up = -_at_most(-_at_most(up, up_limit), up_limit)
        if HAS_UP_CAP:
            up = _tanh(up / up_softcap) * up_softcap
        value *= up + up_offset
    value = value.to(ROUND_TO).to(tl.float32)
    _store_row(value, out, scales, row, columns, width, QUANTIZED)


@triton.jit
def combine_kernel(
    parts,
    index,
    weights,
    bias,
    norm_weight,
    out,
    num_experts,
    width,
    norm_eps,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token for each program: parts [T * K, H], by token and choice -> out [T, H].

    Its experts' rows, with bias and norm, times their weights, summed in the order of choice.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(index + pair)
        if (expert >= 0) & (expert < num_experts):
            row = tl.load(parts + pair * width + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                row += tl.load(bias + expert * width + columns, mask=inside, other=0.0).to(
                    tl.float32
                )
            if HAS_NORM:
                gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
                row *= 1.0 + gain
                mean = tl.sum(tl.where(inside, row * row, 0.0), 0) / width
                row *= 1 / tl.sqrt(mean + norm_eps)
            total += row * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=inside)
