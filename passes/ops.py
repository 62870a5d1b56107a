"""The vocabulary of our graph: every `inlay.*` op with its schema, its fake and its reference.

The reference is plain PyTorch and is the truth that kernels, converters and compiled segments are
tested against. Pointwise ops are decomposed into their references before Inductor compiles them;
the attention ops stay opaque, since a graph is cut there.

Shapes: T tokens of all requests in one row, Hq query heads, Hk key/value heads (Hq a multiple),
D the head size of queries and keys, Dv that of values.
"""

from __future__ import annotations

import functools
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


# At the end: the experts need what is defined above.
import inlay.passes.experts_op  # noqa: E402
import inlay.passes.quantized_ops  # noqa: E402, F401
from inlay.passes.attention_op import attention, paged_attention  # noqa: E402, F401
