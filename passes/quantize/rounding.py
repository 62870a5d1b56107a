"""Weights rounded to nearest: narrow numbers, their scales and zero points."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantized_ops import FP8, FP8_MAX, INT8_MAX

LARGEST = {"int8": (-127, 127), "int4": (-8, 7)}
UNSIGNED = {"int8": (-128, 127), "int4": (0, 15)}
"""The numbers of weights without and with zero points; int4 is stored with 8 added."""

GROUP_SCALES = torch.bfloat16
"""Of int4's groups, to whose size float32 would add up to a quarter. Weights are rounded with the
scale as it is stored; int8's 127 steps of a scale off by 1/256 would end half a step off."""


def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [..., N, K] as (numbers, scales [..., G, N], zeros [..., G, N] or None).

    Numbers are int8 or float8_e4m3fn [..., N, K], or for int4 uint8 [..., N, K / 2] as
    `inlay::weight_only_linear` takes them. K must be a multiple of the group size.
    """
    groups = weight.float().unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))
    if scheme.weight == "fp8":
        numbers, scales, zeros = *_to_fp8(groups, scheme.per_tensor), None
    elif scheme.symmetric:
        numbers, scales, zeros = *_to_symmetric(groups, scheme), None
    else:
        numbers, scales, zeros = _to_asymmetric(groups, scheme)
    return (
        pack(numbers.flatten(-2), scheme),
        _columns(scales),
        None if zeros is None else _columns(zeros),
    )


def scale_dtype(scheme: Scheme) -> torch.dtype:
    return GROUP_SCALES if scheme.weight == "int4" and scheme.group_size else torch.float32


def pack(numbers: Tensor, scheme: Scheme) -> Tensor:
    """int4's numbers 0..15 [..., K] two to a byte, the first in the low half; others unchanged."""
    if scheme.weight != "int4":
        return numbers
    return numbers[..., 0::2] | (numbers[..., 1::2] << 4)


def _columns(values: Tensor) -> Tensor:
    """[..., N, G, 1] to [..., G, N]."""
    return values.squeeze(-1).transpose(-1, -2).contiguous()


def _to_fp8(groups: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    over = (-3, -2, -1) if per_tensor else (-1,)
    scales = (groups.abs().amax(over, keepdim=True) / FP8_MAX).clamp_min(1e-30)
    numbers = (groups / scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return numbers, scales.expand(*groups.shape[:-1], 1)


def _to_symmetric(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """int8: scale = amax / 127. int4: the number of largest magnitude becomes -8, whatever its
    sign, so that all 16 numbers are used (as in GGML's Q4_0)."""
    low, high = LARGEST[scheme.weight]
    if scheme.weight == "int8":
        scales = groups.abs().amax(-1, keepdim=True) / INT8_MAX
    else:
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = largest / low
    scales = _stored(scales, scheme)
    numbers = (groups / scales).round().clamp(low, high)
    if scheme.weight == "int4":
        return (numbers - low).to(torch.uint8), scales.to(scale_dtype(scheme))
    return numbers.to(torch.int8), scales.to(scale_dtype(scheme))


def _to_asymmetric(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    low, high = UNSIGNED[scheme.weight]
    dtype = torch.uint8 if scheme.weight == "int4" else torch.int8
    least = groups.amin(-1, keepdim=True).clamp(max=0)
    extent = groups.amax(-1, keepdim=True).clamp(min=0) - least
    scales = _stored(extent / (high - low), scheme)
    zeros = (low - least / scales).round().clamp(low, high)
    numbers = ((groups / scales).round() + zeros).clamp(low, high)
    return numbers.to(dtype), scales.to(scale_dtype(scheme)), zeros.to(dtype)


def _stored(scales: Tensor, scheme: Scheme) -> Tensor:
    """As they will be stored, and never 0, by which weights are divided."""
    stored = scales.to(scale_dtype(scheme)).float()
    return torch.where(stored == 0, 1.0, stored)
