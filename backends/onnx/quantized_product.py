"""One quantized expert's product in ONNX's text form: the lines of `experts.py` for narrow weights.

As the reference has them: int8 activations sum in int32, what else is narrow is widened to float32
first; the product is rounded to the activations' dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.errors import UnsupportedModelError
from inlay.passes.quantized_ops import FP8_MAX, INT8_MAX, SMALLEST

if TYPE_CHECKING:
    from inlay.backends.onnx.experts import Mixture

FLOAT, UINT8, FLOAT16, FLOAT8 = 1, 2, 10, 17
"""ONNX's numbers of element types."""
UNPACK = ("inlay", "UnpackInt4")
"""Makes of two numbers in a byte an INT4 tensor; `convert.py` makes it the weight itself."""


def prepared(mixture: Mixture) -> list[str]:
    """Lines before the experts' loop, from the weights alone, so that a session computes them once:
    `{name}_ready` is what one expert's is taken from.

    int8 becomes unsigned (see `Quantized.int8_linear`); ONNX's Gather takes no float8, which fits
    float16.
    """
    if not mixture.narrow:
        return []
    lines = []
    for name in ("up", "down"):
        if mixture.narrow == FLOAT8:
            lines.append(f"{name}_ready = Cast <to = {FLOAT16}> ({name})")
        elif mixture.options["activations"] == "int8":
            lines += [
                f"{name}_int_128 = Constant <value_int = 128> ()",
                f"{name}_flip = Cast <to = {UINT8}> ({name}_int_128)",
                f"{name}_bits = Cast <to = {UINT8}> ({name})",
                f"{name}_ready = BitwiseXor ({name}_bits, {name}_flip)",
            ]
        else:
            lines.append(f"{name}_ready = Identity ({name})")
    return lines


def dequantized(mixture: Mixture) -> list[str]:
    """Lines that make `{name}_dequantized` [experts, N, K] of the activations' dtype: all experts
    at once, weights in blocks of a row's inputs."""
    if not mixture.narrow:
        return []
    if mixture.options["activations"] != "none":
        raise UnsupportedModelError(
            "TensorRT has no experts whose rows are quantized at run time; leave them as they are: "
            "quantization='...,ignore=*experts*', or take w8a16 or w4a16"
        )
    lines = []
    for name in ("up", "down"):
        if f"{name}_zero" in mixture.matrices:
            raise UnsupportedModelError(
                "TensorRT takes weights without zero points alone; give symmetric=true"
            )
        _, _, columns = mixture.matrices[name]
        numbers = name
        if mixture.narrow == UINT8:
            columns, numbers = 2 * columns, f"{name}_int4"
            lines.append(f"{numbers} = {'.'.join(UNPACK)} ({name})")
        size = columns // mixture.matrices[f"{name}_scale"][1]
        lines += [
            f"{name}_narrow_scale = Cast <to = {mixture.dtype}> ({name}_scale)",
            f"{name}_blocks = Transpose <perm = [0, 2, 1]> ({name}_narrow_scale)",
            f"{name}_dequantized = DequantizeLinear <axis = 2, block_size = {size}> "
            f"({numbers}, {name}_blocks)",
        ]
    return lines


def quantized_product(mixture: Mixture, rows: str, name: str, take: str) -> list[str]:
    """Lines from rows [n, K] to `{name}_product` [n, N]; take makes of a weight one expert's."""
    parts = [part for part in (name, f"{name}_scale", f"{name}_zero") if part in mixture.matrices]
    sources = {part: f"{part}_ready" if part == name else part for part in parts}
    lines = [f"{part}_its = {take.format(source)}" for part, source in sources.items()]
    lines += [f"{name}_rows = Cast <to = {FLOAT}> ({rows})"]
    activations = mixture.options["activations"]
    if activations == "int8":
        lines += [*_rounded(name, INT8_MAX), *_int8_product(name)]
    else:
        operand = f"{name}_rows"
        if activations == "fp8":
            lines += [*_rounded(name, FP8_MAX), *_float8_rows(name)]
            operand = f"{name}_coarse"
        lines += [
            *_matrix(mixture, name),
            f"{name}_turned = Transpose <perm = [1, 0]> ({name}_wide)",
            f"{name}_exact = MatMul ({operand}, {name}_turned)",
        ]
    return [*lines, f"{name}_product = Cast <to = {mixture.dtype}> ({name}_exact)"]


