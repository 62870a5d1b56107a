"""Attention calls for the Triton kernels: their arguments, the exact answer, what may differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from inlay.backends.kernels.triton.launch import Target
from inlay.backends.kernels.triton.paged_attention import TritonAttention
from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep
from inlay.passes import ops as reference_ops
from tests.backends.test_cpu_ops import Attention
from tests.backends.test_kv_dtypes import Store, as_read, stored

FP8, INT8 = torch.float8_e4m3fn, torch.int8
RTOL = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half a unit in the last place of what is returned."""
INTERPRETED_RTOL = {**RTOL, torch.bfloat16: 2.0**-7}
"""The interpreter cuts off what bfloat16 does not hold."""
ATOL = 3e-5
"""Scores of up to 40 are a few 2^-24 of themselves off, so are weights; values are up to 4."""


@dataclass
class Result:
    out: torch.Tensor
    written: list[torch.Tensor | None]  # k, v, k_scales, v_scales after the call


def step_of(call: Attention) -> AttentionStep:
    return AttentionStep(
        layer=0, group=0, cache=0, query="q", key="k", value="v", output="o",
        num_heads=call.q.shape[1], num_kv_heads=call.k.shape[1], head_dim=call.q.shape[2],
        v_head_dim=call.v.shape[2], scale=call.scale, window=call.window, softcap=call.softcap,
        sinks=None if call.sinks is None else "sinks", causal=call.causal, chunk=call.chunk,
        slopes=None if call.slopes is None else "slopes",
    )  # fmt: skip


def run_triton(call: Attention, k: Store, v: Store, device: str, target: Target | None) -> Result:
    """What is returned holds NaN wherever the kernels have written nothing."""
    place = torch.device(device)
    tensors = [x if x is None else x.clone().to(place) for x in (k[0], v[0], k[1], v[1])]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is filled with NaN
    try:
        out = TritonAttention(place, target)(
            step_of(call), call.q.to(place), call.k.to(place), call.v.to(place),
            LayerCache(*tensors),  # type: ignore[arg-type]
            call.slot_mapping.to(place), call.block_table.to(place), call.seq_lens.to(place),
            call.query_start_loc.to(place),
            None if call.sinks is None else call.sinks.to(place),
            None if call.slopes is None else call.slopes.to(place),
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(before)
    return Result(out.cpu(), [x if x is None else x.cpu() for x in tensors])


def run_reference(call: Attention, k: Store, v: Store) -> Result:
    tensors = [x if x is None else x.clone() for x in (k[0], v[0], k[1], v[1])]
    out = reference_ops.paged_attention(
        call.q, call.k, call.v, *tensors[:2], call.slot_mapping, call.block_table, call.seq_lens,
        call.query_start_loc, 0, call.scale, call.window, call.softcap, call.sinks, call.causal,
        call.chunk, call.slopes, *tensors[2:],
    )  # fmt: skip
    return Result(out, tensors)


def absolute_tolerance(call: Attention, dtype: torch.dtype, device: str) -> float:
    """Weights are rounded to the type of the values' product: each by half a unit of itself, so
    that a mean of values moves by no more than that of the largest value. Products of bfloat16,
    which is int8's too, are float32's in the interpreter."""
    q = call.q.dtype
    if q == torch.float32 or (q == torch.float16 and dtype == torch.bfloat16):
        return ATOL
    in_half = dtype in (FP8, torch.float16) and (q == torch.bfloat16 or dtype != torch.bfloat16)
    if in_half or (dtype != INT8 and q == torch.float16):
        unit = 2.0**-11
    else:
        unit = 2.0**-8 if device == "cuda" else 0.0
    return ATOL + unit * float(call.v.abs().max().clamp(min=4.0))


def check(
    call: Attention,
    dtype: torch.dtype | None = None,
    fp8_scale: float = 1.0,
    device: str = "cpu",
    target: Target | None = None,
    expected_of: Attention | None = None,
) -> None:
    """The kernels equal exact attention over what the cache holds; the cache is the reference's,
    bit by bit. expected_of: the call that the answer is asked of, where that is another one."""
    dtype = dtype or call.q.dtype
    k, v = stored(call.k_cache, dtype, fp8_scale), stored(call.v_cache, dtype, fp8_scale)
    got = run_triton(call, k, v, device, target)
    expected = as_read(expected_of or call, k, v).reference()[0]
    torch.testing.assert_close(
        got.out.double(),
        expected,
        rtol=RTOL[call.q.dtype] if device == "cuda" else INTERPRETED_RTOL[call.q.dtype],
        atol=absolute_tolerance(call, dtype, device),
    )
    for ours, theirs in zip(got.written, run_reference(call, k, v).written, strict=True):
        if theirs is not None:
            assert ours is not None
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)
