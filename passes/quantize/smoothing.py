"""Factors that a layer's inputs are divided by and its weight's columns multiplied with: those of
SmoothQuant (Xiao et al., 2023) and AWQ (Lin et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from inlay.passes.quantized_ops import dequantize

ROWS, OUTPUTS = 1024, 512
"""Rows of input, and outputs of a layer, that AWQ judges by; it chooses one number of STEPS."""

STEPS = 20
SMALLEST = 1e-5


def smoothquant(inputs: Sequence[Tensor], weight: Tensor, alpha: float) -> Tensor:
    """max|x_j|^alpha / max|w_j|^(1 - alpha), float32 [K]; 1 where either is 0.

    inputs [.., K] in chunks, weight [N, K]. alpha 1 leaves no outliers to the inputs, 0 none to
    the weight.
    """
    largest = torch.stack([_rows(x).abs().amax(0).float() for x in inputs]).amax(0)
    of_weight = weight.abs().amax(0).float()
    factors = largest.pow(alpha) / of_weight.pow(1 - alpha)
    usable = (largest > 0) & (of_weight > 0)
    return torch.where(usable, factors.clamp_min(SMALLEST), 1.0)


def awq(inputs: Sequence[Tensor], weight: Tensor, scheme: Scheme) -> Tensor:
    """mean|x_j|^alpha / mean|w_j|^(1 - alpha), float32 [K], for the alpha from 0 to 1 of least
    squared error of the layer's output once the scaled weight is rounded to nearest; ones where no
    alpha betters it. The weight's part is from the authors' code; the paper has the inputs' alone.

    inputs [.., K] in chunks, weight [N, K]. Clipping, the paper's second search, is in the
    rounding itself (rounding.FACTORS).
    """
    num_rows = sum(_rows(x).shape[0] for x in inputs)
    mean = torch.stack([_rows(x).abs().sum(0, dtype=torch.float32) for x in inputs]).sum(0)
    mean = (mean / num_rows).clamp_min(SMALLEST)
    rows = sample_rows(inputs, ROWS).float()
    of_weight = weight.abs().mean(0, dtype=torch.float32).clamp_min(SMALLEST)
    wide = sample_rows([weight], OUTPUTS).float()
    best, least = torch.ones_like(mean), float("inf")
    for step in range(-1, STEPS + 1):
        alpha = step / STEPS
        factors = mean.pow(alpha) / of_weight.pow(1 - alpha) if step >= 0 else best
        factors = factors / (factors.max() * factors.min()).sqrt()
        rounded = dequantize(*quantize_weight(wide * factors, scheme)) / factors
        loss = float((rows @ (rounded - wide).t()).square().sum())
        if loss < least:
            best, least = factors, loss
    return best


def sample_rows(inputs: Sequence[Tensor], count: int) -> Tensor:
    """At most count rows [count, K], spread evenly over all."""
    rows = [_rows(x) for x in inputs]
    stride = max(-(-sum(len(x) for x in rows) // count), 1)
    taken, first = [], 0
    for x in rows:
        taken.append(x[first::stride])
        first = (first - len(x)) % stride
    return torch.cat(taken)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
