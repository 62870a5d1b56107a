"""How keys and values lie in the KV cache: the dtypes, what scales they need, and the rounding.

The dtype says the format:

- float32, bfloat16, float16: the value itself, saturated at the dtype's largest number.
- float8_e4m3fn: value / scale with one scale for a layer, saturated at 448 (Micikevicius et al.,
  2022). The scale is fixed before anything is written, here 1.
- int8: value / scale, rounded to -127 .. 127, with one scale for each token and KV head: the
  vector's largest magnitude / 127. A token's bytes depend on no other token, so a cache has the
  same content whatever the chunks and the batch in which its tokens came.

This is the reference that every kernel's cache must equal, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.errors import OptionError

KV_CACHE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8_e4m3": "fp8"}

INT8_STEPS = 127


def parse_kv_cache_dtype(word: str) -> str:
    """The one name of a cache dtype: "auto" (the model's) or a key of KV_CACHE_DTYPES.

    Raises OptionError for any other word.
    """
    allowed = ["auto", *KV_CACHE_DTYPES, *_ALIASES]
    if word not in allowed:
        raise OptionError(
            f"kv_cache_dtype must be one of {', '.join(allowed)}; given {word!r}: 'auto' keeps "
            "keys and values in the model's dtype"
        )
    return _ALIASES.get(word, word)


def kv_dtype(word: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """What the cache holds; None and "auto" mean the model's dtype. Raises OptionError."""
    return KV_CACHE_DTYPES.get(parse_kv_cache_dtype(word or "auto"), model_dtype)


def has_token_scales(dtype: torch.dtype) -> bool:
    """Whether each token and KV head has a scale of its own, beside the blocks."""
    return dtype == torch.int8


def vector_nbytes(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of one token's keys (or values) of one KV head, with their scale."""
    return head_dim * dtype.itemsize + (torch.float32.itemsize if has_token_scales(dtype) else 0)


def make_scales(
    dtype: torch.dtype, num_blocks: int, num_kv_heads: int, block_size: int
) -> Tensor | None:
    """The scales of one layer's keys or values, float32.

    [num_blocks, Hk, block_size], not initialised, for int8; [1] for fp8; None for what has none.
    """
    if has_token_scales(dtype):
        return torch.empty(num_blocks, num_kv_heads, block_size)
    return torch.ones(1) if dtype == torch.float8_e4m3fn else None


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [..., D] as the cache holds it, and the scales [...] that int8 makes; else None.

    scale: fp8's, [1]. A vector that is not finite stays so in int8: its scale is NaN or infinite.
    """
    if has_token_scales(dtype):
        wide = x.float()
        scales = wide.abs().amax(-1) / INT8_STEPS
        steps = torch.where(scales[..., None] == 0, 0, wide / scales[..., None]).round()
        # A NaN has no integer; the scale says it for the whole vector.
        return steps.nan_to_num(0).clamp(-INT8_STEPS, INT8_STEPS).to(dtype), scales
    if x.dtype == dtype:
        return x, None
    largest = torch.finfo(dtype).max
    wide = x.float() if scale is None else x.float() / scale
    return wide.clamp(-largest, largest).to(dtype), None


def dequantize(x: Tensor, scales: Tensor | None) -> Tensor:
    """What was written, as float32 where it was scaled: x [..., D], scales [...] or fp8's [1]."""
    if scales is None:
        return x
    return x.float() * (scales[..., None] if has_token_scales(x.dtype) else scales)
