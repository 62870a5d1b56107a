"""GPTQ: rounded as a naive version rounds, in the stored form, and nearer than to nearest."""

from __future__ import annotations

import pytest
import torch

from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.gptq import DAMPENING, gptq, gram
from inlay.passes.quantize.rounding import group_scales, quantize_weight, round_groups
from inlay.passes.quantized_ops import dequantize

SCHEMES = [
    Scheme("int4", group_size=32),
    Scheme("int4", group_size=32, symmetric=False),
    Scheme("int4"),
    Scheme("int8", group_size=32, symmetric=False),
    Scheme("int8"),
]


def correlated(rows: int, size: int) -> torch.Tensor:
    """Inputs that a third of their dimensions tell nearly all of, as activations are."""
    return torch.randn(rows, size // 3) @ torch.randn(size // 3, size) + torch.randn(rows, size)


def output_error(x: torch.Tensor, weight: torch.Tensor, parts: tuple) -> float:
    exact = x @ weight.t()
    return float((x @ dequantize(*parts).t() - exact).norm() / exact.norm())


def naive(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Each column's error is made up for by the best change of all columns after it, float64."""
    left = weight.double()
    h = hessian.double()
    h = h + DAMPENING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    size = scheme.group_size or weight.shape[1]
    for k in range(weight.shape[1]):
        if k % size == 0:
            scales, zeros = group_scales(left[:, k : k + size].float(), scheme)
        number = round_groups(left[:, k, None].float(), scales, zeros, scheme)
        rounded = (number if zeros is None else number - zeros) * scales
        change = torch.linalg.solve(h[k + 1 :, k + 1 :], h[k + 1 :, k])
        left[:, k + 1 :] += (left[:, k, None] - rounded) * change
        left[:, k] = rounded[:, 0]
    return left.float()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_rounds_as_a_naive_version_does(scheme: Scheme) -> None:
    """160 columns: a whole block and a part of one."""
    weight, hessian = torch.randn(16, 160), gram([correlated(300, 160)])
    values, scales, zeros = gptq(weight, hessian, scheme)
    like = quantize_weight(weight, scheme)
    for mine, stored in zip((values, scales, zeros), like, strict=True):
        assert (mine is None) == (stored is None)
        assert mine is None or (mine.shape, mine.dtype) == (stored.shape, stored.dtype)
    expected, got = naive(weight, hessian, scheme), dequantize(values, scales, zeros)
    # Sums in float32: a number within 1e-5 of a tie falls to the other side, and what follows in
    # its row, where its group's scale is found, with it. Seen: none of the 16 rows.
    same = torch.isclose(got, expected, atol=1e-5).all(1)
    assert int(same.sum()) >= 14


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_outputs_are_nearer_than_rounded_to_nearest(scheme: Scheme) -> None:
    weight, x, fresh = torch.randn(48, 96), correlated(400, 96), correlated(400, 96)
    fresh = x[:200] + 0.1 * fresh[:200]
    nearest = output_error(fresh, weight, quantize_weight(weight, scheme))
    ours = output_error(fresh, weight, gptq(weight, gram([x]), scheme))
    assert ours < 0.75 * nearest  # seen: 0.4 to 0.6
    wrong = gptq(weight, gram([x.flip(1)]), scheme)
    assert output_error(fresh, weight, wrong) > nearest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(scheme: Scheme) -> None:
    """So are inputs that calibration never saw."""
    weight, diagonal = torch.randn(16, 64), torch.rand(64) + 0.5
    diagonal[5] = 0
    got = gptq(weight, torch.diag(diagonal), scheme)
    for mine, nearest in zip(got, quantize_weight(weight, scheme), strict=True):
        assert mine is nearest is None or torch.equal(mine, nearest)


def test_gram_matrix_of_chunks() -> None:
    chunks = [torch.randn(1, 7, 37), torch.randn(1, 5, 37)]
    x = torch.cat(chunks, 1)[0]
    torch.testing.assert_close(gram(chunks, columns=16), x.t() @ x)
    assert gram([x.bfloat16()]).dtype == torch.float32


def test_fewer_rows_than_columns() -> None:
    """The Gram matrix has no inverse; dampening gives it one."""
    weight, x = torch.randn(16, 64), torch.randn(8, 64)
    scheme = Scheme("int4", group_size=32)
    ours, nearest = gptq(weight, gram([x]), scheme), quantize_weight(weight, scheme)
    assert output_error(x, weight, ours) < 0.5 * output_error(x, weight, nearest)
