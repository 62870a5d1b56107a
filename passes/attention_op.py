"""`inlay::attention` over one packed row, as captured, and `inlay::paged_attention`, as served.

Shapes: T tokens of all requests in one row, Hq query heads, Hk key/value heads (Hq a multiple),
D the head size of queries and keys, Dv that of values.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from inlay.passes.kv_formats import dequantize, has_token_scales, quantize

_WRITTEN = ("k_cache", "v_cache", "k_scales", "v_scales")


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    causal: bool,
    chunk: int,
    slopes: Tensor | None,
) -> Tensor:
    """One request: q [Tq, Hq, D] over k [Tk, Hk, D], v [Tk, Hk, Dv], in float32 (or float64)."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(group, dim=1)
    values = v.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    distance = query_positions[:, None] - key_positions[None, :]
    if slopes is not None and slopes.dtype == torch.bfloat16:
        scores = scores + (slopes[:, None] * key_positions)[:, None].to(wide)
    elif slopes is not None:
        scores = scores - slopes.to(wide)[:, None, None] * distance
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window > 0:
        hidden |= distance.abs() >= window
    if chunk > 0:
        hidden |= query_positions[:, None] // chunk != key_positions[None, :] // chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


@torch.library.custom_op("inlay::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    chunk: int = 0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Attention over one packed row of whole requests: what capture emits.

    q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv], position_ids [T] int64; returns [T, Hq, Dv].
    A request begins wherever the position does not go up by one, and sees only itself.
    layer: the model's index of the calling attention layer. window: tokens a query looks back
    on, itself included, 0 for all; where not causal, as many to each side. softcap:
    s -> softcap * tanh(s / softcap), 0 for none. sinks [Hq]: one more logit for each head in the
    softmax's denominator. chunk: a query sees only keys of its own chunk of positions (Llama 4),
    0 for all. slopes [Hq]: ALiBi (Press et al., 2022), slope * (key - query position) is added;
    of bfloat16: slope * key position, rounded to bfloat16, which is how Falcon was trained.
    """
    starts = [0, *(torch.nonzero(position_ids.diff() != 1).flatten() + 1).tolist(), q.shape[0]]
    pieces = []
    for begin, end in itertools.pairwise(starts):
        row = slice(begin, end)
        where = position_ids[row]
        same = (where, where, scale, window, softcap, sinks, causal, chunk, slopes)
        pieces.append(_attend(q[row], k[row], v[row], *same))
    return torch.cat(pieces)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    chunk: int = 0,
    slopes: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("inlay::paged_attention", mutates_args=_WRITTEN)
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    chunk: int = 0,
    slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Write the new tokens' keys and values, then attend to each request's cache.

    q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]; k_cache [blocks, Hk, block_size, D] and v_cache
    [blocks, Hk, block_size, Dv] of one dtype, any of `kv_formats`, which says what k_scales and
    v_scales are; slot_mapping [T] int64, negative for padding; block_table [B, max_blocks] int32;
    seq_lens [B] int32, cached tokens after this step, 0 for a padding request; query_start_loc
    [B + 1] int32. Returns [T, Hq, Dv], zero for padding tokens. New tokens, too, are seen as the
    cache holds them. Blocks that no new token sees any more, for the window or the chunk, are not
    read: their entries in block_table may be anything.
    The other arguments are those of `inlay::attention`. Paging as in vLLM (Kwon et al., 2023).
    """
    _write(k, k_cache, k_scales, slot_mapping)
    _write(v, v_cache, v_scales, slot_mapping)
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[b].item(), query_start_loc[b + 1].item()
        if seq_len == 0 or begin == end:
            continue
        first = seq_len - (end - begin)
        oldest = _oldest_visible(first, window, chunk)
        positions = torch.arange(oldest, seq_len, device=q.device)
        out[begin:end] = _attend(
            q[begin:end],
            _read(k_cache, k_scales, block_table[b], oldest, seq_len),
            _read(v_cache, v_scales, block_table[b], oldest, seq_len),
            positions[first - oldest :],
            positions,
            scale,
            window,
            softcap,
            sinks,
            causal,
            chunk,
            slopes,
        )
    return out


def _write(x: Tensor, cache: Tensor, scales: Tensor | None, slot_mapping: Tensor) -> None:
    """Put x [T, Hk, D] into its slots."""
    block_size, real = cache.shape[2], slot_mapping >= 0
    block, offset = slot_mapping[real] // block_size, slot_mapping[real] % block_size
    values, made = quantize(x[real], cache.dtype, scales)
    cache[block, :, offset] = values
    if made is not None:
        assert scales is not None, f"a cache of {cache.dtype} needs scales"
        scales[block, :, offset] = made


def _read(cache: Tensor, scales: Tensor | None, table: Tensor, begin: int, end: int) -> Tensor:
    """The request's tokens [begin, end): [end - begin, Hk, D]."""
    positions = torch.arange(begin, end, device=cache.device)
    block, offset = table[positions // cache.shape[2]].long(), positions % cache.shape[2]
    if has_token_scales(cache.dtype):
        assert scales is not None, f"a cache of {cache.dtype} needs scales"
        scales = scales[block, :, offset]
    return dequantize(cache[block, :, offset], scales)


def _oldest_visible(position: int, window: int, chunk: int) -> int:
    """The first position that a query at this one sees; later queries see no earlier one."""
    by_window = position - window + 1 if window > 0 else 0
    by_chunk = position // chunk * chunk if chunk > 0 else 0
    return max(0, by_window, by_chunk)


@paged_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    layer: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
    chunk: int = 0,
    slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])
