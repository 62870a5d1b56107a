"""Kernels at small sizes, each beside torch's own: `pytest bench/suites --benchmark-only`.

Sizes fit into caches, so these figures show what a change costs, not what a model will do: that is
`inlay bench kernels`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inlay.backends.kernels.cpu_ops import load_ops
from inlay.bench.kernels_cpu import attention_call, check_close
from inlay.runtime.sampler import Sampler
from inlay.runtime.sampling_params import SamplingParams

OUT, IN = 1152, 896
"""The fused query, key and value product of the 0.5b shape."""


@pytest.fixture(scope="module", autouse=True)
def ops() -> None:
    load_ops()
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 16, 256])
@pytest.mark.parametrize("variant", ["packed", "F.linear"])
def bench_linear(benchmark: Any, rows: int, variant: str) -> None:
    benchmark.group = f"linear {OUT} x {IN}, bfloat16, {rows} rows"
    x, weight = torch.randn(rows, IN).bfloat16(), torch.randn(OUT, IN).mul_(0.02).bfloat16()
    handle = torch.ops.inlay_cpu.pack_linear(weight)
    packed = partial(torch.ops.inlay_cpu.linear, x, handle, None, OUT)
    plain = partial(F.linear, x, weight)
    with torch.inference_mode():
        check_close(packed(), plain())
        benchmark(packed if variant == "packed" else plain)


@pytest.mark.parametrize(
    ("batch", "context", "new"), [(1, 1024, 1), (16, 256, 1), (1, 256, 256)], ids=str
)
def bench_attention(benchmark: Any, batch: int, context: int, new: int) -> None:
    benchmark.group = "paged attention, 14 heads, 2 KV heads of 64, bfloat16"
    call, _ = attention_call([(context, new)] * batch, 14, 2, 64, torch.bfloat16, 32)
    with torch.inference_mode():
        benchmark(call)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 50, "top_p": 0.9}], ids=str)
def bench_sampler(benchmark: Any, options: dict[str, Any]) -> None:
    benchmark.group = "sampler, 16 rows of 32,000"
    slots, logits = np.arange(16), torch.randn(16, 32_000) * 3
    sampler, params = Sampler(16, torch.device("cpu")), SamplingParams(**options)
    sampler.launch_slots(sampler.plan_slots([(slot, params, slot) for slot in range(16)]))
    benchmark(sampler.launch, sampler.plan(slots, slots), logits)
