"""The C++ products with weights of 8 and 4 bits against their references."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inlay.backends.kernels import cpu_ops
from inlay.passes import quantized_ops as reference
from inlay.passes.check import relative_rms

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 17, 64, 65, 130)
FORMATS = ("int8", "int4", "fp8")
FP8 = torch.float8_e4m3fn

# One rounding of the result, half a unit in the last place, and sums inside: their errors show
# where terms cancel, so they are taken against the size of the terms. Float32 sums of 512 terms are
# off by 2^-20 of it; where x is split into bytes a 16-bit number is off by 2^-15 of the largest at
# most, by 2^-17 in the mean, and as these errors are random they add up like terms do.
RTOL = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUMS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-15, torch.float16: 2.0**-15}


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Iterator[None]:
    cpu_ops.load_ops()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        torch.ops.inlay_cpu.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    torch.ops.inlay_cpu.set_isa("auto")


def poison() -> None:
    """Leave NaN in the memory that the next outputs are likely to get."""
    for size in (1 << 10, 1 << 14, 1 << 17):
        torch.full((size,), float("nan"))


def integers(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


# --- int8 times int8 -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 64), (96, 256), (67, 45), (1, 1), (33, 700)], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_linear_equals_the_reference(
    isa: str, shape: tuple[int, int], asymmetric: bool, dtype: torch.dtype
) -> None:
    """To the bit, and the largest sums are exact: extremes are multiplied with extremes."""
    weight, w_scale = integers(*shape), torch.rand(1, shape[0])
    weight[0] = -128
    handle = torch.ops.inlay_cpu.pack_int8(weight)
    for rows in ROWS:
        q, x_scale = integers(rows, shape[1]), torch.rand(rows, 1)
        q[0] = -128
        zero = torch.randint(-128, 128, (rows, 1), dtype=torch.int32) if asymmetric else None
        bias = torch.randn(shape[0]).to(dtype) if rows % 2 else None
        poison()
        out = torch.ops.inlay_cpu.int8_linear(
            q, x_scale, zero, handle, w_scale, bias, shape[0], dtype
        )
        exact = reference.int8_linear(q, x_scale, zero, weight, w_scale, bias, dtype)
        assert torch.equal(out, exact), rows


def test_integer_sums_are_exact(isa: str) -> None:
    """Beyond what float32 holds: with scales of 1 the result is the int64 sum, rounded once."""
    q, weight = integers(3, 4864), integers(40, 4864)
    q[0], weight[0] = -128, -128
    out = torch.ops.inlay_cpu.int8_linear(
        q, torch.ones(1), None, torch.ops.inlay_cpu.pack_int8(weight), torch.ones(40), None, 40,
        torch.float32,
    )  # fmt: skip
    assert torch.equal(out, (q.long() @ weight.long().t()).float())
    assert out[0, 0] == 128 * 128 * 4864


def test_int8_linear_with_a_static_scale(isa: str) -> None:
    q, weight = integers(5, 64), integers(32, 64)
    x_scale, zero, w_scale = torch.rand(1), torch.tensor([-7], dtype=torch.int32), torch.rand(1, 32)
    handle = torch.ops.inlay_cpu.pack_int8(weight)
    rows = q.view(5, 1, 64)
    out = torch.ops.inlay_cpu.int8_linear(
        rows, x_scale, zero, handle, w_scale, None, 32, torch.float32
    )
    exact = reference.int8_linear(rows, x_scale, zero, weight, w_scale, None, torch.float32)
    assert torch.equal(out, exact)


# --- weight-only -----------------------------------------------------------------------------


def stored_weight(kind: str, outputs: int, inputs: int) -> Tensor:
    if kind == "int8":
        return integers(outputs, inputs)
    if kind == "int4":
        return torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    bits = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8)
    return torch.where((bits & 127) == 127, 0x7E, bits).to(torch.uint8).view(FP8)


def random_zero(kind: str, shape: tuple[int, int]) -> Tensor:
    if kind == "int8":
        return integers(*shape)
    return torch.randint(0, 16, shape, dtype=torch.uint8)


def check_close(out: Tensor, exact: Tensor, terms: Tensor, dtype: torch.dtype) -> None:
    """exact, and the size of its terms (the product of their norms), in float64."""
    assert out.dtype is dtype
    error = (out.double() - exact).abs()
    assert (error <= exact.abs() * RTOL[dtype] + terms * SUMS[dtype]).all(), error.max()


@pytest.mark.parametrize(
    ("kind", "with_zero"),
    [("int8", False), ("int8", True), ("int4", False), ("int4", True), ("fp8", False)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((32, 128), 4), ((96, 256), 4), ((64, 256), 2), ((67, 46), 1), ((33, 48), 4), ((40, 512), 1)],
    ids=str,
)
def test_weight_only_linear(
    isa: str,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    groups: int,
    with_zero: bool,
) -> None:
    outputs, inputs = shape
    weight = stored_weight(kind, outputs, inputs)
    scale_dtype = DTYPES[groups % 3]
    scale = ((torch.rand(groups, outputs) + 0.1) / 8).to(scale_dtype)  # in float16's range
    zero = random_zero(kind, (groups, outputs)) if with_zero else None
    handle = torch.ops.inlay_cpu.pack_weight_only(weight)
    wide = reference.dequantize(weight, scale, zero).double()
    for rows in ROWS:
        x = torch.randn(rows, inputs).to(dtype)
        bias = torch.randn(outputs).to(dtype) if rows % 2 else None
        poison()
        out = torch.ops.inlay_cpu.weight_only_linear(x, handle, scale, zero, bias, outputs)
        exact = x.double() @ wide.t() + (0 if bias is None else bias.double())
        terms = x.double().norm(dim=1, keepdim=True) * wide.norm(dim=1)
        if with_zero:  # the zero may be taken off the sum, not off each weight
            terms = terms * 16
        check_close(out, exact, terms, dtype)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_is_widened_exactly(isa: str, kind: str) -> None:
    """A row of the identity picks one number of each output."""
    bits = torch.arange(256, dtype=torch.uint8)
    weight = bits.view(torch.int8) if kind == "int8" else bits.view(FP8) if kind == "fp8" else bits
    rows = weight.view(torch.uint8).expand(32, 256).contiguous()
    rows = rows if kind == "int4" else rows.view(weight.dtype)
    inputs = 512 if kind == "int4" else 256
    scale = torch.full((1, 32), 2.0**-3)
    exact = reference.dequantize(rows, scale, None)
    handle = torch.ops.inlay_cpu.pack_weight_only(rows)
    for dtype in (torch.float32, torch.bfloat16):
        for k in range(0, inputs, 7):
            x = torch.zeros(2, inputs, dtype=dtype)
            x[1, k] = 1.0
            if exact[:, ~x[1].bool()].isnan().any():  # 0 times NaN
                continue
            out = torch.ops.inlay_cpu.weight_only_linear(x, handle, scale, None, None, 32)
            assert torch.equal(out[1].float(), exact[:, k]), k


# --- fp8 times fp8 ---------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(32, 256), (67, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_linear(isa: str, groups: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    outputs, inputs = shape
    weight = stored_weight("fp8", outputs, inputs)
    w_scale = torch.rand(groups, outputs) / 1000
    handle = torch.ops.inlay_cpu.pack_weight_only(weight)
    for rows in ROWS:
        q = stored_weight("fp8", rows, inputs)
        x_scale = torch.rand(rows, groups) + 0.1
        bias = torch.randn(outputs).to(dtype) if rows % 2 else None
        poison()
        for scale in (x_scale, x_scale[:, :1], x_scale[0, :1]):
            out = torch.ops.inlay_cpu.fp8_linear(q, scale, handle, w_scale, bias, outputs, dtype)
            size = inputs // groups
            x = q.double() * scale.double().expand(rows, groups).repeat_interleave(size, 1)
            w = weight.double() * w_scale.double().t().repeat_interleave(size, 1)
            exact = x @ w.t() + (0 if bias is None else bias.double())
            terms = x.norm(dim=1, keepdim=True) * w.norm(dim=1)
            check_close(out, exact, terms, dtype)


# --- rows, threads ---------------------------------------------------------------------------


def one_of_each(
    inputs: int, outputs: int, rows: int, repeated: int = 0
) -> list[tuple[str, object]]:
    """(name, call of the rows [begin, end)) for every kind of product.

    repeated: so many of the last rows are like the one before them.
    """
    ops, calls = torch.ops.inlay_cpu, []
    q, x_scale = integers(rows, inputs), torch.rand(rows, 1)
    x8, x = stored_weight("fp8", rows, inputs), torch.randn(rows, inputs).bfloat16()
    for given in (q, x_scale, x8.view(torch.uint8), x):
        given[rows - repeated :] = given[rows - repeated - 1]
    w_scale = torch.rand(1, outputs)
    packed = ops.pack_int8(integers(outputs, inputs))
    calls.append(
        (
            "int8_linear",
            lambda b, e: ops.int8_linear(
                q[b:e], x_scale[b:e], None, packed, w_scale, None, outputs, torch.bfloat16
            ),
        )
    )
    for kind in FORMATS:
        handle = ops.pack_weight_only(stored_weight(kind, outputs, inputs))
        for groups in (1, inputs // 32):
            scale = torch.rand(groups, outputs)
            zero = None if kind == "fp8" else random_zero(kind, (groups, outputs))
            calls.append(
                (
                    f"{kind}, {groups} groups",
                    lambda b, e, h=handle, s=scale, z=zero: ops.weight_only_linear(
                        x[b:e], h, s, z, None, outputs
                    ),
                )
            )
        if kind == "fp8":
            calls.append(
                (
                    "fp8_linear",
                    lambda b, e, h=handle: ops.fp8_linear(
                        x8[b:e], x_scale[b:e], h, w_scale, None, outputs, torch.bfloat16
                    ),
                )
            )
    return calls


def test_rows_do_not_depend_on_the_batch_or_threads(isa: str) -> None:
    before = torch.get_num_threads()
    for name, call in one_of_each(1024, 416, 300):
        whole = call(0, 300)
        try:
            torch.set_num_threads(2)
            assert torch.equal(call(0, 300), whole), name
            for begin, end in ((0, 1), (7, 9), (3, 6), (0, 17), (100, 164), (31, 200)):
                assert torch.equal(call(begin, end), whole[begin:end]), (name, begin, end)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("repeated", [1, 4, 9])
def test_rows_that_repeat_the_one_before_them(isa: str, repeated: int) -> None:
    """They are computed once: the results are those of rows that are computed by themselves."""
    rows = 10
    for name, call in one_of_each(256, 96, rows, repeated):
        whole = call(0, rows)
        for row in range(rows):
            assert torch.equal(call(row, row + 1), whole[row : row + 1]), (name, row)


def test_equal_numbers_of_unequal_scales_are_unequal_rows(isa: str) -> None:
    ops = torch.ops.inlay_cpu
    q, scale = integers(1, 64).expand(3, -1).contiguous(), torch.tensor([[1.0], [2.0], [2.0]])
    handle, w_scale = ops.pack_int8(integers(32, 64)), torch.rand(1, 32)
    zero = torch.tensor([[0], [0], [5]], dtype=torch.int32)
    args = (handle, w_scale, None, 32, torch.float32)
    whole = ops.int8_linear(q, scale, zero, *args)
    for row in range(3):
        each = slice(row, row + 1)
        assert torch.equal(ops.int8_linear(q[each], scale[each], zero[each], *args), whole[each])
    assert len(whole.unique(dim=0)) == 3


# --- experts ---------------------------------------------------------------------------------


def quantized_side(
    activations: str, kind: str, experts: int, outputs: int, inputs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = torch.stack(
        [stored_weight(kind, outputs, inputs).view(torch.uint8) for _ in range(experts)]
    )
    if kind != "int4":
        weight = weight.view(torch.int8 if kind == "int8" else FP8)
    groups = 2 if activations == "none" else 1
    size = {"int8": 74.0, "int4": 4.6, "fp8": 130.0}[kind] * inputs**0.5
    scale = (torch.rand(experts, groups, outputs) + 0.5) / size
    zero = None
    if kind == "int4" and activations == "none":
        zero = torch.randint(6, 10, scale.shape, dtype=torch.uint8)
    return weight, scale, zero


@pytest.mark.parametrize(
    ("activations", "kind"),
    [("none", "int8"), ("none", "int4"), ("none", "fp8"), ("int8", "int8"), ("fp8", "fp8")],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_quantized_experts(
    isa: str, activations: str, kind: str, dtype: torch.dtype, interleaved: bool
) -> None:
    experts, hidden, inner, tokens = 5, 64, 48, 40
    x = torch.randn(tokens, hidden).to(dtype)
    index = torch.randint(-1, experts + 1, (tokens, 3))
    index[0] = -1
    shares = torch.rand(tokens, 3)
    x[-3:], index[-3:], shares[-2:] = x[-3], index[-3], shares[-2]  # the last two repeat
    up = quantized_side(activations, kind, experts, 2 * inner, hidden)
    down = quantized_side(activations, kind, experts, hidden, inner)
    up_bias, down_bias = torch.randn(experts, 2 * inner).to(dtype), torch.randn(experts, hidden)
    down_bias = down_bias.to(dtype)
    exact = reference.quantized_experts(
        x, index, shares, *up, *down, activations, up_bias, down_bias, interleaved=interleaved
    )

    def halves(t: Tensor | None) -> Tensor | None:
        if t is None or not interleaved:
            return t
        return torch.cat((t[..., ::2], t[..., 1::2]), dim=-1)

    ops = torch.ops.inlay_cpu
    packed_up = ops.pack_quantized_experts(up[0], activations, interleaved)
    packed_down = ops.pack_quantized_experts(down[0], activations)
    out = ops.quantized_experts(
        x, index, shares, packed_up, halves(up[1]), halves(up[2]), packed_down, down[1], down[2],
        activations, halves(up_bias), down_bias,
    )  # fmt: skip
    assert out.dtype is dtype
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    # Products are rounded to dtype and activations quantized again: where a float32 sum in another
    # order rounds the other way, one number moves by a unit (2^-8 in bfloat16, 1/127, 1/16) of the
    # few of 48 that do so.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    if activations != "none":
        tolerance = max(tolerance, 2e-3 if activations == "int8" else 1e-2)
    assert relative_rms(exact, out) < tolerance
    wrong = reference.quantized_experts(
        x, index, shares, *up, *down, activations, up_bias, None, interleaved=interleaved
    )
    assert relative_rms(wrong, out) > 5 * tolerance


def test_one_token_of_quantized_experts_reads_its_experts_only(isa: str) -> None:
    """The others' scales are NaN, which any use of them would show."""
    weight = torch.stack([integers(64, 64) for _ in range(4)])
    scale = torch.full((4, 1, 64), float("nan"))
    scale[2] = 0.001
    handle = torch.ops.inlay_cpu.pack_quantized_experts(weight, "int8")
    out = torch.ops.inlay_cpu.quantized_experts(
        torch.randn(1, 64), torch.tensor([[2]]), torch.ones(1, 1), handle, scale, None, handle,
        scale, None, "int8", gated=False,
    )  # fmt: skip
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_only_with_a_number_much_larger_than_the_others(
    isa: str, dtype: torch.dtype
) -> None:
    """As in activations of first tokens: it costs only its own 128 inputs their last bits."""
    weight, scale = integers(64, 512), torch.full((1, 64), 0.01)
    x = torch.randn(7, 512).to(dtype)
    x[:, 5] = 3000.0
    handle = torch.ops.inlay_cpu.pack_weight_only(weight)
    out = torch.ops.inlay_cpu.weight_only_linear(x, handle, scale, None, None, 64)
    exact = x.double() @ (weight.double() * 0.01).t()
    terms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1) / 100
    check_close(out, exact, terms, dtype)
    weight[:, :128] = 0  # the others are as exact as ever
    out = torch.ops.inlay_cpu.weight_only_linear(
        x, torch.ops.inlay_cpu.pack_weight_only(weight), scale, None, None, 64
    )
    rest = x[:, 128:].double()
    wide = weight[:, 128:].double() / 100
    check_close(out, rest @ wide.t(), rest.norm(dim=1)[:, None] * wide.norm(dim=1), dtype)


