"""One activation scale for a layer, whatever the token: measured beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.smoothing import sample_rows
from inlay.passes.quantized_ops import FP8_MAX, INT8_MAX, quantize_static

ROWS = 2048
FACTORS = tuple(1 - step / 20 for step in range(15))
"""Of the range seen, down to 0.3, tried for int8."""

Range = tuple[float, float]


def find_range(inputs: Sequence[Tensor], weight: Tensor, scheme: Scheme) -> Range:
    """(least, greatest) that a layer's inputs, chunks [.., K], are to be rounded within.

    The extremes seen times the factor whose rounding errs least, each input's error counted with
    the squares of the weight [N, K] that multiply it; with zero points each end has a factor of its
    own. Of fp8, whose steps are finer near 0, the extremes themselves.
    """
    low = min(min(float(x.min()) for x in inputs), 0.0)
    high = max(max(float(x.max()) for x in inputs), 0.0)
    if scheme.activation == "fp8":
        return low, high
    rows = sample_rows(inputs, ROWS).float()
    importance = weight.float().square().sum(0)

    def loss(bounds: Range) -> float:
        error = rows - round_static(rows, static_scale(bounds, scheme), scheme)
        return float((error.square().sum(0) * importance).sum())

    if scheme.activation_symmetric:
        return min([(low * factor, high * factor) for factor in FACTORS], key=loss)
    low, high = min([(low, high * factor) for factor in FACTORS], key=loss)
    return min([(low * factor, high) for factor in FACTORS], key=loss)


def static_scale(bounds: Range, scheme: Scheme) -> dict[str, Tensor]:
    """ "input_scale" float32 [1], and "input_zero" int32 [1] where activations have zero points."""
    low, high = bounds
    if scheme.activation_symmetric:
        largest = FP8_MAX if scheme.activation == "fp8" else INT8_MAX
        scale = max(-low, high) / largest or 1.0
        return {"input_scale": torch.tensor([scale], dtype=torch.float32)}
    scale = (high - low) / 255 or 1.0
    zero = round(-128 - low / scale)
    return {
        "input_scale": torch.tensor([scale], dtype=torch.float32),
        "input_zero": torch.tensor([zero], dtype=torch.int32),
    }


def round_static(x: Tensor, parts: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """x [.., K] rounded and back, float32."""
    scale, zero = parts["input_scale"], parts.get("input_zero")
    q = quantize_static(x, scale, zero, scheme.activation).float()
    return (q if zero is None else q - zero) * scale
