"""The matrix product against the references of the linear ops, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from inlay.backends.kernels.triton import linear
from inlay.backends.kernels.triton.launch import Target
from inlay.backends.kernels.triton.products import FP8, Product, counters_of, plan
from inlay.passes import quantized_ops as reference
from inlay.passes.check import relative_rms
from inlay.passes.quantize.config import Scheme
from inlay.passes.quantize.rounding import quantize_weight
from tests.kernels.interpreted import between_nan, poisoned  # noqa: F401

ROWS = (1, 17, 70)
"""The three forms of the kernel: 16 and 32 rows transposed, and as it is."""

# Sums of up to 1,536 terms of random sign in another order, 2^-24 each: their errors add up to less
# than ten of these. Float16: half a unit in the last place is 2^-11 at most, 0.6 of it in the mean;
# a second such error where a tile spans groups and scaled weights are rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(33, 100), (1, 32), (130, 1056)], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_is_exact(rows: int, shape: tuple[int, int], asymmetric: bool) -> None:
    q, weight = integers(rows, shape[1]), integers(*shape)
    q[0], weight[0] = -128, -128
    x_scale, w_scale, bias = torch.rand(rows, 1), torch.rand(1, shape[0]), torch.randn(shape[0])
    zero = torch.randint(-128, 128, (rows, 1), dtype=torch.int32) if asymmetric else None
    rest = weight, w_scale, bias, torch.float32
    out = linear.int8_linear(between_nan(q), x_scale, zero, *rest)
    assert torch.equal(out, reference.int8_linear(q, x_scale, zero, *rest))
    assert not torch.equal(out, reference.int8_linear(q, x_scale, zero, weight ^ 1, *rest[1:]))


@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("rows", ROWS)
def test_fp8(rows: int, groups: int) -> None:
    """One scale for a row, one for each 128 inputs of it (DeepSeek's), and between."""
    columns, depth = 35, 1536 if groups == 12 else 192
    q, x_scale = reference.quantize_fp8(torch.randn(rows, depth), depth // groups)
    scheme = Scheme("fp8", group_size=0 if groups == 1 else depth // groups)
    weight, w_scale, _ = quantize_weight(torch.randn(columns, depth), scheme)
    out = linear.fp8_linear(q, x_scale, weight, w_scale, None, torch.float32)
    expected = reference.fp8_linear(q, x_scale, weight, w_scale, None, torch.float32)
    assert relative_rms(expected, out) < TOLERANCE[torch.float32]
    if groups > 1:
        twin = reference.fp8_linear(q, x_scale, weight, w_scale.flip(0), None, torch.float32)
        assert relative_rms(expected, twin) > 100 * TOLERANCE[torch.float32]


def test_one_scale_for_all_rows_and_numbers_that_are_not() -> None:
    q, weight = torch.randn(5, 64).to(FP8), torch.randn(32, 64).to(FP8)
    q[1, 7] = float("nan")
    q[2] = 448.0
    q[3] = 2.0**-9  # the smallest there is
    scales = torch.tensor([0.5]), torch.rand(1, 32)
    out = linear.fp8_linear(q, scales[0], weight, scales[1], None, torch.float32)
    expected = reference.fp8_linear(q, scales[0], weight, scales[1], None, torch.float32)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[1].isnan().all()
    for row in (0, 2, 3, 4):
        assert relative_rms(expected[row], out[row]) < TOLERANCE[torch.float32]


SCHEMES = [
    Scheme("int8"),
    Scheme("int8", group_size=32),
    Scheme("int8", group_size=128, symmetric=False),
    Scheme("int8", symmetric=False),
    Scheme("int4"),
    Scheme("int4", group_size=32),
    Scheme("int4", group_size=32, symmetric=False),
    Scheme("int4", group_size=64, symmetric=False),
    Scheme("int4", group_size=128),
    Scheme("fp8"),
]


SLOW = pytest.mark.slow
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.float16, marks=SLOW)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only(scheme: Scheme, dtype: torch.dtype) -> None:
    check_weight_only(scheme, dtype, 384)


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[6]], ids=str)
def test_weight_only_in_float16(scheme: Scheme) -> None:
    """The same in few: a tile that spans groups, as int8 and int4."""
    check_weight_only(scheme, torch.float16, 128)


def check_weight_only(scheme: Scheme, dtype: torch.dtype, depth: int) -> None:
    columns = 40
    weight, scale, zero = quantize_weight(torch.randn(columns, depth) / depth**0.5, scheme)
    bias = torch.randn(columns).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, depth).to(dtype)
        out = linear.weight_only_linear(between_nan(x), weight, scale, zero, bias)
        wide = reference.dequantize(weight, scale, zero).double()
        expected = x.double() @ wide.t() + bias.double()
        assert out.dtype is dtype
        assert relative_rms(expected, out) < TOLERANCE[dtype]
        off = torch.zeros_like(scale) if zero is None else zero.float()
        off = off + (8 if weight.dtype == torch.uint8 and zero is None else 0)
        if weight.dtype != FP8:
            twin = reference.dequantize(weight, scale, off + 1).double()
            # One step of a weight's 127 is 0.8 % of the largest, about 0.3 % of the result.
            assert relative_rms(expected, x.double() @ twin.t() + bias) > 5 * TOLERANCE[dtype]


@pytest.mark.parametrize("depth", [34, 45, 100])
def test_any_depth(depth: int) -> None:
    """Tiles that reach past the end of K; int4 has an even K."""
    for scheme in (Scheme("int8"), Scheme("int4"), Scheme("fp8")):
        if scheme.weight == "int4" and depth % 2:
            continue
        weight, scale, zero = quantize_weight(torch.randn(9, depth), scheme)
        x = torch.randn(3, depth)
        expected = reference.weight_only_linear(x, weight, scale, zero, None)
        out = linear.weight_only_linear(between_nan(x), weight, scale, zero, None)
        assert relative_rms(expected, out) < TOLERANCE[torch.float32]


def test_a_sum_in_parts_leaves_the_counters_at_zero() -> None:
    q, weight = integers(5, 2048), integers(64, 2048)
    scales = torch.rand(5, 1), torch.rand(1, 64)
    out = torch.empty(5, 64)
    product = Product(q, weight, out, scales[0], None, scales[1])
    launch = plan(product, Target(90, 132))
    assert launch.args["SPLIT_K"] == 4
    for _ in range(2):
        out.fill_(float("nan"))
        launch.run()
        expected = reference.int8_linear(q, scales[0], None, weight, scales[1], None, out.dtype)
        assert torch.equal(out, expected)
        assert not counters_of(out.device).any()


def test_no_rows_and_leading_dimensions() -> None:
    weight, scale = integers(8, 32), torch.rand(1, 8)
    assert linear.weight_only_linear(torch.empty(0, 32), weight, scale, None, None).shape == (0, 8)
    x = torch.randn(2, 3, 32)
    out = linear.weight_only_linear(x, weight, scale, None, None)
    expected = reference.weight_only_linear(x, weight, scale, None, None)
    assert relative_rms(expected, out) < TOLERANCE[torch.float32]


def test_groups_of_another_size_go_to_the_reference() -> None:
    x, weight, scale = torch.randn(2, 40), integers(8, 40), torch.rand(5, 8)
    out = linear.weight_only_linear(x, weight, scale, None, None)
    assert torch.equal(out, reference.weight_only_linear(x, weight, scale, None, None))
