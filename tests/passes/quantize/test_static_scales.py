"""Activation scales for all tokens: they hold what was seen, and clip where that errs less."""

from __future__ import annotations

import pytest
import torch

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.static_scales import find_range, round_static, static_scale

WEIGHT = torch.ones(16, 8)


@pytest.mark.parametrize("bounds", [(-3.0, 5.0), (-6.0, 1.0), (0.0, 4.0), (0.0, 0.0)])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("int8", "int8", static=True),
        Scheme("int8", "int8", static=True, activation_symmetric=False),
        Scheme("fp8", "fp8", static=True),
    ],
    ids=str,
)
def test_a_range_is_held(bounds: tuple[float, float], scheme: Scheme) -> None:
    parts = static_scale(bounds, scheme)
    assert parts["input_scale"].shape == (1,)
    assert ("input_zero" in parts) == (not scheme.activation_symmetric)
    x = torch.linspace(*bounds, 99)
    error = (round_static(x, parts, scheme) - x).abs()
    # Half a step, and another half for the zero point's own rounding; e4m3 has steps of 1/16.
    allowed = x.abs() / 16 if scheme.activation == "fp8" else 1.01 * parts["input_scale"]
    assert bool((error <= allowed + 1e-6).all())
    beyond = round_static(torch.tensor([100.0, -100.0]), parts, scheme)
    assert float(beyond.abs().max()) <= max(map(abs, bounds)) * 1.01 or bounds == (0.0, 0.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_large_number_in_many_is_clipped(symmetric: bool) -> None:
    scheme = Scheme("int8", "int8", static=True, activation_symmetric=symmetric)
    x = torch.rand(4096, 8) * 2 - 1
    assert find_range([x], WEIGHT, scheme) == (float(x.min()), float(x.max()))
    x[0, 0] = 3.0
    assert 1.0 < find_range([x], WEIGHT, scheme)[1] < 3.0
    # Where it counts for more than all others it is kept.
    weight = WEIGHT.clone()
    weight[:, 0] = 100.0
    assert find_range([x], weight, scheme)[1] > 2.5
    assert find_range([x], WEIGHT, Scheme("fp8", "fp8", static=True))[1] == 3.0
