"""The quantized part of the graph's vocabulary: activations and weights in int8, int4 and fp8.

As in ops.py, each op is its plain-PyTorch reference. Quantizers are pointwise and a row's maximum,
so that Inductor fuses them into the norm or activation before them; products become our kernels.

Shapes: K in_features, N out_features, G groups of neighbouring inputs that share a scale (1: all).
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.passes.experts_op import mixture
from inlay.passes.ops import REFERENCES, _define

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT8_MAX = 127
SMALLEST = 1e-30
"""Rows whose largest magnitude is below it are quantized to zeros: 127 / amax must be finite."""


def _inverse(amax: Tensor, largest: float) -> Tensor:
    """largest / amax, 0 for rows of zeros (and for NaN, which the scale passes on)."""
    return torch.where(amax > SMALLEST, largest / amax, 0.0)


@_define
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, dynamic, per token: x [..., K] to (int8 [..., K], scale float32 [..., 1]).

    scale = amax / 127; ties round to even. A row that is not finite has a scale that is not.
    """
    wide = x.float()
    amax = wide.abs().amax(-1, keepdim=True)
    q = (wide * _inverse(amax, INT8_MAX)).round().clamp(-INT8_MAX, INT8_MAX)
    return q.to(torch.int8), amax / INT8_MAX


@_define
def quantize_int8_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With a zero point, dynamic, per token: (int8 [..., K], scale float32 and zero int32
    [..., 1]); x ~ (q - zero) * scale, q from -128 to 127 spans the row and 0."""
    wide = x.float()
    low = wide.amin(-1, keepdim=True).clamp(max=0.0)
    extent = wide.amax(-1, keepdim=True).clamp(min=0.0) - low
    inverse = _inverse(extent, 255.0)
    zero = (-128.0 - low * inverse).round()
    q = ((wide * inverse).round() + zero).clamp(-128, 127)
    return q.to(torch.int8), extent / 255.0, zero.to(torch.int32)


@_define
def quantize_fp8(x: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """To e4m3 (Micikevicius et al., 2022), dynamic, per token and group of group_size inputs:
    (float8_e4m3fn [..., K], scale float32 [..., K / group_size]); group_size 0: the whole row.

    scale = amax / 448.
    """
    size = group_size or x.shape[-1]
    wide = x.float().unflatten(-1, (-1, size))
    amax = wide.abs().amax(-1, keepdim=True)
    q = (wide * _inverse(amax, FP8_MAX)).clamp(-FP8_MAX, FP8_MAX).flatten(-2)
    return q.to(FP8), amax.squeeze(-1) / FP8_MAX


@_define
def quantize_static(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: str) -> Tensor:
    """With a scale that calibration measured: x [..., K] to dtype "int8" or "fp8", saturated.

    scale float32 [1]; zero int32 [1], or None where symmetric.
    """
    wide = x.float() / scale
    if dtype == "fp8":
        return wide.clamp(-FP8_MAX, FP8_MAX).to(FP8)
    if zero is None:
        return wide.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return (wide.round() + zero).clamp(-128, 127).to(torch.int8)


@_define
def int8_linear(
    q: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """W8A8: q int8 [..., K] times weight int8 [N, K] transposed, exact in int32: [..., N].

    x_scale float32 and x_zero int32 [..., 1] or [1]; w_scale float32 [1, N]; bias [N]. The sum is
    scaled by x_scale, then w_scale, the bias added, all in float32, and rounded once to dtype.
    """
    total = torch._int_mm(q.reshape(-1, q.shape[-1]), weight.t()).view(*q.shape[:-1], -1)
    if x_zero is not None:
        total = total - x_zero * weight.sum(-1, dtype=torch.int32)
    out = (total.float() * x_scale) * w_scale
    return (out if bias is None else out + bias.float()).to(dtype)


@_define
def fp8_linear(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """FP8: q e4m3 [..., K] times weight e4m3 [N, K] transposed, sums in float32: [..., N].

    x_scale float32 [..., G] or [..., 1] or [1]; w_scale float32 [G, N].
    """
    groups = w_scale.shape[0]
    size = weight.shape[1] // groups
    scales = x_scale.expand(*q.shape[:-1], groups).repeat_interleave(size, -1)
    scaled = weight.float() * w_scale.t().repeat_interleave(size, 1)
    out = (q.float() * scales) @ scaled.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def dequantize(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """A stored weight as float32 [..., N, K]; arguments as those of weight_only_linear."""
    if weight.dtype == torch.uint8:
        weight = torch.stack((weight & 15, weight >> 4), dim=-1).flatten(-2)
        zero = torch.full_like(scale, 8) if zero is None else zero
    size = weight.shape[-1] // scale.shape[-2]
    wide = weight.float()
    if zero is not None:
        wide = wide - zero.float().transpose(-1, -2).repeat_interleave(size, -1)
    return wide * scale.float().transpose(-1, -2).repeat_interleave(size, -1)


@_define
def weight_only_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times a weight that is stored narrow, transposed: [..., N] of x's dtype.

    weight: int8 [N, K], zero int8 or None for 0; uint8 [N, K / 2], two 4-bit numbers 0..15 in a
    byte, the first in the low half, zero uint8 or None for 8; or float8_e4m3fn [N, K], no zero.
    scale float32, bfloat16 or float16, and zero [G, N]. A weight is (number - zero) * scale; all
    in float32, rounded once.
    """
    out = x.float() @ dequantize(weight, scale, zero).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@_define
def quantized_embedding(ids: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table int8 [V, H] with a float32 scale [1, V] for each row: [..., H] of dtype."""
    return (weight[ids].float() * scale[0][ids][..., None]).to(dtype)


def quantized_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    up_scale: Tensor,
    up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    activations: str,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.0,
    gate_limit: float = 0.0,
    up_limit: float = 0.0,
    limit_activated: bool = False,
    up_offset: float = 0.0,
    gate_softcap: float = 0.0,
    up_softcap: float = 0.0,
    norm_eps: float = 0.0,
) -> Tensor:
    """`experts` over quantized weights: up and down as weight_only_linear's weight, with the
    experts as a first dimension; scales and zeros [E, G, N].

    activations: what the products' inputs are rounded to, row by row: "none", "int8" or "fp8".
    The products' results are rounded to x's dtype before their biases are added.
    """

    def product(rows: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if activations == "int8":
            q, row_scale = quantize_int8(rows)
            return int8_linear(q, row_scale, None, weight, scale, None, rows.dtype)
        if activations == "fp8":
            q, row_scale = quantize_fp8(rows)
            return fp8_linear(q, row_scale, weight, scale, None, rows.dtype)
        return weight_only_linear(rows, weight, scale, zero, None)

    def up_product(rows: Tensor, expert: int) -> Tensor:
        zero = None if up_zero is None else up_zero[expert]
        return product(rows, up[expert], up_scale[expert], zero)

    def down_product(rows: Tensor, expert: int) -> Tensor:
        zero = None if down_zero is None else down_zero[expert]
        return product(rows, down[expert], down_scale[expert], zero)

    return mixture(
        x,
        top_k_index,
        top_k_weights,
        up.shape[0],
        up_product,
        down_product,
        up_bias,
        down_bias,
        norm_weight,
        activation,
        gated,
        interleaved,
        alpha,
        gate_limit,
        up_limit,
        limit_activated,
        up_offset,
        gate_softcap,
        up_softcap,
        norm_eps,
    )


_op = torch.library.custom_op("inlay::quantized_experts", quantized_experts, mutates_args=())
REFERENCES[torch.ops.inlay.quantized_experts.default] = quantized_experts


@_op.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
