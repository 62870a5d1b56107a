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

FACTORS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 1.07)}
"""Of the scale that just holds a group's weights, tried one after the other: the one of least
squared error is taken. On int4 it takes 4 to 5 % off the RMS error of the demo model's weights, and
31 factors from 0.6 to 1.22 would take no more than 6 %."""


def quantize_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [..., N, K] as (numbers, scales [..., G, N], zeros [..., G, N] or None).

    Numbers are int8 or float8_e4m3fn [..., N, K], or for int4 uint8 [..., N, K / 2] as
    `inlay::weight_only_linear` takes them. K must be a multiple of the group size.
    """
    groups = weight.float().unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))
    if scheme.weight == "fp8":
        numbers, scales = _to_fp8(groups, scheme.per_tensor)
        return numbers.flatten(-2), _columns(scales), None
    scales, zeros = group_scales(groups, scheme)
    numbers = round_groups(groups, scales, zeros, scheme).flatten(-2)
    return store(numbers, scales.squeeze(-1), None if zeros is None else zeros.squeeze(-1), scheme)


def group_scales(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Scales as they will be stored, and zero points where the scheme has any, float32 [..., 1],
    for groups [..., size] of integers."""
    first, *others = FACTORS[scheme.weight]
    best = _fit(groups, scheme, first)
    if not others:
        return best
    least = _loss(groups, *best, scheme)
    for factor in others:
        scales, zeros = _fit(groups, scheme, factor)
        loss = _loss(groups, scales, zeros, scheme)
        better, least = loss < least, torch.minimum(loss, least)
        zeros = None if zeros is None else torch.where(better, zeros, best[1])
        best = torch.where(better, scales, best[0]), zeros
    return best


def round_groups(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    """The numbers of least distance, as floats; a weight is (number - zero) * scale."""
    low, high = (LARGEST if zeros is None else UNSIGNED)[scheme.weight]
    numbers = (groups / scales).round()
    return (numbers if zeros is None else numbers + zeros).clamp(low, high)


def store(
    numbers: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers [..., N, K] as floats, scales and zeros [..., N, G]: as quantize_weight's."""
    dtype = torch.uint8 if scheme.weight == "int4" else torch.int8
    if scheme.weight == "int4" and zeros is None:
        numbers = numbers - LARGEST["int4"][0]
    columns = None if zeros is None else zeros.to(dtype).mT.contiguous()
    stored = scales.to(scale_dtype(scheme)).mT.contiguous()
    return pack(numbers.to(dtype), scheme), stored, columns


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


def _fit(groups: Tensor, scheme: Scheme, factor: float) -> tuple[Tensor, Tensor | None]:
    """Scales (and zero points) by a group's extremes, times a factor.

    Symmetric int8: amax / 127. Symmetric int4: the number of largest magnitude becomes -8,
    whatever its sign, so that all 16 numbers are used (as in GGML's Q4_0).
    """
    if not scheme.symmetric:
        low, high = UNSIGNED[scheme.weight]
        least = groups.amin(-1, keepdim=True).clamp(max=0) * factor
        extent = groups.amax(-1, keepdim=True).clamp(min=0) * factor - least
        scales = _stored(extent / (high - low), scheme)
        return scales, (low - least / scales).round().clamp(low, high)
    if scheme.weight == "int8":
        return _stored(groups.abs().amax(-1, keepdim=True) / INT8_MAX * factor, scheme), None
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return _stored(largest / LARGEST["int4"][0] * factor, scheme), None


def _loss(groups: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme) -> Tensor:
    numbers = round_groups(groups, scales, zeros, scheme)
    wide = numbers if zeros is None else numbers - zeros
    return (wide * scales - groups).square().sum(-1, keepdim=True)


def _stored(scales: Tensor, scheme: Scheme) -> Tensor:
    """As they will be stored, and never 0, by which weights are divided."""
    stored = scales.to(scale_dtype(scheme)).float()
    return torch.where(stored == 0, 1.0, stored)
