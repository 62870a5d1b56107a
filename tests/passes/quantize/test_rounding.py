"""Weights rounded to nearest: within half a step of what they were, in the stored form."""

from __future__ import annotations

import pytest
import torch

from inlay.passes.quantize import rounding
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
    # Half a step; a zero point's rounding may push an end half a step out, as far as int4's
    # positive maximum lies beyond its largest number 7. Of int4's 8 steps 0.9 more may be clipped.
    clipped = 1.9 if scheme.weight == "int4" else 0.5 if scheme.symmetric else 1.0
    assert bool((error <= step * (clipped + 0.02)).all())
    assert float((error / step).mean()) < 0.3  # a quarter, if all is spread evenly


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.weight == "int4"], ids=str)
def test_of_a_few_scales_each_group_takes_the_best(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(48, 128)

    def errors() -> torch.Tensor:
        wide = dequantize(*quantize_weight(weight, scheme))
        return (wide - weight).unflatten(-1, (-1, scheme.group_size or 128)).square().sum(-1)

    ours = errors()
    monkeypatch.setitem(rounding.FACTORS, "int4", (1.0,))
    assert bool((ours <= errors()).all())
    assert float(ours.sum()) < 0.97 * float(errors().sum())


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
