"""Put new keys and values into their cache slots, rounded as `passes/kv_formats.py` says, bit by
bit: true divisions, ties to even, NaN kept. A negative slot is padding and is not written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.backends.kernels.triton.attention_tile import round_to_bfloat16
from inlay.backends.kernels.triton.launch import Launch, next_power_of_2
from inlay.backends.kv_caches import LayerCache

_FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@triton.jit
def _clamp(x, largest):
    """To [-largest, largest]; NaN stays."""
    return tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))


@triton.jit
def _to_e4m3(x):
    """The bits of float32 numbers in [-448, 448] or NaN as e4m3, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 numbers are multiples of 2^-9: adding 2^14, whose last place that is, rounds so.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    # 7 bits of exponent bias, 3 of mantissa: half of the last place less one, plus its parity.
    normal = (size - 0x3C000000 + 0x7FFFF + ((size >> 20) & 1)) >> 20
    result = tl.where(size < 0x3C800000, small, normal)
    result = tl.where(size > 0x7F800000, 0x7F, result)
    return (result | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def _write_vectors(
    x, cache, scales, scale_at, from_at, to_at, mask,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Vectors [heads, D] at from_at into to_at; int8's scales [heads] at scale_at."""
    value = tl.load(x + from_at, mask=mask, other=0.0)
    if FORMAT == "int8":
        value = value.to(tl.float32)
        size = tl.abs(value)
        not_number = tl.max((size != size).to(tl.int32), 1) > 0
        scale = tl.div_rn(tl.max(size, 1), tl.full(size.shape[:1], 127.0, tl.float32))
        scale = tl.where(not_number, float("nan"), scale)
        steps = tl.div_rn(value, tl.broadcast_to(scale[:, None], size.shape))
        steps = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: whole numbers, ties to even
        # 0 / 0, NaN / NaN and inf / inf: no number, stored as 0.
        steps = tl.where(steps == steps, _clamp(steps, 127.0), 0.0)
        tl.store(cache + to_at, steps.to(tl.int8), mask=mask)
        tl.store(scales + scale_at, scale, mask=tl.max(mask.to(tl.int32), 1) > 0)
    elif FORMAT == "fp8":
        value = value.to(tl.float32)
        value = tl.div_rn(value, tl.full(value.shape, 1.0, tl.float32) * tl.load(scales))
        tl.store(cache + to_at, _to_e4m3(_clamp(value, 448.0)), mask=mask)
    elif FORMAT == "cast":
        value = _clamp(value.to(tl.float32), LARGEST)
        if cache.dtype.element_ty == tl.bfloat16:
            value = round_to_bfloat16(value)
        tl.store(cache + to_at, value.to(cache.dtype.element_ty), mask=mask)
    else:
        tl.store(cache + to_at, value, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_kernel(
    k, v, k_cache, v_cache, k_scales, v_scales, slots,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    NUM_HEADS: tl.constexpr, HEAD: tl.constexpr, V_HEAD: tl.constexpr, PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    FORMAT: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One program: token, HEADS KV heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)
    dims, v_dims = tl.arange(0, PADDED), tl.arange(0, V_PADDED)
    row = (slot // BLOCK_SIZE * NUM_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    _write_vectors(
        k, k_cache, k_scales, row,
        token * stride_k_token + (head * stride_k_head)[:, None] + dims[None, :],
        (row * HEAD)[:, None] + dims[None, :],
        (head < NUM_HEADS)[:, None] & (dims < HEAD)[None, :],
        FORMAT, LARGEST,
    )  # fmt: skip
    _write_vectors(
        v, v_cache, v_scales, row,
        token * stride_v_token + (head * stride_v_head)[:, None] + v_dims[None, :],
        (row * V_HEAD)[:, None] + v_dims[None, :],
        (head < NUM_HEADS)[:, None] & (v_dims < V_HEAD)[None, :],
        FORMAT, LARGEST,
    )  # fmt: skip


def plan_write(k: Tensor, v: Tensor, cache: LayerCache, slots: Tensor) -> Launch:
    """k [T, Hk, D], v [T, Hk, Dv] into a cache [blocks, Hk, block_size, D] at slots [T] int64.

    Any strides of tokens and heads; the last dimension is dense.
    """
    num_tokens, num_heads, head = k.shape
    v_head, dtype = v.shape[2], cache.k.dtype
    padded, v_padded = next_power_of_2(head), next_power_of_2(v_head)
    together = next_power_of_2(num_heads)
    while together > 1 and together * max(padded, v_padded) > 2048:
        together //= 2
    k_cache, v_cache = cache.k, cache.v
    if dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    copied = "copy" if dtype == k.dtype else "cast"
    return Launch(
        write_kernel,
        (num_tokens, triton.cdiv(num_heads, together)),
        {
            "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache,
            "k_scales": cache.k_scales, "v_scales": cache.v_scales, "slots": slots,
            "stride_k_token": k.stride(0), "stride_k_head": k.stride(1),
            "stride_v_token": v.stride(0), "stride_v_head": v.stride(1),
            "NUM_HEADS": num_heads, "HEAD": head, "V_HEAD": v_head, "PADDED": padded,
            "V_PADDED": v_padded, "BLOCK_SIZE": cache.k.shape[2], "HEADS": together,
            "FORMAT": _FORMATS.get(dtype, copied),
            "LARGEST": torch.finfo(dtype).max if dtype.is_floating_point else 0.0,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip
