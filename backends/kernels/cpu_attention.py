"""The CPU's attention as backends share it: the built library of ops, and its op over a program's
attention steps."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from inlay.backends.kernels.cpu_ops import build_ops
from inlay.backends.kernels.kv_layout import key_width
from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep
from inlay.passes.kv_formats import make_scales

OPS = "segments/inlay_cpu.so"
"""Where an artifact keeps the library, so that loading it needs no compiler."""


class OpsBuild:
    """The library's build, begun ahead of its use."""

    def __init__(self) -> None:
        self._future: Future[Path] | None = None

    def start(self) -> None:
        threads = ThreadPoolExecutor(1)
        self._future = threads.submit(build_ops)
        threads.shutdown(wait=False)

    def result(self) -> Path:
        """The library; raises BuildError."""
        return build_ops() if self._future is None else self._future.result()


class CpuAttention:
    """`inlay_cpu::paged_attention`, with its layout; a cache of another dtype than the model's goes
    through `paged_attention_converted`."""

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> LayerCache:
        heads = step.num_kv_heads
        return LayerCache(
            torch.empty(
                num_blocks, heads, key_width(dtype, step.head_dim), block_size, dtype=dtype
            ),
            torch.empty(num_blocks, heads, block_size, step.v_head_dim, dtype=dtype),
            make_scales(dtype, num_blocks, heads, block_size),
            make_scales(dtype, num_blocks, heads, block_size),
        )

    def __call__(
        self,
        step: AttentionStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: LayerCache,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        sinks: torch.Tensor | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        batch = slot_mapping, block_table, seq_lens, query_start_loc
        options = step.scale, step.window, step.softcap, sinks, step.causal, step.chunk, slopes
        if cache.k.dtype == q.dtype:
            return torch.ops.inlay_cpu.paged_attention(q, k, v, cache.k, cache.v, *batch, *options)
        return torch.ops.inlay_cpu.paged_attention_converted(q, k, v, *cache, *batch, *options)
