"""Which attention kernels serve a step, with which tiles and types: from shapes and the device's
model alone, so that nobody waits for the device and a CUDA graph can hold the launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inlay.backends.kernels.triton.attention_configs import MAX_HEAD, Tiles, tiles_for
from inlay.backends.kernels.triton.attention_decode import combine_kernel, decode_kernel
from inlay.backends.kernels.triton.attention_prefill import prefill_kernel
from inlay.backends.kernels.triton.launch import (
    Launch,
    Target,
    is_interpreting,
    next_power_of_2,
)
from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep

PROGRAMS_PER_SM = 8
"""Decode programs to aim for: two or three run at once, so a few rounds even out lengths."""
MAX_SPLITS = 128
_NO_LIMIT = 1 << 30
"""A window or chunk beyond every position, whose sum with one still is an int32."""


@dataclass(frozen=True)
class Batch:
    """One layer's attention call; see `inlay::paged_attention`."""

    step: AttentionStep
    q: Tensor
    cache: LayerCache
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    sinks: Tensor | None
    slopes: Tensor | None


def unsupported(
    step: AttentionStep, dtype: torch.dtype, kv_dtype: torch.dtype, target: Target
) -> str | None:
    """Why these kernels do not serve a layer; None where they do."""
    if target.capability < 80:
        return f"compute capability {target.capability / 10} is below 8.0"
    if torch.float64 in (dtype, kv_dtype):
        return "float64 has no kernel"
    if max(step.head_dim, step.v_head_dim) > MAX_HEAD:
        return f"heads of {step.head_dim} and {step.v_head_dim} are larger than {MAX_HEAD}"
    if step.scale < 0:
        return f"the scale {step.scale} is negative"
    return None


def plan_attention(batch: Batch, out: Tensor, target: Target) -> list[Launch]:
    """The launches that fill all of out [T, Hq, Dv], dense, which may hold anything before.

    Where there are no more tokens than requests each token is a row of the decode kernel, whoever's
    it is. Else the prefill kernel serves requests of several tokens and padding, and the decode
    kernel those of one.
    """
    assert batch.cache.k.is_contiguous(), "rows of a cache are numbered as if it were dense"
    num_tokens, num_requests = batch.q.shape[0], batch.seq_lens.shape[0]
    per_token = num_tokens <= max(num_requests, 2)  # a lone request's token has one of padding
    rows = num_tokens if per_token else num_requests
    launches = _plan_decode(batch, out, rows, per_token, target)
    return launches if per_token else [*launches, _plan_prefill(batch, out, target)]


def _plan_decode(
    batch: Batch, out: Tensor, rows: int, per_token: bool, target: Target
) -> list[Launch]:
    step, group = batch.step, batch.step.num_heads // batch.step.num_kv_heads
    shared, tiles = _shared_args(batch, out, "decode", target)
    block_m = min(max(next_power_of_2(group), 16), tiles.block_m)
    programs = rows * step.num_kv_heads * triton.cdiv(group, block_m)
    splits = _num_splits(programs, batch, tiles.block_n, target)
    # Without splits nothing is joined: any pointer does.
    partial = partial_log2 = out
    if splits > 1:
        shape = rows, step.num_heads, splits
        partial = out.new_empty(*shape, step.v_head_dim, dtype=torch.float32)
        partial_log2 = out.new_empty(*shape, dtype=torch.float32)
    args = {
        **shared, "partial": partial, "partial_log2": partial_log2, "BLOCK_M": block_m,
        "num_splits": splits, "SPLIT": splits > 1, "PER_TOKEN": per_token, "AT_ONCE": 16,
    }  # fmt: skip
    grid = rows, programs // rows, splits
    decode = Launch(decode_kernel, grid, args, tiles.num_warps, tiles.num_stages)
    if splits == 1:
        return [decode]
    return [decode, Launch(combine_kernel, (rows, step.num_heads), args, 4, 1)]


def _num_splits(programs: int, batch: Batch, block_n: int, target: Target) -> int:
    """Enough programs for the device, but not more than there are tiles in the longest request that
    the table's width allows."""
    longest = batch.block_table.shape[1] * batch.cache.k.shape[2]
    for limit in (batch.step.window, batch.step.chunk):
        longest = min(longest, limit + block_n) if limit > 0 else longest
    wanted = triton.cdiv(target.num_sms * PROGRAMS_PER_SM, max(programs, 1))
    most = min(triton.cdiv(longest, block_n), MAX_SPLITS)
    return max(min(wanted, most), 1)


