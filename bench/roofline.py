"""What the machine allows: the limits that decode and prefill are measured against.

Roofline model: Williams, Waterman & Patterson, 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from inlay.bench.metrics import Record
from inlay.bench.program_cost import Product, ProgramCost

READ_BYTES = 256 << 20
"""Larger than the caches a core can call its own, small enough to be quick."""

FORMULAS = {
    "decode share": "(bytes of weights as stored + KV bytes read) of a step / TPOT / read probe",
    "prefill share": "(2 * weight elements met by each token + attention) / TTFT / product rate",
    "memory share": "(steps * weight bytes + KV bytes read) / seconds / read probe",
    "compute share": "operations of all tokens that were run / seconds / product rate",
    "read probe": "the best of streams read by all threads, between the repeats",
    "product rate": "the best of torch's and oneDNN's products at the model's own shapes, in its "
    "type or in float32",
}


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second that all threads together read in one stream; the best of some tries.

    The best, since the question is what the memory can do, not what its other users left.
    """
    data = torch.ones(READ_BYTES // 4, dtype=torch.int32)
    return READ_BYTES / _best(lambda: torch.max(data), repeats)


def product_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations per second of a large matrix product in this dtype; the best of some tries."""
    x, weight = torch.ones(512, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
    return 2 * 512 * 2048 * 2048 / _best(lambda: F.linear(x, weight), repeats)


def shape_rate(products: Iterable[Product], rows: int, repeats: int = 3) -> float:
    """Operations per second of a step's products of so many rows, each as fast as torch or oneDNN
    computes it, weighted by how often the model calls it; those of logits are left out."""
    counts: dict[Product, float] = {}
    for product in products:
        if not product.per_logit:
            kind = replace(product, calls=1.0)
            counts[kind] = counts.get(kind, 0.0) + product.calls
    seconds = 0.0
    with torch.inference_mode():
        for product, calls in counts.items():
            seconds += calls * min(_best(call, repeats) for call in _calls(product, rows))
    return sum(product.flops * calls for product, calls in counts.items()) * rows / seconds


def decode_bytes(engine: Any, num_cached_tokens: int = 0, kv_cache_dtype: str = "auto") -> int:
    """Bytes that one decode step of one request must read: weights once, its KV cache once.

    An embedding table that is only looked up in does not count; a tied one is the LM head too.
    """
    cost = ProgramCost(engine, kv_cache_dtype)
    return round(cost.weight_bytes() + cost.kv_bytes(num_cached_tokens))


def decode_share(
    cost: ProgramCost, contexts: Sequence[int], step_seconds: float, bandwidth: float
) -> float:
    """Of the bandwidth, by steps of requests that each see so many tokens."""
    return (cost.weight_bytes(len(contexts)) + cost.kv_bytes(contexts)) / step_seconds / bandwidth


def prefill_share(
    cost: ProgramCost, num_tokens: Sequence[int], seconds: float, rate: float
) -> float:
    """Of the product rate, by prompts of so many tokens that nothing was cached of."""
    flops = cost.product_flops(sum(num_tokens), len(num_tokens))
    flops += sum(cost.attention_flops(range(1, count + 1)) for count in num_tokens)
    return flops / seconds / rate


def load_shares(
    cost: ProgramCost,
    records: Sequence[Record],
    num_steps: int,
    seconds: float,
    bandwidth: float,
    rate: float,
) -> dict[str, float]:
    """Of bandwidth and product rate, over a whole load: what its requests cannot have avoided.

    A prompt's cache is taken to be read once, by its last chunk. Requests that failed count with
    what came of them, where their prompt was run.
    """
    num_bytes, flops, num_tokens = 0.0, 0.0, 0
    for record in records:
        if not record.num_output:
            continue
        end = record.num_input + record.num_output  # the last token is not run
        first = range(record.num_cached + 1, record.num_input + 1)
        later = range(record.num_input + 1, end)
        num_tokens += len(first) + len(later)
        num_bytes += cost.kv_bytes(record.num_input) + cost.kv_bytes(later)
        flops += cost.product_flops(len(first) + len(later), record.num_output)
        flops += cost.attention_flops(first) + cost.attention_flops(later)
    per_step = max(round(num_tokens / max(num_steps, 1)), 1)
    num_bytes += num_steps * cost.weight_bytes(per_step)
    return {
        "memory_share": num_bytes / seconds / bandwidth,
        "compute_share": flops / seconds / rate,
        "read_gb_s": bandwidth / 1e9,
        "product_gflop_s": rate / 1e9,
    }


def _calls(product: Product, rows: int) -> list[Callable[[], object]]:
    """The ways in which a library computes a product. In float32 too: without instructions for
    narrow types libraries emulate these, and no machine's rate is below its float32 one."""
    n, k = product.out_features, product.in_features
    calls = _float_calls(rows, n, k, torch.float32)
    if product.dtype == "int8":
        q, packed = (torch.randint(-9, 9, shape, dtype=torch.int8) for shape in ((rows, k), (n, k)))
        return [*calls, lambda: torch._int_mm(q, packed.t())]
    dtype: torch.dtype = getattr(torch, product.dtype)
    return calls if dtype == torch.float32 else [*calls, *_float_calls(rows, n, k, dtype)]


def _float_calls(rows: int, n: int, k: int, dtype: torch.dtype) -> list[Callable[[], object]]:
    x, weight = torch.ones(rows, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
    calls: list[Callable[[], object]] = [lambda: F.linear(x, weight)]
    with suppress(AttributeError, RuntimeError):  # a build of torch without oneDNN, or this dtype
        ops = torch.ops.mkldnn
        reordered = ops._reorder_linear_weight(weight.to_mkldnn(), rows)
        ops._linear_pointwise(x, reordered, None, "none", [], "")
        calls.append(lambda: ops._linear_pointwise(x, reordered, None, "none", [], ""))
    return calls


def _best(call: Callable[[], object], repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best
