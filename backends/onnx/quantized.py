"""Quantized layers in ONNX.

For ONNX Runtime products are computed as our references have them: int8 sums in int32, exact; 4-bit
weights by MatMulNBits, which keeps them narrow in memory and computes in float32 (its other mode
rounds activations: an error of 5e-3). For TensorRT both are Q/DQ around a plain product: weights in
the type that they are stored in, activations by static, symmetric scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.backends.onnx.quantized_product import UNPACK
from inlay.errors import UnsupportedModelError

FLOAT, INT8, INT32, FLOAT8 = 1, 3, 6, 17
"""ONNX's numbers of element types."""
UINT8 = 2
BLOCKS = (128, 64, 32, 16)
"""Inputs that share a scale in MatMulNBits."""
CALIBRATE = "--quantization '{},activation_scales=static,calibration=FILE'"


class Quantized:
    """Translations of the ops in `passes/quantized_ops.py`; `translations.py` has their list."""

    def __init__(self, target: str, opset: Any, call_op: Callable[..., Any]) -> None:
        """call_op(domain, name, *inputs, **attributes): for ops that are not ONNX's."""
        self._is_standard = target == "tensorrt"
        self._onnx, self._call_op = opset, call_op

    def quantize_static(self, x: Any, scale: Any, zero: Any, dtype: str) -> Any:
        """Only for TensorRT. QuantizeLinear rounds to even and saturates as the reference does;
        but int8 would reach -128, where the reference stops at -127."""
        op = self._onnx
        if zero is not None:
            raise UnsupportedModelError(
                "TensorRT takes activations without zero points alone; give "
                "activation_symmetric=true"
            )
        number = FLOAT8 if dtype == "fp8" else INT8
        wide, scale = op.Cast(x, to=FLOAT), self._scalar(scale)
        if number == INT8:
            wide = op.Max(wide, op.Mul(scale, op.Constant(value_float=-127.0)))
        zero = op.Cast(op.Constant(value_float=0.0), to=number)
        return op.QuantizeLinear(wide, scale, zero)

    def int8_linear(
        self,
        q: Any,
        x_scale: Any,
        x_zero: Any,
        weight: Any,
        w_scale: Any,
        bias: Any,
        dtype: int,
    ) -> Any:
        op = self._onnx
        if self._is_standard:
            return self._product_of_dequantized(q, x_scale, weight, w_scale, bias, dtype, "w8a8")
        features, inputs = (int(size) for size in weight.shape)
        # Unsigned, with 128 added, and as zero points: ONNX Runtime has no fast product of two
        # signed types (30 ms in place of 0.2 for one row of a [2048, 8192] weight), and of mixed
        # ones the sums saturate on CPUs without VNNI.
        rows = op.Reshape(self._unsigned(q), op.Constant(value_ints=[-1, inputs]))
        matrix = op.Transpose(self._unsigned(weight), perm=[1, 0])
        zero = op.Cast(op.Constant(value_int=128), to=UINT8)
        total = op.MatMulInteger(rows, matrix, zero, zero)
        sizes = op.Shape(q, start=0, end=-1), op.Constant(value_ints=[features])
        total = op.Reshape(total, op.Concat(*sizes, axis=0))
        if x_zero is not None:
            wide = op.Cast(weight, to=INT32)
            sums = op.ReduceSum(wide, op.Constant(value_ints=[-1]), keepdims=0)
            total = op.Sub(total, op.Mul(x_zero, sums))
        return self._finish(op.Mul(op.Mul(op.Cast(total, to=FLOAT), x_scale), w_scale), bias, dtype)

    def fp8_linear(
        self, q: Any, x_scale: Any, weight: Any, w_scale: Any, bias: Any, dtype: int
    ) -> Any:
        """Only for TensorRT."""
        return self._product_of_dequantized(q, x_scale, weight, w_scale, bias, dtype, "fp8")

    def weight_only_linear(self, x: Any, weight: Any, scale: Any, zero: Any, bias: Any) -> Any:
        if self._is_standard:
            return self._weight_only_standard(x, weight, scale, zero, bias)
        if weight.dtype != UINT8:
            return self._weight_only_wide(x, weight, scale, zero, bias)
        op, groups = self._onnx, int(scale.shape[0])
        features, inputs = int(weight.shape[0]), 2 * int(weight.shape[1])
        block = next(size for size in BLOCKS if inputs // groups % size == 0)
        per_group, blocks = inputs // groups // block, inputs // block
        packed = op.Reshape(weight, op.Constant(value_ints=[features, blocks, block // 2]))
        # Zero points are floats too: as 4-bit numbers they would have to be packed.
        given = [packed, *(self._by_block(n, per_group) for n in (scale, zero) if n is not None)]
        sizes = {"K": inputs, "N": features, "bits": 4, "block_size": block}
        wide = op.Cast(x, to=FLOAT)
        y = self._call_op("com.microsoft", "MatMulNBits", wide, *given, **sizes)
        return self._finish(y, bias, int(x.dtype))

    def _unsigned(self, numbers: Any) -> Any:
        """int8 as uint8 with 128 added."""
        op = self._onnx
        offset = op.Cast(op.Constant(value_int=128), to=UINT8)
        return op.BitwiseXor(op.Cast(numbers, to=UINT8), offset)

    def _by_block(self, numbers: Any, per_group: int) -> Any:
        """[groups, features] to float32 [features * blocks], each as often as its group has
        blocks."""
        op = self._onnx
        numbers = op.Transpose(op.Cast(numbers, to=FLOAT), perm=[1, 0])
        if per_group > 1:
            numbers = op.Unsqueeze(numbers, op.Constant(value_ints=[-1]))
            numbers = op.Expand(numbers, op.Constant(value_ints=[1, 1, per_group]))
        return op.Reshape(numbers, op.Constant(value_ints=[-1]))

    def _weight_only_wide(self, x: Any, weight: Any, scale: Any, zero: Any, bias: Any) -> Any:
        """The reference: a float32 weight once a session is loaded, narrow on disk alone.

        MatMulNBits for 8 bits is 15 to 30 times as slow where it is as exact.
        """
        op = self._onnx
        groups, features = (int(size) for size in scale.shape)
        inputs = int(weight.shape[1])
        last = op.Constant(value_ints=[-1])

        def by_row(numbers: Any) -> Any:
            turned = op.Transpose(op.Cast(numbers, to=FLOAT), perm=[1, 0])
            return op.Unsqueeze(turned, last)  # [features, groups, 1]

        wide = op.Cast(weight, to=FLOAT)
        wide = op.Reshape(wide, op.Constant(value_ints=[features, groups, inputs // groups]))
        if zero is not None:
            wide = op.Sub(wide, by_row(zero))
        matrix = op.Mul(wide, by_row(scale))
        matrix = op.Reshape(matrix, op.Constant(value_ints=[features, inputs]))
        y = op.MatMul(op.Cast(x, to=FLOAT), op.Transpose(matrix, perm=[1, 0]))
        return self._finish(y, bias, int(x.dtype))

    def _weight_only_standard(self, x: Any, weight: Any, scale: Any, zero: Any, bias: Any) -> Any:
        if zero is not None:
            raise UnsupportedModelError(
                "TensorRT takes weights without zero points alone; give symmetric=true"
            )
        op, groups, inputs = self._onnx, int(scale.shape[0]), int(weight.shape[1])
        if weight.dtype == UINT8:
            weight, inputs = self._call_op(*UNPACK, weight), 2 * inputs
        matrix = self._dequantized(weight, op.Cast(scale, to=x.dtype), groups, inputs)
        y = op.MatMul(x, op.Transpose(matrix, perm=[1, 0]))
        return y if bias is None else op.Add(y, bias)

    def _dequantized(self, weight: Any, scale: Any, groups: int, inputs: int) -> Any:
        """[N, K] by a scale for each row, or for each block of a row's inputs."""
        op = self._onnx
        if groups == 1:
            row = op.Reshape(scale, op.Constant(value_ints=[-1]))
            return op.DequantizeLinear(weight, row, axis=0)
        turned = op.Transpose(scale, perm=[1, 0])
        return op.DequantizeLinear(weight, turned, axis=1, block_size=inputs // groups)

    def _product_of_dequantized(
        self,
        q: Any,
        x_scale: Any,
        weight: Any,
        w_scale: Any,
        bias: Any,
        dtype: int,
        format_: str,
    ) -> Any:
        if len(x_scale.shape) != 1:
            raise UnsupportedModelError(
                "TensorRT has no layer for activations that are quantized by a scale for each "
                f"token; calibrate scales: {CALIBRATE.format(format_)}"
            )
        op = self._onnx
        x = op.DequantizeLinear(q, self._scalar(x_scale))
        groups, inputs = int(w_scale.shape[0]), int(weight.shape[1])
        matrix = self._dequantized(weight, w_scale, groups, inputs)
        y = op.MatMul(x, op.Transpose(matrix, perm=[1, 0]))
        return self._finish(y, bias, dtype)

    def _scalar(self, scale: Any) -> Any:
        return self._onnx.Squeeze(scale)

    def _finish(self, y: Any, bias: Any, dtype: int) -> Any:
        """The bias in float32, one rounding."""
        op = self._onnx
        if bias is not None:
            y = op.Add(y, op.Cast(bias, to=FLOAT))
        return op.Cast(y, to=dtype)