def _plan_prefill(batch: Batch, out: Tensor, target: Target) -> Launch:
    step = batch.step
    shared, tiles = _shared_args(batch, out, "prefill", target)
    num_tokens, num_requests = batch.q.shape[0], batch.seq_lens.shape[0]
    # At most: each request's last tile may be begun only, and padding's.
    programs = num_tokens * shared["GROUP"] // tiles.block_m + num_requests + 1
    args = {
        **shared,
        "num_tokens": num_tokens,
        "BLOCK_M": tiles.block_m,
        "MASKED_N": tiles.masked_n,
    }
    grid = programs, step.num_kv_heads
    return Launch(prefill_kernel, grid, args, tiles.num_warps, tiles.num_stages)


def _shared_args(
    batch: Batch, out: Tensor, kind: str, target: Target
) -> tuple[dict[str, Any], Tiles]:
    step, cache, slopes = batch.step, batch.cache, batch.slopes
    padded, v_padded = (max(next_power_of_2(n), 16) for n in (step.head_dim, step.v_head_dim))
    formats = _formats(batch.q.dtype, cache.k.dtype, target)
    bits = 32 if formats["DOT"] == tl.float32 else cache.k.dtype.itemsize * 8
    if is_interpreting():  # its bfloat16 is wrong; the tiles stay the device's
        formats.update({n: tl.float32 for n in ("DOT", "V_DOT") if formats[n] == tl.bfloat16})
    tiles = tiles_for(kind, target.capability, bits, max(padded, v_padded))
    k_cache, v_cache = cache.k, cache.v
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    slopes_kind = "none"
    if slopes is not None:
        slopes_kind = "of_key" if slopes.dtype == torch.bfloat16 else "of_distance"
    args = {
        "q": batch.q, "k_cache": k_cache, "v_cache": v_cache,
        "k_scales": cache.k_scales, "v_scales": cache.v_scales, "table": batch.block_table,
        "seq_lens": batch.seq_lens, "starts": batch.query_start_loc, "sinks": batch.sinks,
        "slopes": slopes, "out": out, "num_requests": batch.seq_lens.shape[0],
        "scale": float(step.scale), "softcap": float(step.softcap),
        "window": min(step.window, _NO_LIMIT), "chunk": min(step.chunk, _NO_LIMIT),
        "stride_q_token": batch.q.stride(0), "stride_q_head": batch.q.stride(1),
        "stride_table": batch.block_table.stride(0),
        "GROUP": step.num_heads // step.num_kv_heads, "HEAD": step.head_dim,
        "V_HEAD": step.v_head_dim, "PADDED": padded, "V_PADDED": v_padded,
        "NUM_HEADS": step.num_heads, "BLOCK_SIZE": cache.k.shape[2], "BLOCK_N": tiles.block_n,
        **formats, "CAUSAL": step.causal, "WINDOW": step.window > 0, "CHUNK": step.chunk > 0,
        "SOFTCAP": step.softcap > 0, "SLOPES": slopes_kind, "SINKS": batch.sinks is not None,
    }  # fmt: skip
    return args, tiles


_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _formats(dtype: torch.dtype, kv_dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """How the cache's numbers become operands of tensor cores: exactly, in every case.

    e4m3 becomes float16 in hardware, so products are float16's, with bfloat16 queries scaled to its
    range. int8 is exact in bfloat16, too, whose range the weights need once multiplied by a token's
    scale. Pairs of types that have no such common type meet in float32.
    """
    found = {"FORMAT": "plain", "NORMALISE": False, "PRECISION": "ieee"}
    dot = v_dot = tl.float32
    if kv_dtype == torch.float8_e4m3fn:
        in_hardware = target.capability >= 89 and not is_interpreting()
        found["FORMAT"] = "fp8" if in_hardware else "fp8_bits"
    elif kv_dtype == torch.int8:
        found["FORMAT"] = "int8"
    if dtype == kv_dtype:
        dot = v_dot = _TL_DTYPES[dtype]
    elif dtype != torch.float32 and kv_dtype == torch.int8:
        dot, v_dot = _TL_DTYPES[dtype], tl.bfloat16
    elif dtype != torch.float32 and kv_dtype in (torch.float8_e4m3fn, torch.float16):
        dot = v_dot = tl.float16
        found["NORMALISE"] = dtype == torch.bfloat16
    return {**found, "DOT": dot, "V_DOT": v_dot}
