"""Paged attention as plain tensor ops that never ask the device for a number.

For devices without a kernel of ours (CUDA, until one is written): nothing here waits for the
device, and what is called depends on shapes alone, so that a CUDA graph can hold it. Each query
gathers its request's whole cache, in pieces of bounded size: right everywhere, fast for decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.backends.kv_caches import LayerCache
from inlay.backends.program import AttentionStep
from inlay.passes.kv_formats import dequantize, has_token_scales, make_scales, quantize

GATHERED_BYTES = 256 << 20
"""Keys of so many queries are gathered at once, in float32, as fit in here."""


class GatheredAttention:
    """`inlay::paged_attention` over caches [blocks, Hk, block_size, D] on any device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(
        self, step: AttentionStep, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> LayerCache:
        """With one block beyond the last, which nobody sees: padding is written there."""
        shape = (num_blocks + 1, step.num_kv_heads, block_size)

        def blocks(size: int) -> Tensor:
            return torch.empty(*shape, size, dtype=dtype, device=self._device)[:-1]

        def scales() -> Tensor | None:
            made = make_scales(dtype, *shape)
            if made is None:
                return None
            made = made.to(self._device)
            return made[:-1] if has_token_scales(dtype) else made

        return LayerCache(blocks(step.head_dim), blocks(step.v_head_dim), scales(), scales())

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
        _write(k, cache.k, cache.k_scales, slot_mapping)
        _write(v, cache.v, cache.v_scales, slot_mapping)
        tokens = torch.arange(q.shape[0], device=q.device)
        # The request whose tokens end behind this one; beyond the last request: none.
        owner = torch.searchsorted(query_start_loc[1:].long(), tokens, right=True)
        real = owner < seq_lens.shape[0]
        owner = owner.clamp(max=seq_lens.shape[0] - 1)
        position = seq_lens[owner] - (query_start_loc[owner + 1] - tokens)
        width = block_table.shape[1] * cache.k.shape[2]
        bytes_per_query = width * step.num_kv_heads * (step.head_dim + step.v_head_dim) * 4
        rows = max(GATHERED_BYTES // bytes_per_query, 1)
        pieces = [
            _attend(
                step,
                q[at],
                position[at],
                seq_lens[owner[at]],
                block_table[owner[at]],
                cache,
                sinks,
                slopes,
            )
            for at in (slice(begin, begin + rows) for begin in range(0, q.shape[0], rows))
        ]
        out = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return torch.where(real[:, None, None], out, 0).to(q.dtype)


def _write(x: Tensor, cache: Tensor, scales: Tensor | None, slot_mapping: Tensor) -> None:
    """Put x [T, Hk, D] into its slots; padding goes into the block beyond the last."""
    num_blocks, _, block_size = cache.shape[:3]
    slots = torch.where(slot_mapping < 0, num_blocks * block_size, slot_mapping)
    block, offset = slots // block_size, slots % block_size
    values, made = quantize(x, cache.dtype, scales)
    _with_spare(cache)[block, :, offset] = values
    if made is not None:
        assert scales is not None, f"a cache of {cache.dtype} needs scales"
        _with_spare(scales)[block, :, offset] = made


def _with_spare(cache: Tensor) -> Tensor:
    """The tensor that `allocate` made, of which this is all but the last block."""
    return cache.as_strided((cache.shape[0] + 1, *cache.shape[1:]), cache.stride())


def _attend(
    step: AttentionStep,
    q: Tensor,
    position: Tensor,
    length: Tensor,
    tables: Tensor,
    cache: LayerCache,
    sinks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """q [n, Hq, D] at these positions [n] over its requests' cached tokens, length [n] of them in
    blocks tables [n, blocks]: float32 [n, Hq, Dv]. The formulas are
    those of `inlay::attention`'s reference."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = step.num_heads // step.num_kv_heads
    keys = _read(cache.k, cache.k_scales, tables)  # [n, Hk, S, D]
    values = _read(cache.v, cache.v_scales, tables)
    grouped = q.to(wide).unflatten(1, (step.num_kv_heads, group))
    scores = torch.einsum("nhgd,nhsd->nhgs", grouped, keys.to(wide)).flatten(1, 2) * step.scale
    if step.softcap > 0:
        scores = torch.tanh(scores / step.softcap) * step.softcap
    where = torch.arange(keys.shape[2], device=q.device)
    distance = position[:, None] - where[None]  # [n, S]
    if slopes is not None and slopes.dtype == torch.bfloat16:
        scores = scores + (slopes[:, None] * where)[None].to(wide)
    elif slopes is not None:
        scores = scores - slopes.to(wide)[None, :, None] * distance[:, None]
    hidden = distance < 0 if step.causal else where[None] >= length[:, None]
    if step.window > 0:
        hidden = hidden | (distance.abs() >= step.window)
    if step.chunk > 0:
        hidden = hidden | (position[:, None] // step.chunk != where[None] // step.chunk)
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    if sinks is not None:
        column = sinks.to(wide)[None, :, None].expand(scores.shape[0], -1, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[2]]
    # What lies in slots that nobody has written may be NaN, which 0 does not remove.
    values = values.to(wide).masked_fill(hidden[:, None, :, None], 0)
    grouped = weights.unflatten(1, (step.num_kv_heads, group))
    return torch.einsum("nhgs,nhsd->nhgd", grouped, values).flatten(1, 2)


def _read(cache: Tensor, scales: Tensor | None, tables: Tensor) -> Tensor:
    """The requests' whole tables [n, blocks]: [n, Hk, blocks * block_size, D]."""
    blocks = tables.clamp(0, cache.shape[0] - 1).long()
    found = cache[blocks].transpose(1, 2).flatten(2, 3)
    if has_token_scales(cache.dtype):
        assert scales is not None, f"a cache of {cache.dtype} needs scales"
        scales = scales[blocks].transpose(1, 2).flatten(2, 3)
    return dequantize(found, scales)
