"""`inlay::paged_attention` on NVIDIA GPUs: cache write, decode and prefill kernels in Triton."""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import Tensor

from inlay.backends.gathered_attention import GatheredAttention
from inlay.backends.kernels.triton.attention_plan import Batch, plan_attention, unsupported
from inlay.backends.kernels.triton.cache_write import plan_write
from inlay.backends.kernels.triton.launch import Launch, Target, target_of
from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep

_logger = logging.getLogger(__name__)


class TritonAttention:
    """Caches [blocks, Hk, block_size, D], as `GatheredAttention` has them, which serves what the
    kernels do not; that is said once for each reason."""

    def __init__(self, device: torch.device, target: Target | None = None) -> None:
        """target: what to plan for; None: the device itself."""
        self._gathered = GatheredAttention(device)
        self._target = target or target_of(device)
        self._said: set[str] = set()

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> LayerCache:
        return self._gathered.allocate(step, num_blocks, block_size, dtype)

    def __call__(
        self,
        step: AttentionStep,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
        sinks: Tensor | None,
        slopes: Tensor | None,
    ) -> Tensor:
        reason = unsupported(step, q.dtype, cache.k.dtype, self._target)
        if reason is not None:
            self._say(f"layer {step.layer}: attention as plain tensor operations, slow: {reason}")
            return self._gathered(
                step, q, k, v, cache, slot_mapping, block_table, seq_lens, query_start_loc, sinks,
                slopes,
            )  # fmt: skip
        out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
        if q.shape[0] == 0:
            return out
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        batch = Batch(step, q, cache, block_table, seq_lens, query_start_loc, sinks, slopes)
        launch_all(
            [plan_write(k, v, cache, slot_mapping), *plan_attention(batch, out, self._target)],
            q.device,
        )
        return out

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _logger.warning("%s", text)


def launch_all(launches: list[Launch], device: torch.device) -> None:
    """In order, on the device's current stream."""
    is_other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if is_other else contextlib.nullcontext():
        for launch in launches:
            launch.run()
