"""Factors of SmoothQuant and AWQ: by the papers' formulas, and worth their division."""

from __future__ import annotations

import pytest
import torch

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from inlay.passes.quantize.smoothing import awq, sample_rows, smoothquant
from inlay.passes.quantized_ops import dequantize, quantize_int8


def with_outliers(rows: int, size: int) -> torch.Tensor:
    x = torch.randn(rows, size)
    x[:, 3::16] *= 40
    return x


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquants_formula(alpha: float) -> None:
    x, weight = with_outliers(50, 32), torch.randn(24, 32)
    x[:, 5], weight[:, 6] = 0, 0
    factors = smoothquant([x[:20].bfloat16(), x[None, 20:].bfloat16()], weight, alpha)
    largest = x.bfloat16().float().abs().amax(0)
    expected = largest**alpha / weight.abs().amax(0) ** (1 - alpha)
    expected[5] = expected[6] = 1.0
    torch.testing.assert_close(factors, expected)


def test_smoothquant_takes_outliers_out_of_w8a8() -> None:
    x, weight = with_outliers(64, 96), torch.randn(48, 96)
    exact = x @ weight.t()

    def error(factors: torch.Tensor, of_weight: torch.Tensor) -> float:
        q, scale = quantize_int8(x / factors)
        wide = dequantize(*quantize_weight(weight * of_weight, Scheme("int8")))
        return float((q.float() * scale @ wide.t() - exact).norm() / exact.norm())

    ones, factors = torch.ones(96), smoothquant([x], weight, 0.5)
    # Six inputs of 96 are 40 times as large as the others, whose steps are then 40 times too wide.
    assert error(factors, factors) < 0.5 * error(ones, ones)
    assert error(factors, ones) > 0.3


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_keeps_the_weights_of_large_inputs(symmetric: bool) -> None:
    scheme = Scheme("int4", group_size=32, symmetric=symmetric)
    x, weight = with_outliers(200, 128), torch.randn(64, 128)
    factors = awq([x[:100], x[100:]], weight, scheme)

    def error(factors: torch.Tensor) -> float:
        wide = dequantize(*quantize_weight(weight * factors, scheme)) / factors
        return float((x @ (wide - weight).t()).norm() / (x @ weight.t()).norm())

    assert error(factors) < 0.8 * error(torch.ones(128))
    assert error(1 / factors) > error(torch.ones(128))
    assert bool((factors[3::16] > factors[4::16]).all())


def test_sampled_rows_are_spread_over_all_chunks() -> None:
    rows = torch.arange(100.0)[:, None]
    taken = sample_rows([rows[:33], rows[33:41], rows[None, 41:]], 20)
    assert taken[:, 0].tolist() == list(range(0, 100, 5))
    assert len(sample_rows([rows], 1000)) == 100
