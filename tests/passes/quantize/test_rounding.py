"""Weights rounded to nearest: within half a step of what they were, in the stored form."""

from __future__ import annotations

import pytest
import torch

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from inlay.passes.quantized_ops import dequantize

SCHEMES = [
    Scheme("int8"),
    Scheme("int8", group_size=32),
    Scheme("int8", group_size=32, symmetric=False),
    Scheme("int4"),
    Scheme("int4", group_size=32),
    Scheme("int4", group_size=64, symmetric=False),
    Scheme("fp8"),
    Scheme("fp8", per_tensor=True),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(48, 128), (3, 16, 64)])
def test_each_weight_is_within_half_a_step(scheme: Scheme, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.rand(shape[:-1])[..., None] + 0.05
    values, scales, zeros = quantize_weight(weight, scheme)
    groups = shape[-1] // (scheme.group_size or shape[-1])
    assert scales.shape == (*shape[:-2], groups, shape[-2])
    assert (zeros is None) == (scheme.symmetric or scheme.weight == "fp8")
    back = dequantize(values, scales, zeros)
    step = scales.float().abs().transpose(-1, -2).repeat_interleave(shape[-1] // groups, -1)
    error = (back - weight).abs()
    if scheme.weight == "fp8":
        # Three bits of mantissa: half a unit is 1/16 of a number; below 2^-6 steps of 2^-9.
        assert bool((error <= weight.abs() / 16 + step * 2**-10 * 1.001).all())
        return
    # Half a step; int4's positive maximum may lie half a step beyond its largest number 7, and a
    # zero point's rounding may push an end half a step out.
    clipped = 1.0 if scheme.weight == "int4" or not scheme.symmetric else 0.5
    assert bool((error <= step * (clipped + 0.02)).all())
    assert float((error / step).mean()) < 0.3  # a quarter, if all is spread evenly


def test_int4_is_stored_two_to_a_byte_the_even_input_low() -> None:
    weight = torch.tensor([[-8.0, 7, 0, 1, 2, 3, -4, -5] * 4])
    values, scales, _ = quantize_weight(weight, Scheme("int4", group_size=32))
    assert values.dtype == torch.uint8
    assert values.shape == (1, 16)
    assert float(scales) == 1.0
    assert values[0, :4].tolist() == [0 | 15 << 4, 8 | 9 << 4, 10 | 11 << 4, 4 | 3 << 4]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_zeros_stay_zeros(scheme: Scheme) -> None:
    values, scales, zeros = quantize_weight(torch.zeros(16, 64), scheme)
    assert bool(scales.isfinite().all())
    assert bool((dequantize(values, scales, zeros) == 0).all())