def test_inputs_that_are_not_finite_stay_in_their_row(isa: str) -> None:
    weight, scale = integers(32, 128), torch.rand(1, 32)
    handle, x = torch.ops.inlay_cpu.pack_weight_only(weight), torch.randn(3, 128).bfloat16()
    clean = torch.ops.inlay_cpu.weight_only_linear(x, handle, scale, None, None, 32)
    for value in (float("nan"), float("inf")):
        x[1, 7] = value
        out = torch.ops.inlay_cpu.weight_only_linear(x, handle, scale, None, None, 32)
        assert not out[1].isfinite().any()
        assert torch.equal(out[::2], clean[::2])


@pytest.mark.parametrize("shape", [(1152, 896), (96, 2048), (64, 30), (67, 45)], ids=str)
def test_bfloat16_rows_do_not_depend_on_the_batch_or_threads(shape: tuple[int, int]) -> None:
    ops = torch.ops.inlay_cpu
    x, weight = torch.randn(300, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    handle = ops.pack_linear(weight)
    ops.fix_rows(handle, 32)
    whole, before = ops.linear(x, handle, None, shape[0]), torch.get_num_threads()
    terms = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    check_close(whole, x.double() @ weight.double().t(), terms, torch.bfloat16)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for begin, end in ((0, 1), (7, 9), (3, 16), (100, 164), (31, 200)):
                part = ops.linear(x[begin:end], handle, None, shape[0])
                assert torch.equal(part, whole[begin:end]), (threads, begin, end)
    finally:
        torch.set_num_threads(before)


def test_memory_of_packed_weights_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    weight = integers(2048, 4096)
    torch.ops.inlay_cpu.pack_int8(weight)
    before = resident()
    for _ in range(20):
        torch.ops.inlay_cpu.pack_int8(weight)
    assert resident() - before < 5 * weight.nbytes


# --- handles, refusals -----------------------------------------------------------------------


def test_what_handles_tell() -> None:
    ops = torch.ops.inlay_cpu
    weight = integers(64, 128)
    for handle, name, size in (
        (ops.pack_int8(weight), "int8", 64 * 128),
        (ops.pack_weight_only(weight), "int8_weight_only", 64 * 128),
        (ops.pack_weight_only(stored_weight("int4", 64, 128)), "int4_weight_only", 64 * 64),
        (ops.pack_weight_only(stored_weight("fp8", 64, 128)), "fp8", 64 * 128),
        (ops.pack_quantized_experts(weight[None], "int8"), "int8", 64 * 128),
    ):
        assert ops.packed_format(handle) == name
        assert size <= ops.packed_nbytes(handle) <= size + 4 * 64
        ops.fix_rows(handle, 32)


def test_refusals() -> None:
    ops = torch.ops.inlay_cpu
    weight, x = integers(32, 64), torch.randn(2, 64)
    packed, narrow = ops.pack_int8(weight), ops.pack_weight_only(weight)
    scale = torch.ones(1, 32)
    with pytest.raises(RuntimeError, match="weight must be int8, got Float"):
        ops.pack_int8(weight.float())
    with pytest.raises(RuntimeError, match=r"weight must be int8, uint8 .* got Float"):
        ops.pack_weight_only(weight.float())
    with pytest.raises(RuntimeError, match="activations 'int8' need weights of Char, got Byte"):
        ops.pack_quantized_experts(weight[None].view(torch.uint8), "int8")
    with pytest.raises(RuntimeError, match="handle must be the very tensor"):
        ops.weight_only_linear(x, narrow.clone(), scale, None, None, 32)
    with pytest.raises(RuntimeError, match=r"a weight packed as int8$"):
        ops.weight_only_linear(x, packed, scale, None, None, 32)
    with pytest.raises(RuntimeError, match=r"weight is \[32, 64\].*out_features 31"):
        ops.weight_only_linear(x, narrow, scale, None, None, 31)
    with pytest.raises(RuntimeError, match=r"scale must be \[groups, 32\]"):
        ops.weight_only_linear(x, narrow, torch.ones(3, 32), None, None, 32)
    with pytest.raises(RuntimeError, match="zero must be Char"):
        ops.weight_only_linear(x, narrow, scale, torch.ones(1, 32), None, 32)
    with pytest.raises(RuntimeError, match="q must be Char"):
        ops.int8_linear(x, torch.ones(2), None, packed, scale, None, 32, torch.float32)
    with pytest.raises(RuntimeError, match=r"x_scale must be float32 and \[1\].*2 rows"):
        ops.int8_linear(weight[:2], torch.ones(3), None, packed, scale, None, 32, torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be float32, bfloat16 or float16"):
        ops.int8_linear(weight[:2], torch.ones(2), None, packed, scale, None, 32, torch.int8)
    with pytest.raises(RuntimeError, match="q must be Float8_e4m3fn"):
        ops.fp8_linear(weight[:2], torch.ones(2), narrow, scale, None, 32, torch.float32)


@pytest.mark.parametrize("isa", ["auto", "portable"])
def test_small_fp8_weights_do_not_need_denormal_numbers(isa: str) -> None:
    """A process may have told the CPU to take these for zero (torch.set_flush_denormal)."""
    ops = torch.ops.inlay_cpu
    weight = (torch.randn(64, 96) * 0.004).to(torch.float8_e4m3fn)  # most are below 2^-6
    x = torch.randn(3, 96)
    handle, scale = ops.pack_weight_only(weight), torch.ones(1, 64)
    ops.set_isa(isa)
    try:
        usual = ops.weight_only_linear(x, handle, scale, None, None, 64)
        assert torch.set_flush_denormal(True)
        flushed = ops.weight_only_linear(x, handle, scale, None, None, 64)
    finally:
        torch.set_flush_denormal(False)
        ops.set_isa("auto")
    assert torch.equal(flushed, usual)
    # Sums of 96 products in float32.
    torch.testing.assert_close(usual, x @ weight.float().T, rtol=1e-5, atol=1e-6)
