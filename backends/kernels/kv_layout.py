"""How the CPU ops lay out their KV cache.

Of one block and KV head, keys lie [block_size / 16, D / pair, 16, pair]: groups of 16 tokens, a
vector register's worth, transposed; values lie [block_size / pair, Dv, pair]. pair is 2 where
bfloat16 dot products may read the cache (bfloat16, fp8, int8), else 1. An odd D is filled up with a
zero. As tensors they are [num_blocks, Hk, D, block_size] and [num_blocks, Hk, block_size, Dv].
"""

from __future__ import annotations

import torch

GROUP = 16
"""Tokens; block sizes are multiples of it."""


def pair_of(dtype: torch.dtype) -> int:
    """Elements that lie side by side in a cache of this dtype."""
    return 1 if dtype in (torch.float32, torch.float16) else 2


def key_width(dtype: torch.dtype, head_dim: int) -> int:
    """Elements of a key in the cache."""
    pair = pair_of(dtype)
    return -(-head_dim // pair) * pair


def pack_keys(keys: torch.Tensor) -> torch.Tensor:
    """Keys [num_blocks, Hk, block_size, D] as the ops want them, a copy."""
    num_blocks, heads, block_size, head_dim = keys.shape
    pair, width = pair_of(keys.dtype), key_width(keys.dtype, head_dim)
    filled = keys.new_zeros(num_blocks, heads, block_size, width)
    filled[..., :head_dim] = keys
    groups = filled.unflatten(3, (-1, pair)).unflatten(2, (-1, GROUP)).transpose(3, 4)
    return groups.reshape(num_blocks, heads, width, block_size).contiguous()


def unpack_keys(packed: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of pack_keys."""
    num_blocks, heads, width, block_size = packed.shape
    pair = pair_of(packed.dtype)
    groups = packed.reshape(num_blocks, heads, block_size // GROUP, width // pair, GROUP, pair)
    return groups.transpose(3, 4).reshape(num_blocks, heads, block_size, width)[..., :head_dim]


def pack_values(values: torch.Tensor) -> torch.Tensor:
    """Values [num_blocks, Hk, block_size, Dv] as the ops want them, a copy."""
    pairs = values.unflatten(2, (-1, pair_of(values.dtype))).transpose(3, 4)
    return pairs.clone(memory_format=torch.contiguous_format).reshape(values.shape)


def unpack_values(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of pack_values."""
    num_blocks, heads, block_size, width = packed.shape
    pair = pair_of(packed.dtype)
    pairs = packed.reshape(num_blocks, heads, block_size // pair, width, pair)
    return pairs.transpose(3, 4).reshape(packed.shape)