def _rounded(name: str, largest: float) -> list[str]:
    """Rows scaled so that the largest number of each is this one, and their scales."""
    return [
        f"{name}_last = Constant <value_ints = [-1]> ()",
        f"{name}_smallest = Constant <value_float = {SMALLEST!r}> ()",
        f"{name}_largest = Constant <value_float = {float(largest)!r}> ()",
        f"{name}_lowest = Constant <value_float = {-float(largest)!r}> ()",
        f"{name}_none = Constant <value_float = 0.0> ()",
        f"{name}_sizes = Abs ({name}_rows)",
        f"{name}_amax = ReduceMax <keepdims = 1> ({name}_sizes, {name}_last)",
        f"{name}_is_more = Greater ({name}_amax, {name}_smallest)",
        f"{name}_quotient = Div ({name}_largest, {name}_amax)",
        f"{name}_inverse = Where ({name}_is_more, {name}_quotient, {name}_none)",
        f"{name}_scaled = Mul ({name}_rows, {name}_inverse)",
        f"{name}_row_scale = Div ({name}_amax, {name}_largest)",
    ]


def _int8_product(name: str) -> list[str]:
    """Of unsigned numbers, with 128 as zero point of both."""
    points = f"{name}_zero_point, {name}_zero_point"
    return [
        f"{name}_offset = Constant <value_float = 128.0> ()",
        f"{name}_zero_point = Cast <to = {UINT8}> ({name}_offset)",
        f"{name}_whole = Round ({name}_scaled)",
        f"{name}_bounded = Clip ({name}_whole, {name}_lowest, {name}_largest)",
        f"{name}_shifted = Add ({name}_bounded, {name}_offset)",
        f"{name}_q = Cast <to = {UINT8}> ({name}_shifted)",
        f"{name}_turned = Transpose <perm = [1, 0]> ({name}_its)",
        f"{name}_total = MatMulInteger ({name}_q, {name}_turned, {points})",
        f"{name}_total_wide = Cast <to = {FLOAT}> ({name}_total)",
        f"{name}_by_row = Mul ({name}_total_wide, {name}_row_scale)",
        f"{name}_exact = Mul ({name}_by_row, {name}_scale_its)",
    ]


def _float8_rows(name: str) -> list[str]:
    return [
        f"{name}_bounded = Clip ({name}_scaled, {name}_lowest, {name}_largest)",
        f"{name}_q = Cast <to = {FLOAT8}> ({name}_bounded)",
        f"{name}_q_wide = Cast <to = {FLOAT}> ({name}_q)",
        f"{name}_coarse = Mul ({name}_q_wide, {name}_row_scale)",
    ]


def _matrix(mixture: Mixture, name: str) -> list[str]:
    """The expert's weight [N, K] in float32."""
    _, features, columns = mixture.matrices[name]
    groups = mixture.matrices[f"{name}_scale"][1]
    has_zero = f"{name}_zero" in mixture.matrices
    is_int4 = mixture.narrow == UINT8
    lines, numbers = [], f"{name}_its"
    if is_int4:
        columns, numbers = 2 * columns, f"{name}_numbers"
        lines += [
            f"{name}_int_15 = Constant <value_int = 15> ()",
            f"{name}_int_4 = Constant <value_int = 4> ()",
            f"{name}_fifteen = Cast <to = {UINT8}> ({name}_int_15)",
            f"{name}_four = Cast <to = {UINT8}> ({name}_int_4)",
            f"{name}_low = BitwiseAnd ({name}_its, {name}_fifteen)",
            f'{name}_high = BitShift <direction = "RIGHT"> ({name}_its, {name}_four)',
            f"{name}_end = Constant <value_ints = [-1]> ()",
            f"{name}_low_column = Unsqueeze ({name}_low, {name}_end)",
            f"{name}_high_column = Unsqueeze ({name}_high, {name}_end)",
            f"{numbers} = Concat <axis = -1> ({name}_low_column, {name}_high_column)",
        ]
    lines += [
        f"{name}_grouped = Constant <value_ints = [{features}, {groups}, {columns // groups}]> ()",
        f"{name}_shape = Constant <value_ints = [{features}, {columns}]> ()",
        f"{name}_final = Constant <value_ints = [-1]> ()",
        f"{name}_narrow_groups = Reshape ({numbers}, {name}_grouped)",
        f"{name}_groups = Cast <to = {FLOAT}> ({name}_narrow_groups)",
        *_by_row(name, "scale"),
    ]
    centred = f"{name}_groups"
    if has_zero or is_int4:
        centred = f"{name}_centred"
        lines += (
            _by_row(name, "zero")
            if has_zero
            else [f"{name}_zero_rows = Constant <value_float = 8.0> ()"]
        )
        lines.append(f"{centred} = Sub ({name}_groups, {name}_zero_rows)")
    return [
        *lines,
        f"{name}_whole_groups = Mul ({centred}, {name}_scale_rows)",
        f"{name}_wide = Reshape ({name}_whole_groups, {name}_shape)",
    ]


def _by_row(name: str, part: str) -> list[str]:
    """[groups, features] to [features, groups, 1]."""
    return [
        f"{name}_{part}_float = Cast <to = {FLOAT}> ({name}_{part}_its)",
        f"{name}_{part}_turned = Transpose <perm = [1, 0]> ({name}_{part}_float)",
        f"{name}_{part}_rows = Unsqueeze ({name}_{part}_turned, {name}_final)",
    ]
