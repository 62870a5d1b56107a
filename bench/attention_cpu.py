"""Paged attention in C++ alone: decode, prefill and mixed steps, for each dtype of the cache.

    python -m inlay.bench.kernels_cpu [--threads 2] [--repeats 20] [decode prefill mixed]

One JSON line for each step. Caches of one step run in turns, eight of each, as of eight layers, and
the best time of each counts: a decode is bound by memory, so beside its GB/s of cache stands that
of a stream (`read_gb_s`), and beside a prefill's GFLOP/s dense SDPA and what a large matrix product
reaches. Outputs are compared first with attention in float32: `error` is relative, in norm, and
`sdpa_error` that of torch's own in the same dtype. With one thread times are of its CPU clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from inlay.backends.kernels.cpu_attention import CpuAttention
from inlay.backends.program import AttentionStep
from inlay.bench.roofline import product_rate, read_bandwidth
from inlay.passes.kv_formats import KV_CACHE_DTYPES, vector_nbytes

Run = Callable[[], Any]
Requests = Sequence[tuple[int, int]]
"""(cached tokens after the step, new tokens) of each."""

NUM_CACHES, BLOCK_SIZE = 8, 16
HEADS = ((14, 2, 64), (32, 8, 64), (32, 8, 128))
DECODES: dict[str, Requests] = {
    "16 x 1024": [(1024, 1)] * 16,
    "1 x 4096": [(4096, 1)],
    "64 x 512": [(512, 1)] * 64,
}
MIXED: Requests = [*[(1024, 1)] * 12, (512, 512), (900, 300)]


def best_seconds(runs: dict[str, Run], repeats: int) -> dict[str, float]:
    """The shortest time of each, taken in turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            best[name] = min(best[name], clock() - begin)
    return best


def attention_call(
    requests: Requests,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    num_caches: int = 1,
    cache: torch.dtype | None = None,
) -> tuple[Run, list[torch.Tensor]]:
    """A step of requests over caches of this dtype (None: the queries'), which rotate.

    Returns the call and [q, k, v] of the new tokens.
    """
    blocks = [-(-length // block_size) for length, _ in requests]
    order = torch.randperm(sum(blocks), dtype=torch.int32)
    table = torch.zeros(len(requests), max(blocks), dtype=torch.int32)
    slots, starts = [], [0]
    for b, (length, new) in enumerate(requests):
        begin = sum(blocks[:b])
        table[b, : blocks[b]] = order[begin : begin + blocks[b]]
        where = torch.arange(length - new, length)
        slots.append(table[b].long()[where // block_size] * block_size + where % block_size)
        starts.append(starts[-1] + new)
    step = AttentionStep(
        0, 0, 0, "q", "k", "v", "o", num_heads, num_kv_heads, head_dim, head_dim, head_dim**-0.5
    )
    attention = CpuAttention()
    kept = []
    for _ in range(num_caches):
        layer = attention.allocate(step, sum(blocks), block_size, cache or dtype)
        for tensor in layer.block_tensors:
            tensor.copy_(torch.randn(tensor.shape).mul_(20 if cache == torch.int8 else 1))
        for scales in (layer.k_scales, layer.v_scales):
            if scales is not None:
                scales.fill_(0.05 if cache == torch.int8 else 1.0)
        kept.append(layer)
    caches = itertools.cycle(kept)
    q, k, v = (
        torch.randn(starts[-1], h, head_dim).to(dtype)
        for h in (num_heads, num_kv_heads, num_kv_heads)
    )
    batch = (
        torch.cat(slots),
        table,
        torch.tensor([length for length, _ in requests], dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
    )

    def call() -> torch.Tensor:
        return attention(step, q, k, v, next(caches), *batch, None, None)

    return call, [q, k, v]


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in KV_CACHE_DTYPES.items() if value == dtype)


KINDS = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float32, torch.float32),
)
"""Dtypes of queries and cache."""


def _calls(requests: Requests, heads: tuple[int, int, int]) -> dict[str, Run]:
    return {
        f"{_name(dtype)}/{_name(cache)}": attention_call(
            requests, *heads, dtype, BLOCK_SIZE, NUM_CACHES, cache
        )[0]
        for dtype, cache in KINDS
    }


def bench_decode(repeats: int) -> Iterator[dict[str, Any]]:
    for name, requests in DECODES.items():
        for heads in HEADS:
            seconds = best_seconds(_calls(requests, heads), 2 * repeats)
            tokens = sum(length for length, _ in requests)
            sizes = [2 * tokens * heads[1] * vector_nbytes(kind[1], heads[2]) for kind in KINDS]
            yield {
                "bench": "decode",
                "requests": name,
                "heads": heads,
                "ms": {kind: round(s * 1e3, 3) for kind, s in seconds.items()},
                "gb_s": {
                    kind: round(size / s / 1e9, 1)
                    for (kind, s), size in zip(seconds.items(), sizes, strict=True)
                },
                "read_gb_s": round(read_bandwidth() / 1e9, 1),
            }


def bench_mixed(repeats: int) -> Iterator[dict[str, Any]]:
    for heads in HEADS:
        seconds = best_seconds(_calls(MIXED, heads), repeats)
        yield {
            "bench": "mixed",
            "requests": MIXED,
            "heads": heads,
            "ms": {kind: round(s * 1e3, 3) for kind, s in seconds.items()},
        }


def _error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def bench_prefill(repeats: int, tokens: int = 1024) -> Iterator[dict[str, Any]]:
    for heads in HEADS:
        for dtype, cache in KINDS:
            call, qkv = attention_call([(tokens, tokens)], *heads, dtype, BLOCK_SIZE, 1, cache)
            dense = [x.transpose(0, 1)[None].contiguous() for x in qkv]

            def sdpa(dense: Sequence[torch.Tensor] = dense) -> torch.Tensor:
                q, k, v = dense
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            exact = sdpa([x.float() for x in dense])[0].transpose(0, 1)
            errors = _error(call(), exact), _error(sdpa()[0].transpose(0, 1), exact)
            assert errors[0] < 0.1, f"outputs differ by {errors[0]:.3f}"
            seconds = best_seconds({"own": call, "sdpa": sdpa}, repeats)
            flops = 2 * tokens * (tokens + 1) * heads[0] * heads[2]
            yield {
                "bench": "prefill",
                "tokens": tokens,
                "heads": heads,
                "kind": f"{_name(dtype)}/{_name(cache)}",
                "ms": round(seconds["own"] * 1e3, 2),
                "sdpa_ms": round(seconds["sdpa"] * 1e3, 2),
                "gflop_s": round(flops / seconds["own"] / 1e9),
                "product_gflop_s": round(product_rate(dtype) / 1e9),
                "error": float(f"{errors[0]:.2g}"),
                "sdpa_error": float(f"{errors[1]:.2g}"),
            }


BENCHES = {"decode": bench_decode, "prefill": bench_prefill, "mixed": bench_mixed}
