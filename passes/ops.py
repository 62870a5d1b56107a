"""The vocabulary of our graph: every `inlay.*` op with its schema, its fake and its reference.

The reference is plain PyTorch and is the truth that kernels, converters and compiled segments are
tested against. Pointwise ops are decomposed into their references before Inductor compiles them;
the attention ops stay opaque, since a graph is cut there.

Shapes: T tokens of all requests in one row, Hq query heads, Hk key/value heads (Hq a multiple),
D the head size of queries and keys, Dv that of values.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCES: dict[Any, Callable[..., Any]] = {}
"""Op overload -> the plain-PyTorch function that defines it."""


def _define(reference: Callable[..., Any]) -> Callable[..., Any]:
    """Register `inlay::<name>` from its reference; the fake runs the reference on fake tensors."""
    op = torch.library.custom_op(f"inlay::{reference.__name__}", reference, mutates_args=())
    op.register_fake(reference)
    REFERENCES[getattr(torch.ops.inlay, reference.__name__).default] = reference
    return reference


@_define
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N]."""
    return F.linear(x, weight, bias)


@_define
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    scale_in_float: bool = False,
) -> Tensor:
    """Root mean square norm over the last dimension (Zhang & Sennrich, 2019), float32 inside.

    weight [hidden], None for a norm that does not scale. weight_offset: 1.0 where the checkpoint
    stores w - 1 (gemma). scale_in_float: multiply by the weight before the cast back to x's
    dtype, not after it.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if scale_in_float:
        return (normed * (weight.float() + weight_offset)).to(x.dtype)
    return (weight + weight_offset if weight_offset else weight) * normed.to(x.dtype)


@_define
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> Tensor:
    """Layer norm over the last dimension (Ba et al., 2016), float32 inside, rounded once.

    weight and bias [hidden], None for a norm without. weight_offset: 1.0 where the checkpoint
    stores w - 1 (nemotron), added in the weight's dtype.
    """
    gain = weight + weight_offset if weight is not None and weight_offset else weight
    return F.layer_norm(x, x.shape[-1:], gain, bias, eps)


@_define
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    scale_in_float: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual addition and the norm that follows it: (rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset, scale_in_float), total


@_define
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same for layer norm: (layer_norm(x + residual), x + residual)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps, weight_offset), total


@_define
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., 2021): each pair (a, b) of columns of x becomes
    (a cos - b sin, b cos + a sin).

    x [..., D]; cos and sin [..., D // 2], one column for each pair, broadcast against x in the
    other dimensions. Pairs are columns (i, i + D // 2), as GPT-NeoX lays them out, or interleaved
    (2i, 2i + 1), as GPT-J does. Computed in the dtype that x and cos promote to.
    """
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
}
"""What a gate may go through."""


@_define
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """A gated linear unit's product (Shazeer, 2020): activation(gate) * up, element by element.

    activation: a name in ACTIVATIONS.
    """
    return ACTIVATIONS[activation](gate) * up


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


@torch.library.custom_op("inlay::paged_attention", mutates_args=("k_cache", "v_cache"))
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
) -> Tensor:
    """Write the new tokens' keys and values, then attend to each request's whole cache.

    q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv]; k_cache [blocks, Hk, block_size, D] and v_cache
    [blocks, Hk, block_size, Dv] of the same dtype; slot_mapping [T] int64, negative for padding;
    block_table [B, max_blocks] int32; seq_lens [B] int32, cached tokens after this step, 0 for a
    padding request; query_start_loc [B + 1] int32. Returns [T, Hq, Dv], zero for padding tokens.
    The other arguments are those of `inlay::attention`. Paging as in vLLM (Kwon et al., 2023).
    """
    block_size = k_cache.shape[2]
    real = slot_mapping >= 0
    block, offset = slot_mapping[real] // block_size, slot_mapping[real] % block_size
    k_cache[block, :, offset] = k[real]
    v_cache[block, :, offset] = v[real]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for b, seq_len in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[b].item(), query_start_loc[b + 1].item()
        if seq_len == 0 or begin == end:
            continue
        blocks = block_table[b, : -(-seq_len // block_size)].long()
        keys = k_cache[blocks].transpose(1, 2).flatten(0, 1)[:seq_len]
        values = v_cache[blocks].transpose(1, 2).flatten(0, 1)[:seq_len]
        out[begin:end] = _attend(
            q[begin:end],
            keys,
            values,
            torch.arange(seq_len - (end - begin), seq_len),
            torch.arange(seq_len),
            scale,
            window,
            softcap,
            sinks,
            causal,
            chunk,
            slopes,
        )
    return out


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
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


import inlay.passes.experts_op  # noqa: E402, F401  (at the end: it needs what is defined above)
